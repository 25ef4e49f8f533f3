"""The examples do what they say, each as a user runs it; and what they export holds what it came from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evaluation_models as models
from absynth.classifiers import Analysis
from absynth.errors import InputError
from absynth.export import analyses_frame, rows_frame, save

ROOT = Path(__file__).parent.parent
# What each prints, and the files that it leaves
EXPECTED = {
    "foolbox_attack": (" at L2 distance ", ()),
    "export_analyses": ("probability", ("analyses.parquet",)),
    "ledger_sql": ("L2 again: ", ("runs/cnn/ledger.sqlite",)),
    "own_model": ("median L2 distance", ("runs/mine/report.html", "runs/mine/report.csv")),
    "compare_runs": ("nearer on", ("runs/1-steps/ledger.sqlite", "runs/20-steps/ledger.sqlite")),
}


def test_every_example_is_run_and_explained() -> None:
    page = (ROOT / "docs" / "interoperability.md").read_text(encoding="utf-8")
    names = {file.stem for file in (ROOT / "examples").glob("*.py")}
    assert names == set(EXPECTED)
    assert all(f"examples/{name}.py" in page for name in names)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path, mnist_test: tuple[Tensor, Tensor]) -> None:
    text, files = EXPECTED[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    assert all((tmp_path / file).stat().st_size > 0 for file in files)
    if name == "ledger_sql":  # recomputed from the blobs, without absynth
        again, kept = done.stdout.splitlines()[-1].removeprefix("L2 again: ").split(", in the ledger: ")
        assert float(again) == pytest.approx(float(kept), abs=2e-6)


def analysis() -> Analysis:
    """Two images, three classes, four latents, 2×2 pixels."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3), (2, 3, 4), (2, 3, 1, 2, 2), (2, 3))
    return Analysis(*(torch.rand(size, generator=generator) for size in sizes))


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_analyses_come_back_from_a_file(ending: str, tmp_path: Path) -> None:
    import pandas

    found = analysis()
    frame = analyses_frame(found, torch.tensor([7, 1]), indices=[40, 41], pixels=ending == "parquet")
    path = save(frame, tmp_path / "new" / f"analyses.{ending}")
    read = pandas.read_parquet(path) if ending == "parquet" else pandas.read_csv(path)
    assert list(read["image"]) == [40] * 3 + [41] * 3 and list(read["label"]) == [7] * 3 + [1] * 3
    assert list(read["class"]) == [0, 1, 2] * 2
    assert torch.allclose(torch.tensor(read["energy"].to_numpy().astype("f4")).view(2, 3), found.energies)
    assert torch.allclose(torch.tensor(read["latent_3"].to_numpy().astype("f4")).view(2, 3), found.latents[..., 3])
    if ending == "parquet":
        last = torch.tensor(read["reconstruction"].iloc[-1].copy())
        assert torch.equal(last, found.reconstructions[1, 2].flatten())


def test_rows_of_a_run(tmp_path: Path) -> None:
    models.run(tmp_path, suite=models.SUITE[:1])
    frame = rows_frame(tmp_path)
    assert len(frame) == 8 and set(frame["model"]) == {"net"} and set(frame["attack"]) == {"boundary-projection-l2"}
    assert (frame.loc[frame["status"] == "misclassified", "distance"] == 0).all()
    models.run(tmp_path / "clean", suite="none")
    empty = rows_frame(tmp_path / "clean")
    assert len(empty) == 0 and list(empty.columns) == list(frame.columns)


def test_bad_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="3 labels for 2 analyzed images"):
        analyses_frame(analysis(), torch.tensor([1, 2, 3]))
    frame = analyses_frame(analysis())
    with pytest.raises(InputError, match=r"must end in \.parquet or \.csv"):
        save(frame, tmp_path / "analyses.xlsx")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="choose a writable folder"):
        save(frame, tmp_path / "file" / "analyses.csv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"pip install 'absynth\[export\]'$"):
        analyses_frame(analysis())
