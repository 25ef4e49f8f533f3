"""Several models in one output folder: under attack, their distal images, and what keeps them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from absynth.cli.evaluation import show_attacked
from absynth.cli.output import emit
from absynth.errors import InputError
from absynth.evaluation import Ledger, distal, evaluate, load_distal, save_distal
from absynth.reproduction import distal_images, evaluate_models
from command_line import Run, assert_error, document

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of ``evaluation_models`` can be named in commands."""
    monkeypatch.syspath_prepend(ROOT / "tests")


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
    run: Run, weights: Path, tmp_path: Path, own: None
) -> None:
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


def test_a_model_without_gradient_has_no_distal_images_and_all_the_rest(
    run: Run, weights: Path, tmp_path: Path, own: None
) -> None:
    options = ("--model", "evaluation_models:without_gradient", "--data", "digits", "--weights", weights, "--out")
    problem = "evaluation_models:without_gradient: the model has no gradient"
    assert_error(run("distal", *options, tmp_path / "alone"), problem)
    both = run("distal", *options, tmp_path / "both", "--model", "cnn", "--steps", 1, "--json")
    assert both.code == 2 and both.err.splitlines()[-1].startswith(f"error: {problem}")
    assert list(json.loads(both.out)["models"]) == ["cnn"]
    files = run("reproduce", *options, tmp_path / "all", "--suite", "gaussian-noise-l2", "--images", 2, "--json")
    assert f"warning: no distal images of {problem}" in files.err
    assert Path(document(files)["html"]).is_file()


def test_distal_images_of_a_model_that_answers_nan(own: None) -> None:
    from evaluation_models import silent

    with pytest.raises(InputError, match="the model returned NaN for 2 of 2 images"):
        distal(silent(), count=2)


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"radius": float("inf"), "radii": [float("nan"), 1.5], "count": (2, -float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"radius": None, "radii": [None, 1.5], "count": [2, None]}


@pytest.mark.parametrize("command", ["evaluate", "distal", "classify"])
def test_what_a_model_prints_is_no_result(
    run: Run, pictures: list[Path], tmp_path: Path, own: None, command: str
) -> None:
    model = ("--model", "evaluation_models:chatty", "--json")
    options = (pictures[0],) if command == "classify" else ("--data", "digits")
    more = {"evaluate": ("--images", 2), "distal": ("--steps", 1, "--out", tmp_path)}
    found = run(command, *model, *options, *more.get(command, ()))
    assert document(found) and "loading" in found.err and "answering" in found.err


def test_a_table_of_errors_alone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], own: None) -> None:
    from evaluation_models import SUITE, silent

    data = torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2])
    show_attacked(evaluate(silent(), data, suite=SUITE[:1], images=3, out=tmp_path, probe=False))
    shown = capsys.readouterr().out
    assert shown.count("error") == 2 and "nan" not in shown
