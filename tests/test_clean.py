"""Clean accuracy and what goes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import absynth
from absynth import data, zoo
from absynth.clean import answers, measure
from absynth.cli import evaluation
from absynth.errors import InputError
from small_models import write_all


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("weights"))


def test_measure_exactly() -> None:
    """A classifier of known probabilities: p(0) = 0.9 for images brighter than half, else 0.25 and p(1) = 0.75."""

    def classifier(images: torch.Tensor) -> torch.Tensor:
        bright = images.amax((1, 2, 3)) > 0.5
        return torch.where(bright[:, None], torch.tensor([0.9, 0.1]), torch.tensor([0.25, 0.75])).log()

    images = torch.cat([torch.ones(3, 1, 4, 4), torch.zeros(1, 1, 4, 4)])
    found = measure(classifier, images, torch.tensor([0, 0, 1, 1]))
    assert found.clean_accuracy == 0.75
    expected = torch.tensor([0.9, 0.9, 0.1, 0.75], dtype=torch.float64).log().mean().item()
    assert found.log_likelihood == pytest.approx(expected, abs=1e-6)
    assert found.confidence_histogram == (0, 0, 0, 0, 0, 0, 0, 1, 0, 3) or found.confidence_histogram[7:] == (1, 3, 0)
    assert found.refused is None
    assert measure(classifier, images[2:], torch.tensor([0, 1])).median_confidence == pytest.approx(0.825)
    told: list[int] = []
    with pytest.raises(absynth.InputError, match="2 classes"):
        measure(classifier, images, torch.tensor([0, 0, 1, 2]), progress=lambda done, _total, _text: told.append(done))
    assert not told  # of nothing that goes on before it fails


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.flatten(1)[:, 0], r"returned shape \(4,\) for 4 images: expected logits \(4, K\)"),
        (lambda x: x.flatten(1)[:1], r"returned shape \(1, 784\) for 4 images"),
        (lambda x: (x.flatten(1),), "returned a tuple for 4 images"),
        (lambda x: torch.where(torch.arange(4)[:, None] == 2, torch.nan, x.flatten(1)), "returned NaN for 1 of 4"),
        (lambda x: x.flatten(1) - torch.inf, "returned infinity for 4 of 4"),
        (
            lambda x: x.flatten(1) @ x.flatten(1),
            r"raised RuntimeError: .* on images \(4, 1, 28, 28\): it has to",
        ),
    ],
    ids=["one-number", "one-row", "tuple", "nan", "infinity", "raises"],
)
def test_a_model_whose_answers_are_no_logits_is_named_and_not_measured(
    answer: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    images, labels = data.load("digits", "test")
    with pytest.raises(InputError, match=message):
        measure(answer, images[:4], labels[:4])


def test_what_takes_days_is_attacked_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    clean, attacked = (evaluation._at_hand(None, None, cheap=cheap) for cheap in (False, True))
    assert set(clean) - set(attacked) == {"smoothed-cnn"}
    assert "--model smoothed-cnn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "doubt"),
    [
        (lambda x: x.flatten(1)[:, :10].softmax(1), "returns probabilities"),
        (lambda x: x.flatten(1)[:, :10] + torch.randn(len(x), 10), "changed between two calls"),
        (lambda x: x.flatten(1)[:, 300:310] - x.mean(), "depends on its batch"),
        (lambda x: x.flatten(1)[:, 300:310].squeeze(), "probing the model failed"),  # one image: no batch any more
        (lambda x: x.flatten(1)[:, 300:310], ""),
    ],
    ids=["probabilities", "random", "batch", "squeezed", "sound"],
)
def test_what_is_measured_is_doubted(answer: Callable[[torch.Tensor], torch.Tensor], doubt: str) -> None:
    images, labels = data.load("digits", "test")
    found = measure(answer, images[:16], labels[:16])
    assert len(found.doubts) == bool(doubt) and doubt in "".join(found.doubts)


def test_refusing_real_digits_has_a_price_that_is_told(weights: Path) -> None:
    model = zoo.load("abs", folder=weights)
    images, labels = data.load("digits", "test")
    found = measure(model, images[:40], labels[:40])
    chosen, posterior = answers(model, images[:40])
    kept = ~model.refuses(posterior)  # type: ignore[operator]
    assert found.refused == 1 - kept.double().mean().item()
    assert found.right_and_accepted == ((chosen == labels[:40]) & kept).double().mean().item()
