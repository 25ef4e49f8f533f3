"""The scripts that make figures of docs/results.md: all can be started, and what reads ledgers reads them rightly."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from absynth.evaluation import summarize
from absynth.evaluation.statistics import wilson_interval
from evaluation_models import run

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_what_a_script_imports_is_there(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    assert runpy.run_path(str(FOLDER / f"{script}.py"), run_name="imported")["__doc__"]


def printed(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> Any:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    return json.loads(capsys.readouterr().out)


def test_balls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    cell = summarize(tmp_path)["net"].norms["l2"].all
    radius = sorted(cell.distances.values())[
        4
    ]  # five of eight are broken there, if no adversarial of L-inf lies nearer
    found = printed("balls", monkeypatch, capsys, tmp_path, f"l2={radius}", "linf=0")["net"]
    assert found["union"] == found[f"l2 {radius:g}"]
    assert found["union"]["accuracy"] == 3 / 8 and found["union"]["images"] == 8
    assert tuple(found["union"]["interval"]) == pytest.approx(wilson_interval(3, 8))
    with pytest.raises(SystemExit, match="RUN"):
        printed("balls", monkeypatch, capsys, tmp_path)
