"""What the README says to type does what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from absynth import data
from small_models import save_picture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
# What takes hours in full is run on two classes of twelve pictures, with the same command and hardly any steps.
SHORTER = {
    "absynth train abs --data mnist --out weights": "absynth train abs --data pictures --out weights --effort 0.0005"
}
# Run by the tests below, or by the shell itself.
OTHERS = {"make quickstart", "make test", ". .venv/bin/activate"}

SERVERS = {"absynth explore"}  # runs until it is interrupted: see test_explorer.py


def commands() -> list[str]:
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    return [command for line in lines if (command := line.split("#")[0].strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mnist_test: tuple[Tensor, Tensor]) -> Path:
    """An empty folder with the picture that the README classifies, a model of one's own, and a small data set."""
    place = tmp_path_factory.mktemp("readme")
    (place / "docs" / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "figures" / "digit.png", place / "docs" / "figures")
    (place / "mine.py").write_text("import absynth\n\n\ndef make():\n    return absynth.load('cnn')\n")
    images, labels = data.load("digits", "train")
    for digit in (0, 1):
        (place / "pictures" / str(digit)).mkdir(parents=True)
        for number, image in enumerate(images[labels == digit][:12]):
            save_picture(place / "pictures" / str(digit) / f"{number}.png", image, scale=1)
    return place


def test_every_command_is_tested() -> None:
    assert {command for command in commands() if not command.startswith("absynth ")} == OTHERS
    assert set(SHORTER) <= set(commands())


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("absynth ") and c not in SERVERS])
def test_command(command: str, folder: Path) -> None:
    arguments = shlex.split(SHORTER.get(command, command))[1:]
    done = subprocess.run(
        [sys.executable, "-m", "absynth", *arguments], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    if "classify" in arguments:
        assert " 7" in done.stdout and (folder / "why.png").stat().st_size > 10_000


def make(target: str, folder: Path, **environment: str) -> str:
    """Output of a target in the environment of the tests; what ``make setup`` installs is at hand already."""
    done = subprocess.run(
        ["make", f"--makefile={ROOT}/Makefile", "--old-file=.venv/.installed", f"BIN={sys.prefix}/bin", target],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_quickstart(folder: Path) -> None:
    shown = make("quickstart", folder, ARGS="--attacked 2")  # 20 take two minutes
    assert "300 test images" in shown and "prototype-abs" in shown
    assert "the first 2 test images under one attack a norm, every figure an upper bound" in shown
    assert (folder / "quickstart" / "index.html").stat().st_size > 100_000
    (report,) = folder.glob("quickstart/run-mnist-*/report.html")
    page = (folder / "quickstart" / "index.html").read_text(encoding="utf-8")
    assert f'<a href="{report.parent.name}/report.html">' in page
    assert "Madry et al." in report.read_text(encoding="utf-8")


def test_make_test_on_one_file(folder: Path) -> None:
    one_file = f"-c {ROOT / 'pyproject.toml'} {ROOT / 'tests' / 'test_norms.py'}"
    assert " passed" in make("test", folder, PYTEST_ADDOPTS=one_file)


def test_other_targets_exist() -> None:
    for target in re.findall(r"`make (\w+)`", README):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_python_block(mnist_test: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([7]) tensor(0.")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    assert shutil.which("make")
