"""The pages build without a warning, and every code block in them does what it says.

The conventions are those of docs/design.md, "Documentation that runs".
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from torch import Tensor

import absynth
from absynth import evaluation
from absynth.cli import app, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^(```+)(\{?[\w+-]*\}?)\n(.*?)^\1$", flags=re.MULTILINE | re.DOTALL)
SHOWN_ONLY = {"text", "json", "toml", "html", "sql"}
FILE = re.compile(r"# (\w+\.py)\n")
NOT_RUN = re.compile(r"#\s*(takes|until)\b")
# What a shell does before absynth can be called; `make` targets are checked, not made.
SHELL = {". .venv/bin/activate", "python3 -m venv .venv"}
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(kind, code) for _, kind, code in BLOCK.findall(page.read_text(encoding="utf-8"))]


@contextlib.contextmanager
def new_modules_forgotten() -> Iterator[None]:
    """Files that a page writes are imported anew by the next one."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(os.getcwd()):
            del sys.modules[name]


def run_python(code: str, namespace: dict[str, Any], where: str) -> None:
    if named := FILE.match(code):
        Path(named[1]).write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        return
    exec(compile(code, where, "exec"), namespace)


def run_shell(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        if not words:
            continue
        if words[0] == "absynth":
            parse(words[1:])
            if not NOT_RUN.search(line):
                run_command(words, monkeypatch)
        elif words[0] == "make":
            done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif words[:2] == ["pip", "install"]:
            check_requirements(words[2:])
        elif words[0] == "ray":
            from ray.scripts.scripts import cli as ray

            ray.commands[words[1]].make_context(words[1], words[2:])  # the options exist; no cluster is started
        else:
            assert " ".join(words) in SHELL, f"no rule how to test {line!r}: see docs/design.md"


def parse(words: list[str]) -> None:
    """Raises a usage error, which names the option, for a command that the command line does not have."""
    group: Any = typer.main.get_command(app)
    assert words[0] in group.commands, f"absynth has no command {words[0]!r}"
    group.commands[words[0]].make_context(words[0], words[1:])


def check_requirements(words: list[str]) -> None:
    """The package and the extras that a line installs are this project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        name, _, extras = word.partition("[")
        assert name == project["name"], f"{word} is not this project"
        for extra in filter(None, extras.rstrip("]").split(",")):
            assert extra in project["optional-dependencies"], f"{name} has no extra {extra!r}"


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, " ".join(words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist_test: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    namespace: dict[str, Any] = {"__name__": page.stem}
    with new_modules_forgotten():
        for kind, code in blocks(page):
            if kind == "python":
                run_python(code, namespace, f"{page.name}: {code.splitlines()[0]}")
            elif kind == "sh":
                run_shell(code, monkeypatch)
            else:
                known = kind in SHOWN_ONLY or kind.startswith("{")  # a directive, which the build checks
                assert known, f"no rule how to test a block of {kind!r}: see docs/design.md"


def test_what_a_wrong_block_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no command 'levitate'"):
        run_shell("absynth levitate\n", monkeypatch)
    with pytest.raises(Exception, match="--hover"):
        run_shell("absynth evaluate --hover  # takes ages\n", monkeypatch)
    with pytest.raises(AssertionError, match="absynth classify absent"):
        run_shell("absynth classify absent.png\n", monkeypatch)
    with pytest.raises(AssertionError, match="no rule"):
        run_shell("curl example.com\n", monkeypatch)
    with pytest.raises(AssertionError, match="No rule to make"):
        run_shell("make coffee\n", monkeypatch)
    with pytest.raises(AssertionError, match="no extra 'moon'"):
        run_shell("pip install 'absynth[moon]'\n", monkeypatch)
    with pytest.raises(Exception, match="--orbit"):
        run_shell("ray start --orbit\n", monkeypatch)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages: warnings are errors, and nothing is fetched."""
    out = tmp_path_factory.mktemp("site")
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "trees", DOCS, out / "html"],
        env={**os.environ, **offline, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_pages_build_without_a_warning(site: Path) -> None:
    for page in PAGES:
        assert (site / f"{page.stem}.html").stat().st_size > 1000


def test_every_page_is_in_the_contents(site: Path) -> None:
    contents = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.stem == "index" or f'href="{page.stem}.html"' in contents, page


def test_pages_need_no_network(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not loaded, (page.name, loaded)


def test_every_public_name_is_described(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    public = {f"absynth.{name}" for name in absynth.__all__} - {"absynth.data", "absynth.__version__"}
    public |= {f"absynth.evaluation.{name}" for name in evaluation.__all__} - {"absynth.evaluation.THRESHOLDS"}
    missing = {name for name in public if not re.search(rf'id="(?:[\w.]+\.)?{name.rsplit(".", 1)[1]}"', text)}
    assert not missing


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            assert target.startswith("https://") or (DOCS / target).exists(), (page.name, target)


def test_figures_are_drawn_again(tmp_path: Path, mnist_test: tuple[Tensor, Tensor]) -> None:
    """Names and order of magnitude; the pixels depend on the versions of matplotlib and torch."""
    drawn = load_script("draw").main(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (DOCS / "figures").iterdir()}
    assert drawn["cnn"] < drawn["abs"]


def load_script(name: str) -> ModuleType:
    """A script of docs as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
