"""What is shipped: the wheel and the sdist, their content, the versions, and that the wheel alone runs.

The wheel is installed into an empty environment for real; the libraries it declares, several hundred megabytes, are
linked into it from the environment of the tests, these and no others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor

import absynth
from absynth.cli import app
from small_models import save_picture

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Extras that a command needs: the command, which is tried without them.
NEEDS = {"explorer": ("explore",), "cluster": ("evaluate", "--model", "cnn", "--suite", "quick", "--cluster", "auto")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it."""
    out = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and the libraries it declares, and nothing else."""
    place = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    for name in declared(PROJECT["dependencies"]):
        link(name, site)
    return place / "bin"


def declared(requirements: list[str]) -> set[str]:
    """The distributions that these requirements bring, directly and through others."""
    names: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        environments = [{"extra": extra} for extra in one.extras] or [{"extra": ""}]
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(one.name)
        if name in names and not one.extras:
            continue
        names.add(name)
        for text in distribution(name).requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate(environment) for environment in environments):
                inner.marker = None
                todo.append(inner)
    return names


def link(name: str, site: Path) -> None:
    """Link an installed distribution, its metadata too, into the folder ``site``."""
    files = distribution(name).files
    assert files, name
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        target = Path(str(distribution(name).locate_file(top)))
        if target.exists() and not (site / top).exists():
            (site / top).symlink_to(target)


def call(bare: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """An installed command, as a shell in ``folder`` would run it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["MPLCONFIGDIR"] = str(bare / "matplotlib")
    return subprocess.run(
        [bare / str(words[0]), *map(str, words[1:])], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    source = {
        f"absynth/{path.relative_to(ROOT / 'src' / 'absynth')}"
        for path in (ROOT / "src" / "absynth").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"absynth/py.typed", "absynth/weights/abs.safetensors", "absynth/templates/quickstart.html"} <= source
    assert any(name.startswith("absynth/evaluation/data/") and name.endswith(".json") for name in source)
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert inside == source
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_tests_and_pages_need(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"README.md", "LICENSE", "LOG.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt"}
    assert wanted | {"docs/conf.py", "tests/conftest.py", "benchmarks/run.py", "src/absynth/py.typed"} <= names
    assert not [name for name in names if name.startswith((".venv", "docs/_build", "runs", ".git/"))]


def test_wheel_runs_on_the_libraries_it_declares_alone(
    bare: Path, tmp_path: Path, mnist_test: tuple[Tensor, Tensor]
) -> None:
    for tool in ("pytest", "hypothesis", "mypy", "sphinx", "build"):
        assert call(bare, tmp_path, "python", "-c", f"import {tool}").returncode == 1, tool
    version = call(bare, tmp_path, "absynth", "--version")
    assert version.stdout == f"absynth {absynth.__version__}\n"
    tour = call(bare, tmp_path, "absynth", "quickstart", "--images", 4, "--noise", 2, "--attacked", 1)
    assert tour.returncode == 0, tour.stderr
    assert (tmp_path / "quickstart" / "index.html").stat().st_size > 100_000
    save_picture(tmp_path / "seven.png", mnist_test[0][0])
    classified = call(bare, tmp_path, "absynth", "classify", "seven.png", "--explain", "why.png")
    assert classified.returncode == 0, classified.stderr
    assert classified.stdout.startswith("seven.png: 7, probability") and (tmp_path / "why.png").exists()


@pytest.mark.parametrize("extra", NEEDS)
def test_a_missing_extra_is_one_line_with_the_command(extra: str, bare: Path, tmp_path: Path) -> None:
    command = NEEDS[extra]
    known = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback is not None}
    usage = call(bare, tmp_path, "absynth", command[0], "--help").stdout if command[0] in known else ""
    if not usage or any(word.startswith("--") and word not in usage for word in command):
        pytest.fail(f"there is no {' '.join(command)}")
    done = call(bare, tmp_path, "absynth", *command)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"pip install 'absynth[{extra}]'" in line


def test_one_version_everywhere(wheel: Path) -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]  # read from absynth/__init__.py
    assert wheel.name.startswith(f"absynth-{absynth.__version__}-py3-none-any")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == absynth.__version__ and citation["license"] == PROJECT["license"]
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    released = [name for name in headings if name != "Unreleased"]
    assert headings and headings.count("Unreleased") <= 1
    assert not released or released[0] == absynth.__version__


def test_everything_a_fresh_clone_installs_is_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pinned = {canonicalize_name(name) for name in pins}
    extras = PROJECT["optional-dependencies"]
    tools = [text for extra in ("test", "docs") for text in extras[extra] if "absynth[" not in text]
    wanted = declared([*PROJECT["dependencies"], *tools])
    assert not {name for name in wanted if name not in pinned and name not in ("pip", "setuptools")}
