"""The command line: what it prints, where, and the line a mistake gets."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import absynth
from absynth import data, weight_files, zoo
from absynth.cli import app
from absynth.cli.output import progress
from command_line import Run, assert_error, document

ROOT = Path(__file__).parent.parent


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as users do, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **options.pop("env", {})}
    command = [sys.executable, "-c", "from absynth.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, timeout=600, **{"capture_output": True, **options})


# The program as a whole


def test_help_and_version(run: Run) -> None:
    assert run("--version").out == f"absynth {absynth.__version__}\n"
    shown = run("--help").out
    for name in ("quickstart", "data", "models", "train", "classify", "evaluate"):
        assert f"\n  {name} " in shown
        assert run(name, "--help").code == 0
    assert "..." not in shown.split("Commands:")[1], "a summary is too long for its line"


def test_page_of_attacks_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "attacks_page.py"))["page"]()
    assert page == (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8"), "run python docs/attacks_page.py"


def test_page_is_current() -> None:
    pinned = f"typer=={version('typer')}\n" in (ROOT / "constraints.txt").read_text()
    if not pinned:
        pytest.skip("help is laid out a little differently by every version of Typer")
    namespace: dict[str, Any] = {"__name__": "cli_page", "__file__": str(ROOT / "docs" / "cli_page.py")}
    exec((ROOT / "docs" / "cli_page.py").read_text(), namespace)
    assert namespace["page"]() == (ROOT / "docs" / "cli.md").read_text(), "run: python docs/cli_page.py"


@pytest.mark.parametrize(
    ("attacks", "message"), [("none", "returned NaN for 3 of 3"), ("fgm", "no image got an answer")]
)
def test_a_model_that_answers_nothing_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attacks: str, message: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    options = ("--data", "digits", "--images", 3, "--norms", "l2", "--attacks", attacks, "--out", tmp_path / "run")
    result = run("evaluate", "--model", "evaluation_models:silent", *options)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: evaluation_models:silent: ") and message in result.err


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait(own: str | None, expected: str) -> None:
    """Set before PyTorch is imported, which is when it is read; what the user has set stays."""
    program = "import atexit, os; atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    program += "; import sys; from absynth.cli import main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(ROOT / "src")} | ({} if own is None else {"OMP_WAIT_POLICY": own})
    command = [sys.executable, "-c", program, "--version"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600).stdout
    assert shown.splitlines()[-1] == f"{expected} False"


def test_stopped_while_it_is_imported() -> None:
    """Ctrl-C in the first tenths of a second, which the import of the command line takes."""
    script = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
from absynth.__main__ import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_light_imports() -> None:
    """`--help` imports no PyTorch; `classify` nothing that only figures, training or attacks need."""
    heavy = "{'torch', 'rich', 'matplotlib', 'sklearn', 'scipy', 'foolbox', 'PIL'}"
    check = f"import sys, absynth.cli; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=600)
    assert found.stdout == "[]\n", found.stderr
    heavy = "{'matplotlib', 'sklearn', 'scipy', 'foolbox', 'absynth.attacks', 'absynth.training', 'absynth.evaluation'}"
    check = f"import sys, absynth.verdicts; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=600)
    assert found.stdout == "[]\n", found.stderr


def test_public_names() -> None:
    assert absynth.models() == zoo.names()
    assert absynth.load is zoo.load
    assert set(absynth.__all__) <= set(dir(absynth))
    for name in absynth.__all__:
        assert getattr(absynth, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = absynth.nothing


@pytest.mark.parametrize("name", [3, None, ["cnn"]])
def test_what_is_no_name_is_no_model(name: Any) -> None:
    with pytest.raises(absynth.InputError, match=r"unknown model .*known: abs, binary-abs") as caught:
        absynth.load(name)
    assert "\n" not in str(caught.value)


def test_closed_pipe_and_full_disk(weights: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    closed = shell("models", "--weights", weights, "--json", stdout=write, stderr=subprocess.PIPE, capture_output=False)
    os.close(write)
    assert closed.stderr == ""
    with open("/dev/full", "w") as full:
        done = shell(
            "models", "--weights", weights, "--json", stdout=full, stderr=subprocess.PIPE, capture_output=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_long_work_says_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: a line for every tenth and, within a tenth that takes long, for every five minutes."""
    clock = iter([1000.0, 1010.0, 1400.0, 1410.0, 1420.0])
    monkeypatch.setattr("absynth.cli.output.time.monotonic", lambda: next(clock))
    with progress("reproducing") as report:
        for done, text in ((1, "abs"), (2, "cnn"), (3, "madry"), (9, "madry"), (10, "")):
            report(done, 50, text)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reproducing: 2 % (abs)",
        "reproducing: 6 % (madry)",
        "reproducing: 18 % (madry)",
        "reproducing: 20 %",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected", "help_of"),
    [
        (("classify",), "image", "absynth classify"),
        (("evaluate", "--images", "abc"), "--images", "absynth evaluate"),
        (("evalate",), "evalate", "absynth"),
        (("--nothing",), "--nothing", "absynth"),
    ],
)
def test_usage_error(run: Run, arguments: tuple[str, ...], expected: str, help_of: str) -> None:
    result = run(*arguments)
    assert_error(result, f"see '{help_of} --help'")
    assert expected in result.err.lower() and len(result.err.splitlines()) == 1


# data


def test_data(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABSYNTH_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = document(run("data", "--json"))["datasets"]
    assert list(found) == list(data.NAMES)
    test = found["digits"]["splits"][1]
    assert (test["split"], test["images"], test["shape"], test["classes"]) == ("test", 500, [1, 28, 28], 10)
    assert test["digest"] == data.digest(*data.load("digits", "test"))
    assert found["digits"]["problem"] is None
    assert found["mnist"]["splits"] == []
    assert "absynth data mnist --download" in found["mnist"]["problem"]
    text = run("data").out
    assert "1,297" in text
    assert "absynth data kmnist --download" in text


def test_data_errors(run: Run, tmp_path: Path) -> None:
    assert_error(run("data", "mnits"), "'mnits'", "did you mean mnist")
    assert_error(run("data", "--download"), "mnist")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 cut off")
    found = document(run("data", "mnist", "--root", tmp_path, "--json"))["datasets"]["mnist"]
    assert "t10k-images-idx3-ubyte" in found["problem"]


# models


def test_models(run: Run, weights: Path) -> None:
    found = document(run("models", "--weights", weights, "--json"))["models"]
    assert list(found) == list(zoo.names())
    for name, one in found.items():
        model = zoo.load(name, folder=weights)
        if name in ("abs", "binary-abs", "saturating-abs"):
            expected = sum(p.numel() for decoder in model.decoders for p in decoder.parameters())
            expected += 10 if name == "binary-abs" else 0  # a factor a class
        elif name.endswith("prototype-abs"):  # it keeps what its decoders made, not the decoders
            expected = found["abs"]["parameters"] + model.latents.numel()
        else:
            expected = sum(p.numel() for p in model.parameters())
        assert one["parameters"] == expected
        assert one["clean_accuracy"] == 0.5
        assert one["problem"] is None
        assert one["digest"] == weight_files.read(weights / f"{name}.safetensors").digest


def test_the_home_folder_after_an_equals_sign(run: Run, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    expected = document(run("models", "--weights", weights, "--json"))
    assert document(run("models", f"--weights=~/{weights.name}", "--json")) == expected


def test_models_missing(run: Run, tmp_path: Path) -> None:
    result = run("models", "--weights", tmp_path)
    assert result.code == 0
    (line,) = result.err.splitlines()  # one for all models
    assert line.startswith("abs, binary-abs, cnn") and f"no weight file in {tmp_path}" in line
    assert f"absynth train NAME --out {tmp_path}" in line


def test_damaged_training_data_leave_out_the_model_that_needs_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 cut off")
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    found = document(run("models", "--root", tmp_path, "--json"))["models"]
    assert "train-images-idx3-ubyte" in found["nearest-neighbor"]["problem"]


# evaluate --attacks none


def test_evaluate(run: Run, weights: Path) -> None:
    options = ("--data", "digits", "--weights", weights, "--images", 40)
    found = document(run("evaluate", *options, "--model", "cnn", "--model", "abs", "--json"))
    assert list(found["models"]) == ["cnn", "abs"]
    images, labels = data.load("digits", "test")
    for name, one in found["models"].items():
        logits = zoo.load(name, folder=weights)(images[:40])
        assert one["clean_accuracy"] == float((logits.argmax(1) == labels[:40]).double().mean())
        low, high = one["interval"]
        assert low < one["clean_accuracy"] < high
        assert sum(one["confidence_histogram"]) == one["images"] == 40
    assert found["models"]["cnn"]["refused"] is None
    assert found["models"]["abs"]["refused"] == 0
    everything = run("evaluate", *options)
    assert everything.code == 0
    for name in zoo.names():
        assert f" {name} " in everything.out


def test_what_does_nothing_without_attacks_is_said(run: Run, weights: Path, tmp_path: Path) -> None:
    options = ("evaluate", "--data", "digits", "--weights", weights, "--model", "cnn", "--images", 3)
    assert "does nothing" not in run(*options).err
    idle = run(*options, "--out", tmp_path / "run", "--seed", 0).err
    assert "without attacks --out, --seed do nothing: --suite quick attacks\n" in idle


def test_norms_are_spelled_as_one_likes(run: Run, weights: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--weights", weights, "--images", 2, "--out", tmp_path, "--json")
    attacked = run("evaluate", "--model", "cnn", "--suite", "fgm, fgsm", "--norms", "L2, linf ", *options)
    assert {"l2", "linf"} <= set(document(attacked)["models"]["cnn"])
    certified = document(run("certify", "--model", "nearest-neighbor", "--norm", "L2,l1", "--norm", "LINF", *options))
    assert list(certified["norms"]) == ["l2", "l1", "linf"]


def test_evaluate_errors(run: Run, weights: Path, tmp_path: Path) -> None:
    options = ("evaluate", "--data", "digits", "--weights", weights)
    assert_error(run(*options, "--model", "cn"), "did you mean cnn", "package.module:factory")
    assert_error(run(*options, "--model", ":lin"), "':lin' names no module", "package.module:factory")
    assert_error(run(*options, "--model", "mine:"), "'mine:' names no function", "package.module:factory")
    assert_error(run(*options, "--images", 501), "501", "500")
    assert_error(run(*options, "--images", 0), "images is 0")
    assert_error(run("evaluate", "--data", "digit", "--weights", weights), "did you mean digits")
    assert_error(run(*options, "--norms", "l2,l7"), "unknown norm 'l7'")
    assert_error(run(*options, "--model", "no_such_module:make"), "no_such_module")
    assert_error(run("evaluate", "--data", "digits", "--weights", tmp_path), "absynth train abs")
    assert_error(run(*options, "--model", "cnn", "--attacks", "strng", "--out", tmp_path), "did you mean strong")


# under attack: evaluate, report, verify, compare, merge, distal


def test_attacks(run: Run) -> None:
    found = document(run("attacks", "--json"))
    names = {one["name"] for one in found["attacks"]}
    assert set(found["suites"]) == {"quick", "paper", "strong"}
    assert all(set(members) <= names for members in found["suites"].values())
    assert "boundary-projection-l2" in run("attacks").out


def test_attacked(run: Run, weights: Path, tmp_path: Path) -> None:
    where = ("--data", "digits", "--weights", weights, "--images", 3)
    options = ("evaluate", "--model", "cnn", "--attacks", "fgm-l2", "--norms", "l2", *where)
    found = document(run(*options, "--out", tmp_path / "one", "--json"))["models"]["cnn"]
    assert {"median", "accuracy", "threshold", "images", "attacks"} <= set(found["l2"])
    assert found["l2"]["images"] == 3
    again = run(*options, "--out", tmp_path / "one")
    assert "holds 3 rows already" in again.err and "all attacks" not in again.out  # there is one
    assert run(*options, "--out", tmp_path / "two", "--seed", 1).code == 0
    assert document(run("verify", tmp_path / "one", "--weights", weights, "--json"))["holds"]
    assert document(run("compare", tmp_path / "one" / "cnn", tmp_path / "two" / "cnn", "--json"))["differences"]
    assert run("merge", tmp_path / "one" / "cnn", tmp_path / "two" / "cnn", "--out", tmp_path / "both").code == 0
    distal = ("distal", "--model", "cnn", "--count", 2, "--steps", 2, "--out", tmp_path / "one")
    confidences = document(run(*distal, "--data", "digits", "--weights", weights, "--json"))
    assert len(confidences["models"]["cnn"]["confidences"]) == 2
    files = document(run("report", tmp_path / "one", "--json"))
    assert all(Path(path).stat().st_size > 0 for path in files.values())
    assert_error(run("report", tmp_path / "nothing"), "nothing")


# quickstart


def test_quickstart_falls_back(run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "none shipped")
    # as if an earlier quickstart had trained: that one is kept and not trained again
    (tmp_path / "tour").mkdir()
    (tmp_path / "tour" / "weights").symlink_to(weights)
    result = run("quickstart", "--out", tmp_path / "tour", "--images", 5, "--noise", 3, "--attacked", 1)
    assert result.code == 0, result.err
    assert "falling back to the embedded digits" in result.err
    page = (tmp_path / "tour" / "index.html").read_text()
    assert str(tmp_path / "tour" / "index.html") in result.out.replace("\n", "")
    for name in zoo.names():
        assert name in result.out
        assert f">{name}<" in page
    assert "the first 1 test images under one attack a norm, every figure an upper bound" in result.out
    assert len(list((tmp_path / "tour").glob("run-digits-*/report.html"))) == 1
    assert page.count("data:image/png;base64,") == 4
    assert "$" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_quickstart_cannot_write(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_error(run("quickstart", "--out", tmp_path / "file" / "tour"), "cannot write into")


def test_fault_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no check foresaw is one line too, and says how to see more."""

    def faulty() -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(app.registered_commands[1], "callback", faulty)
    monkeypatch.setattr(app.registered_commands[1], "name", "data")
    result = run("data")
    assert result.code == 1
    assert result.err.startswith("error: a fault of absynth itself, ZeroDivisionError")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["gpu0", "tpu", "meta"])
@pytest.mark.parametrize("command", [("train", "cnn"), ("evaluate",), ("evaluate", "--suite", "quick"), ("reproduce",)])
def test_a_device_that_is_not_there_is_one_line(
    run: Run, weights: Path, tmp_path: Path, command: tuple[str, ...], name: str
) -> None:
    place = ("--out", tmp_path / "out")
    model = () if command[0] == "train" else ("--model", "cnn", "--weights", weights)
    found = run(*command, *model, "--data", "digits", *place, "--device", name)
    assert found.code == 2 and found.out == "" and f"'{name}'" in found.err and "use cpu" in found.err
    assert "Traceback" not in found.err and "mkldnn" not in found.err  # of PyTorch's kinds
