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
from absynth.evaluation import Ledger, load_distal, save_distal
from absynth.reproduction import distal_images, evaluate_models
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


def test_distal_images_go_on_after_the_last_model(weights: Path, tmp_path: Path) -> None:
    def images(*models: str, stop: str | None = None) -> list[str]:
        """The models whose images were made."""
        made: list[str] = []

        def tell(_done: int, _total: int, name: str) -> None:
            if name == stop:
                raise KeyboardInterrupt
            made.append(name)

        found = distal_images(models, tmp_path, dataset="digits", count=2, steps=1, weights=weights, progress=tell)
        assert list(found) == list(models)
        return made

    with pytest.raises(KeyboardInterrupt):
        images("cnn", "abs", stop="abs")
    assert list(load_distal(tmp_path)) == ["cnn"]
    assert images("cnn", "abs") == ["abs"] and images("abs", "cnn") == []
    assert images("transfer-cnn") == ["transfer-cnn"]
    assert list(load_distal(tmp_path)) == ["transfer-cnn", "cnn", "abs"]  # what is there stays
    seen: list[tuple[int, int]] = []
    distal_images(
        ["cnn", "madry"], tmp_path / "other", dataset="digits", count=2, steps=3, weights=weights,
        progress=lambda done, total, _name: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen) and seen[-1] == (6, 6)  # one bar for both models, which ends where it says


def test_distal_images_made_another_way_are_not_lost(run: Run, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start = ("distal", "--data", "digits", "--weights", weights, "--out", out)
    made = (*start, "--count", 2, "--steps", 1)
    assert run(*made, "--model", "cnn").code == 0
    there = (out / "distal.safetensors").read_bytes()
    lost = f"{out} holds distal images of cnn "
    for changed, differs in {
        ("--count", 2, "--steps", 3, "--target", 2): "with target 1, steps 1, these would be with target 2, steps 3:",
        ("--count", 1, "--steps", 1, "--seed", 7): "with count 2, seed 0, these would be with count 1, seed 7:",
    }.items():
        assert_error(run(*start, *changed, "--model", "madry"), lost + differs)
        assert_error(run(*start, *changed, "--model", "cnn"), lost + differs)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "cnn.safetensors").write_bytes((weights / "transfer-cnn.safetensors").read_bytes())
    assert_error(run(*made, "--model", "cnn", "--weights", tmp_path / "weights"), f"{lost}of another model")
    assert_error(run("reproduce", *start[1:], "--model", "cnn"), lost + "with count 2, steps 1, these")
    assert (out / "distal.safetensors").read_bytes() == there and list(out.iterdir()) == [out / "distal.safetensors"]
    save_distal(out, load_distal(out))
    assert_error(run(*made, "--model", "madry"), f"{lost}that do not say how they were made")


def test_progress_rises_from_model_to_model(weights: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate_models(
        ["cnn", "madry"], "digits", suite="fgm", norms=["l2"], images=3, weights=weights, out=tmp_path, probe=False,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    done = [step[0] / step[1] for step in seen]
    assert done == sorted(done) and done[-1] == 1
    assert done[[step[2] for step in seen].index("cnn, fgm-l2")] == 0.5  # all of the first of two


def test_what_is_wrong_with_any_model_is_found_before_the_first_is_attacked(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    out = tmp_path / "run"
    start = ("evaluate", "--weights", weights, "--images", 2, "--norms", "l2", "--data", "digits", "--out", out)
    cnn = (*start, "--suite", "fgm", "--model", "cnn")
    assert_error(run(*cnn, "--model", weights / "cnn.safetensors"), "both go into", str(out / "cnn"))
    latent = ("--suite", "latent-descent", "--model", "abs", "--model", "cnn")
    assert_error(run(*start, *latent), "has no attack in l2 for this model")
    assert not out.exists()
    assert_error(run(*cnn, "--images", 9, "--model", "evaluation_models:few"), "the model has 3 classes")
    with Ledger(out / "cnn") as ledger:
        assert not [row for record in ledger.models() for row in ledger.keys(record.digest)]
    assert run(*start, "--suite", "fgm", "--model", "madry", "--seed", 1).code == 0
    assert_error(run(*cnn, "--model", "madry"), f"{out / 'madry'} holds rows of seed 1")


def test_runs_on_several_data_sets_do_not_mix(run: Run, weights: Path, pictures: list[Path], tmp_path: Path) -> None:
    for label in "01":
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "own" / label / f"{number}.png").write_bytes(pictures[number].read_bytes())
    out = tmp_path / "run"
    start = ("--weights", weights, "--images", 2, "--out", out)
    attack = ("evaluate", "--suite", "fgm", "--norms", "l2", *start)
    assert run(*attack, "--model", "cnn", "--data", "digits").code == 0
    message = f"{out / 'cnn'} holds an evaluation with data 'digits', this one has data '{tmp_path / 'own'}'"
    other = ("--data", tmp_path / "own")
    assert_error(run(*attack, "--model", "madry", *other), message)
    assert_error(run("certify", "--model", "nearest-neighbor", *start, *other), message)
    assert_error(run("reproduce", "--model", "madry", "--suite", "fgm", *start, *other), message)
    assert sorted(one.name for one in out.iterdir()) == ["cnn"]


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("command", ["evaluate", "distal", "reproduce", "train"])
def test_a_number_that_is_no_seed(run: Run, weights: Path, tmp_path: Path, command: str, seed: int) -> None:
    model = ("cnn",) if command == "train" else ("--model", "cnn", "--weights", weights)
    suite = () if command in ("distal", "train") else ("--suite", "fgm")
    result = run(command, *model, *suite, "--data", "digits", "--out", tmp_path / "run", "--seed", seed)
    assert_error(result, f"seed is {seed}; expected a whole number from 0 to")


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
