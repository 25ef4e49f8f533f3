"""What the README says to type does what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
# What takes minutes in full is run on the embedded digits, with the same command and options that make it short.
SHORTER = {
    "absynth train abs --data mnist --out weights": "absynth train cnn --data digits --out weights --effort 0.05"
}

SERVERS = {"absynth explore"}  # runs until it is interrupted: see test_explorer.py


def commands() -> list[str]:
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    return [command for line in lines if (command := line.split("#")[0].strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mnist_test: tuple[Tensor, Tensor]) -> Path:
    """An empty folder with the picture that the README classifies."""
    place = tmp_path_factory.mktemp("readme")
    Image.fromarray((mnist_test[0][0, 0] * 255).byte().numpy()).save(place / "digit.png")
    return place


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("absynth ") and c not in SERVERS])
def test_command(command: str, folder: Path) -> None:
    arguments = shlex.split(SHORTER.get(command, command))[1:]
    done = subprocess.run(
        [sys.executable, "-m", "absynth", *arguments], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    if "classify" in arguments:
        assert " 7" in done.stdout and (folder / "why.png").stat().st_size > 10_000


def test_make_targets_exist() -> None:
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["quickstart", "test"]
    for target in targets:
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
