"""``absynth classify``: the sentence, the figure, and the pictures and weights that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from absynth import data, zoo
from absynth.clean import load_any
from command_line import Run, assert_error, document
from small_models import save_picture, write_all


def test_classify(run: Run, weights: Path, pictures: list[Path]) -> None:
    found = document(run("classify", *pictures, "--weights", weights, "--json"))
    model = zoo.load("abs", folder=weights)
    for picture, one in zip(pictures, found["images"], strict=True):
        analysis = model.analyze(data.load_picture(picture)[None])
        assert one["file"] == str(picture)
        assert one["label"] == str(int(analysis.labels))
        assert list(one["energies"]) == [str(digit) for digit in range(10)]
        assert list(one["energies"].values()) == pytest.approx(analysis.energies[0].tolist(), rel=1e-4)
        assert one["probability"] == one["probabilities"][one["likeliest"]]
    text = run("classify", pictures[0], "--weights", weights).out
    assert text.startswith(f"{pictures[0]}: {found['images'][0]['label']}, probability ")
    assert text.count(":") >= 11


def test_classify_without_analysis(run: Run, weights: Path, pictures: list[Path]) -> None:
    (one,) = document(run("classify", pictures[0], "--model", weights / "cnn.safetensors", "--json"))["images"]
    expected = zoo.load("cnn", folder=weights)(data.load_picture(pictures[0])[None]).softmax(1)[0]
    assert one["energies"] is None
    assert list(one["probabilities"].values()) == pytest.approx(expected.tolist(), rel=1e-4)


def test_classify_with_a_model_of_ones_own(
    run: Run, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    own = ("classify", pictures[0], "--model")
    (one,) = document(run(*own, "evaluation_models:digits", "--json"))["images"]
    expected = load_any("evaluation_models:digits")(data.load_picture(pictures[0])[None]).softmax(1)[0]
    assert one["label"] == str(int(expected.argmax()))
    assert list(one["probabilities"].values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert_error(run(*own, "evaluation_models:silent"), "the model returned NaN for 1 of 1 images")
    assert_error(run(*own, "evaluation_models:linear"), "the model raised RuntimeError")
    assert_error(run(*own, "evaluation_models:digits", "--explain", tmp_path / "why.png"), "no analysis")


def test_classify_refuses(run: Run, tmp_path: Path, pictures: list[Path]) -> None:
    folder = write_all(tmp_path, refusal=1.0)
    assert "no digit: nothing explains this image" in run("classify", pictures[0], "--weights", folder).out
    (one,) = document(run("classify", pictures[0], "--weights", folder, "--json"))["images"]
    assert one["label"] is None
    assert one["likeliest"] in "0123456789"


def test_explain(run: Run, weights: Path, pictures: list[Path], tmp_path: Path) -> None:
    result = run("classify", pictures[0], "--weights", weights, "--explain", tmp_path / "new" / "why.png")
    assert result.code == 0
    assert "explained in" in result.err
    with Image.open(tmp_path / "new" / "why.png") as figure:
        assert figure.width > figure.height > 500
        assert len(figure.convert("L").getcolors(1 << 16)) > 50
    document(run("classify", *pictures, "--weights", weights, "--explain", tmp_path / "why.svg", "--json"))
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["why-1.svg", "why-2.svg"]
    assert (tmp_path / "why-1.svg").read_bytes() != (tmp_path / "why-2.svg").read_bytes()


def test_classify_errors(run: Run, weights: Path, pictures: list[Path], tmp_path: Path) -> None:
    at = ("--weights", weights)
    text = tmp_path / "note.png"
    text.write_text("not a picture")
    assert_error(run("classify", text, *at), str(text), "not a picture")
    assert_error(run("classify", tmp_path, *at), "is a folder", f"{tmp_path}/*.png")
    assert_error(run("classify", tmp_path / "none.png", *at), "none.png")
    assert_error(run("classify", pictures[0], "--model", "abss", *at), "'abss'", "did you mean abs")
    assert_error(run("classify", pictures[0], "--model", "none.safetensors"), "no weight file at none.safetensors")
    assert_error(run("classify", pictures[0], "--weights", tmp_path), "absynth train abs")
    explain = (run, "classify", pictures[0], *at, "--explain")
    assert_error(run("classify", pictures[0], "--model", "cnn", *at, "--explain", tmp_path / "a.png"), "no analysis")
    assert_error(explain[0](*explain[1:], tmp_path / "why.txt"), "why.txt", ".png")
    assert_error(explain[0](*explain[1:], text / "why.png"), "cannot write into", "note.png")


def test_what_is_no_picture_does_not_keep_the_others_from_their_answers(
    run: Run, weights: Path, pictures: list[Path], tmp_path: Path
) -> None:
    broken = save_picture(tmp_path / "broken.png", data.load("digits", "test")[0][0])
    broken.write_bytes(broken.read_bytes()[:60])
    files, at = (pictures[0], broken, tmp_path / "none.png", pictures[1]), ("--weights", weights)
    text = run("classify", *files, *at, "--explain", tmp_path / "why.png")
    assert text.code == 2
    assert [line.split(":")[0] for line in text.out.splitlines() if "probability" in line or "no digit" in line] == [
        str(pictures[0]),
        str(pictures[1]),
    ]
    errors = [line for line in text.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and str(broken) in errors[0] and "none.png" in errors[1]
    assert sorted(path.name for path in tmp_path.glob("why*")) == ["why-1.png", "why-4.png"]  # as they were given
    found = run("classify", *files, *at, "--json")
    assert found.code == 2
    answers = json.loads(found.out)
    assert [one["file"] for one in answers["images"]] == [str(pictures[0]), str(pictures[1])]
    assert len(answers["unreadable"]) == 2 and "none.png" in answers["unreadable"][1]
    assert "unreadable" not in document(run("classify", *pictures, *at, "--json"))
    nothing = run("classify", broken, *at, "--json")
    assert nothing.code == 2 and len(json.loads(nothing.out)["unreadable"]) == 1
    assert json.loads(nothing.out)["images"] == []


@pytest.mark.parametrize("damage", ["truncated", "tampered", "another file"])
def test_damaged_weights(run: Run, weights: Path, pictures: list[Path], tmp_path: Path, damage: str) -> None:
    content = bytearray((weights / "cnn.safetensors").read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "tampered":
        content[-5] ^= 0x10
    else:
        content = bytearray(b"something else entirely")
    (tmp_path / "cnn.safetensors").write_bytes(content)
    result = run("classify", pictures[0], "--model", "cnn", "--weights", tmp_path)
    assert_error(result, str(tmp_path / "cnn.safetensors"), "replace it by an intact copy")
    assert "cnn" in run("models", "--weights", tmp_path).err


@pytest.mark.parametrize(
    ("header", "message"),
    [(None, "is no weight file of absynth"), ({"format": "pt"}, "is no weight file of absynth")]
    + [({"absynth": text}, "is unreadable or truncated") for text in ("3", "[1]", "{")]
    + [({"absynth": "[]"}, "does not match the digest")],
)
def test_a_header_that_is_none(
    run: Run, pictures: list[Path], tmp_path: Path, header: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "cnn.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, header)
    assert_error(run("classify", pictures[0], "--model", path), f"{path} {message}")
