"""The released weights: our analysis against the energies that the authors' released code gives for them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from absynth import zoo
from absynth.analysis import PAPER, Schedule
from absynth.classifiers import ABS
from absynth.errors import InputError

Split = tuple[Tensor, Tensor]


def reference(file: str) -> Path:
    """A file of the ``reference`` folder, which lies beside the folder of MNIST."""
    path = Path(os.environ.get("ABSYNTH_DATA", "data/mnist")).resolve().parent / "reference" / file
    if not path.is_file() and not os.environ.get("CI"):
        pytest.skip("the released weights are not at hand")
    return path


@pytest.fixture(scope="module")
def released() -> ABS:
    return zoo.from_released(reference("original_abs.safetensors"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(reference("original_outputs.safetensors"))


def test_the_papers_schedule(released: ABS, expected: dict[str, Tensor], mnist_test: Split) -> None:
    images, labels = mnist_test[0][:200], mnist_test[1][:200]
    found = released.analyze(images, schedule=PAPER).energies
    theirs = expected["abs.energies"]
    assert (found.argmin(1) == theirs.argmin(1)).sum() >= 198
    true = labels[:, None]
    assert (found.gather(1, true) <= 1.01 * theirs.gather(1, true)).sum() >= 198
    # and it is the same search, not a better one, but for latents that leave the ball keeping their signs
    assert 0.85 < found.mean() / theirs.mean() <= 1
    torch.testing.assert_close(released.posterior(-theirs), expected["abs.probabilities"], atol=2e-3, rtol=0)


def test_the_default_analysis_reaches_lower_energies(
    released: ABS, expected: dict[str, Tensor], mnist_test: Split
) -> None:
    energies = released.analyze(mnist_test[0][:200]).energies
    theirs = expected["abs.energies"]
    assert energies.mean() <= theirs.mean()
    true = mnist_test[1][:200, None]
    # one of the 200 stays in another local minimum of its class
    assert (energies.gather(1, true) <= 1.01 * theirs.gather(1, true)).sum() >= 198


def test_binary_abs(expected: dict[str, Tensor], mnist_test: Split) -> None:
    binary = zoo.from_released(reference("original_abs.safetensors"), binary=True)
    energies = binary.analyze(mnist_test[0][:60], schedule=Schedule(steps=4)).energies
    theirs = expected["binary_abs.energies"][:60]
    assert (energies.argmin(1) == theirs.argmin(1)).sum() >= 58
    assert energies.mean() <= theirs.mean()


def test_the_released_decoders_are_a_model_for_the_command_line(
    released: ABS, mnist_test: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    from absynth.evaluation.plan import load_model

    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.delenv("ABSYNTH_RELEASED", raising=False)
    with pytest.raises(InputError, match="ABSYNTH_RELEASED is not set"):
        load_model("benchmarks.released:abs_model")
    monkeypatch.setenv("ABSYNTH_RELEASED", str(reference("original_abs.safetensors")))
    model = load_model("benchmarks.released:abs_model")
    assert torch.equal(model(mnist_test[0][:8]), released(mnist_test[0][:8]))
