"""Certificates in the ledger: written, resumed, verified, reported; estimates marked as such."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from absynth import data, zoo
from absynth.certificates import certified_radii
from absynth.cli import main
from absynth.cli.pictures import at_most
from absynth.errors import InputError
from absynth.estimates import PLAIN, THRESHOLDED, _paper_l2, estimated_radii
from absynth.evaluation import Ledger, certify, evaluate, report, verify
from small_models import write_all

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["absynth", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return call


def test_radii_are_written_down_and_not_computed_twice(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.load("nearest-neighbor", folder=weights)
    found = certify(model, "digits", images=6, out=tmp_path, name="nearest-neighbor")
    images, labels = data.load("digits", "test")
    expected = certified_radii(model, images[:6], labels[:6])  # type: ignore[arg-type]
    for norm, one in found.items():
        assert one.radii == tuple(expected[norm].tolist()) and one.kind == "exact" and one.images == 6
        assert one.mean_radius == pytest.approx(expected[norm].mean().item())
        assert one.certified_accuracy == (expected[norm] > one.radius).double().mean().item()
    with Ledger(tmp_path) as ledger:
        rows = ledger.certificates(ledger.models()[0].digest)
    assert len(rows) == 4 * 6 and {row.kind for row in rows} == {"exact"}

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("absynth.certificates.Certifier.radii", never)
    again = certify(model, "digits", images=6, out=tmp_path, name="nearest-neighbor")
    assert again["l2"].radii == found["l2"].radii and again["l2"].seconds_per_image is None


def test_interrupted_certification_goes_on(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("nearest-neighbor", folder=weights)

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(model, "digits", images=40, out=tmp_path, norms=("l2",), progress=stop)
    with Ledger(tmp_path) as ledger:
        assert len(ledger.certificates(ledger.models()[0].digest)) == 32
    told: list[int] = []
    certify(
        model, "digits", images=40, out=tmp_path, norms=("l2",), progress=lambda done, _total, _text: told.append(done)
    )
    assert told == [40]


def test_attacks_and_certificates_share_a_ledger_that_verifies(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("prototype-abs", folder=weights)
    images, _ = data.load("digits", "test")
    with torch.no_grad():
        labels = model(images[:5]).argmax(1)  # whatever an untrained model says, so that there is something to certify
    own = (images[:5], labels)
    certify(model, own, images=5, out=tmp_path, name="ours")
    evaluate(
        model, own, suite="boundary-projection-l2", norms=("l2",), images=5, out=tmp_path, name="ours", probe=False
    )
    checked = verify(tmp_path, models={"ours": model})
    assert checked.holds and checked.certificates == 20 and checked.rows == 5
    with Ledger(tmp_path, write=True) as ledger:  # a certificate that an attack refutes is found out
        digest = ledger.models()[0].digest
        (first, *_) = [one for one in ledger.certificates(digest) if one.norm == "l2"]
        ledger.add_certificates([replace(first, radius=1e6)])
    checked = verify(tmp_path, models={"ours": model})
    assert any("certifies 1e+06" in failure.reason for failure in checked.failures)


def test_certificates_and_attacks_in_folders_of_their_own_are_compared(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("nearest-neighbor", folder=weights)
    attacks, certificates = tmp_path / "attacks", tmp_path / "certificates"
    evaluate(model, "digits", suite="deepfool-l2", norms=("l2",), images=4, out=attacks, name="net", probe=False)
    certify(model, "digits", images=4, out=certificates, norms=("l2",), name="net")
    for folders in ((attacks, certificates), (certificates, attacks)):
        assert verify(*folders, models={"net": model}).holds
    with Ledger(certificates, write=True) as ledger:
        good = next(one for one in ledger.certificates(ledger.models()[0].digest) if one.radius > 0)
        ledger.add_certificates([replace(good, radius=1e6)])
    assert verify(certificates, models={"net": model}).holds  # nothing there refutes it
    for folders in ((attacks, certificates), (certificates, attacks)):
        (failure,) = verify(*folders, models={"net": model}).failures
        assert failure.image == good.image and "certifies 1e+06" in failure.reason


def test_a_certificate_of_a_misclassified_image_does_not_hold(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("nearest-neighbor", folder=weights)
    images = data.load("digits", "test")[0]
    with torch.no_grad():
        wrong = (model(images[:4]).argmax(1) + 1) % 10
    certify(model, (images[:4], wrong), images=4, out=tmp_path, norms=("l2",), name="net")
    assert verify(tmp_path, models={"net": model}).holds  # radii of 0
    with Ledger(tmp_path, write=True) as ledger:
        (first, *_) = ledger.certificates(ledger.models()[0].digest)
        ledger.add_certificates([replace(first, radius=0.5)])
    (failure,) = verify(tmp_path, models={"net": model}).failures
    assert "certifies 0.5, the model misclassifies" in failure.reason


class Rolled(nn.Module):
    """A model that answers something else than its prototypes say."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.model(images).roll(1, dims=1)
        return answer

    def prototypes(self) -> Any:
        return self.model.prototypes()  # type: ignore[operator]


def test_a_model_that_disagrees_with_its_prototypes_is_not_certified(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("nearest-neighbor", folder=weights)
    with pytest.raises(InputError, match=r"misclassifies image \d+ and \d+ more of 20, which its prototypes\(\)"):
        certify(Rolled(model), "digits", images=20, out=tmp_path, norms=("l2",), name="rolled")
    with Ledger(tmp_path) as ledger:
        assert not ledger.certificates(ledger.models()[0].digest)


def test_the_report_shows_them(weights: Path, tmp_path: Path) -> None:
    model = zoo.load("prototype-abs", folder=weights)
    certify(model, "digits", images=3, out=tmp_path, name="prototype-abs")
    text = Path(report(tmp_path).html).read_text(encoding="utf-8")
    assert "bisector" in text and "exact" in text


def test_command(run: Run, weights: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--weights", weights, "--images", 4, "--out", tmp_path / "run")
    code, out, _ = run("certify", "--model", "nearest-neighbor", "--norm", "l2", "--radius", 0.5, *options, "--json")
    document: dict[str, Any] = json.loads(out)
    assert code == 0 and document["images"] == 4 and document["radius"] == 0.5
    assert set(document) >= {"clean_accuracy", "certified_accuracy", "mean_radius", "median_radius"}
    code, out, _ = run("certify", "--model", "nearest-neighbor", *options)
    assert code == 0 and all(norm in out for norm in ("l0", "l1", "l2", "linf")) and "certified there" in out
    code, out, _ = run("certify", "--model", "abs", "--estimates", *options, "--json")
    assert code == 0 and set(json.loads(out)["norms"]) == set(PLAIN)
    code, out, _ = run("verify", tmp_path / "run", "--weights", weights)
    assert code == 0 and "everything holds" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "cnn"), "prototype-abs and nearest-neighbor"),
        (("--model", "abs"), "--estimates"),
        (("--radius", "1.5"), "give --norm with --radius"),
        (("--radius", "1.5", "--norm", "l1", "--norm", "l2"), "radius is 1.5 for l1, l2 alike"),
        (("--norm", "l3"), "norm is 'l3'"),
        (("--radius", "-1"), "radius is -1.0"),
        (("--radius", "nan"), "radius is nan"),
        (("--model", "cnn", "--estimates"), "no estimated bounds"),
        (("--model", "abs", "--estimates", "--norm", "l0"), "estimates are for l2 and linf"),
        (("--model", "nearest-neighbor", "--images", "100000"), "images is 100000"),
    ],
)
def test_bad_input(run: Run, weights: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    code, _, err = run("certify", "--data", "digits", "--weights", weights, "--out", tmp_path, *arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) <= 2 and "Traceback" not in err


def test_prototypes_that_do_not_match_their_digest(run: Run, weights: Path, tmp_path: Path) -> None:
    content = bytearray((weights / "prototype-abs.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "prototype-abs.safetensors").write_bytes(content)
    code, _, err = run("certify", "--weights", tmp_path, "--data", "digits", "--out", tmp_path / "run")
    assert code == 2 and "digest" in err


def test_estimates_follow_their_formulas(weights: Path) -> None:
    """Recomputed one image at a time from the energies of a long search."""
    model = zoo.load("abs", folder=weights)
    images, _ = data.load("digits", "test")
    images = images[:3]
    labels = model(images).argmax(1)
    found = estimated_radii(model, images, labels, searches=2, steps=5)  # type: ignore[arg-type]
    energies = 784 * model.analyze(images, schedule=replace(model.schedule, slack=(), steps=12)).energies.double()  # type: ignore[operator]
    for row, label in enumerate(labels.tolist()):
        others = [float(energies[row, c].sqrt()) for c in range(10) if c != label]
        expected = (min(others) - float(energies[row, label].sqrt())) / 2
        assert float(found["lipschitz"][row]) == pytest.approx(max(0.0, expected), abs=2e-3)
    assert bool((found["bisector"] >= found["paper-l2"] - 1e-3).all())  # sharper, never below
    assert all(radius.dtype == torch.float64 and bool((radius >= 0).all()) for radius in found.values())
    wrong = estimated_radii(model, images, (labels + 1) % 10, searches=1, steps=0)  # type: ignore[arg-type]
    assert all(radius.tolist() == [0.0] * 3 for radius in wrong.values())


def test_estimates_of_a_thresholded_model_count_flips(weights: Path) -> None:
    model = zoo.load("binary-abs", folder=weights)
    images, _ = data.load("digits", "test")
    images = images[:4]
    labels = model(images).argmax(1)
    found = estimated_radii(model, images, labels, searches=1)  # type: ignore[arg-type]
    assert set(found) == set(THRESHOLDED)
    for name in ("paper-l2", "lipschitz"):
        costs = (images.flatten(1).double() - 0.5).square().sort(dim=1).values
        for row in range(4):
            flips = math.ceil(float(found[name][row]) ** 2 * (1 - 1e-9))
            assert float(found[f"{name}-input"][row]) == pytest.approx(float(costs[row, :flips].sum().sqrt()))


def test_the_papers_bound_with_factors_solves_its_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator).double()  # noqa: E731
    factor, energy, r, factors, distances = 1 + 0.1 * draw(5), draw(5), draw(5), 0.95 + 0.1 * draw(5, 3), 2 + draw(5, 3)
    e = _paper_l2(factor, energy, r, factors, distances)
    mine = factor[:, None] * (energy[:, None] + 2 * r[:, None] * e + e.square())
    torch.testing.assert_close(mine, factors * (distances - e).square())
    plain = _paper_l2(torch.ones(5).double(), energy, r, torch.ones(5, 3).double(), distances)
    torch.testing.assert_close(plain, (distances.square() - energy[:, None]) / (2 * (distances + r[:, None])))


def test_estimates_are_for_abs(weights: Path) -> None:
    with pytest.raises(InputError, match="no estimated bounds"):
        estimated_radii(zoo.load("cnn", folder=weights), torch.zeros(1, 1, 28, 28), torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="searches is 0"):
        estimated_radii(zoo.load("abs", folder=weights), torch.zeros(1, 1, 28, 28), torch.tensor([0]), searches=0)  # type: ignore[arg-type]


def test_a_certified_radius_is_never_rounded_up() -> None:
    for radius in (2.5489, 0.170699, 0.99999, 12.349, 13.0, 1e-7, 0.0, 100.9, 1234.0):
        shown = float(at_most(radius))
        assert shown <= radius and (radius - shown) <= 0.01 * radius
    assert at_most(math.inf) == "inf"
