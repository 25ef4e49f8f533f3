"""The certified union of the three balls, and certify for the saturating model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from absynth.cli import main
from absynth.evaluation import Certified, certified_union
from small_models import write_all


def certified(norm: str, radii: dict[int, float], kind: str = "exact") -> Certified:
    return Certified(
        norm=norm, method="bisector", kind=kind, radius=1.0, images=len(radii), clean_accuracy=1.0,  # type: ignore[arg-type]
        certified_accuracy=0.0, interval=(0.0, 1.0), mean_radius=0.0, median_radius=0.0,
        radii=tuple(radii.values()), indices=tuple(radii),
    )  # fmt: skip


def test_an_image_counts_when_all_three_radii_exceed_their_thresholds() -> None:
    found = {
        "l0": certified("l0", {0: 13, 1: 12, 2: 20, 3: 13}),
        "l2": certified("l2", {3: 1.6, 2: 1.5, 1: 9, 0: 1.6}),  # in another order
        "linf": certified("linf", {0: 0.31, 1: 0.9, 2: 0.9, 3: 0.29}),
        "l1": certified("l1", {0: 0.0}),  # has no say
    }
    union = certified_union(found)
    assert union is not None and (union.images, union.certified_accuracy) == (4, 0.25)
    assert union.balls == {"l0": 12.0, "l2": 1.5, "linf": 0.3}
    assert certified_union({norm: found[norm] for norm in ("l0", "l2")}) is None
    assert certified_union({**found, "l2": certified("l2", {0: 9.0}, kind="estimate")}) is None


def test_certify_of_the_saturating_model_says_the_union(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_all(tmp_path / "weights")
    shared = [
        "absynth", "certify", "--model", "saturating-prototype-abs", "--weights", str(folder), "--data", "digits",
        "--images", "3", "--out", str(tmp_path / "run"),
    ]  # fmt: skip

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*shared, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    union = json.loads(run("--json"))["union"]
    assert union["images"] == 3 and 0 <= union["certified_accuracy"] <= 1
    assert "l0 12 · l2 1.5 · linf 0.3" in run()
    assert "union" not in json.loads(run("--json", "--norm", "l2"))
