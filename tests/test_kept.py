"""Decoded candidates kept between runs."""

from pathlib import Path

import pytest
import torch

from absynth import kept, weight_files
from absynth.candidates import Candidates, prior_candidates
from absynth.decoding import FoldedDecoder
from absynth.kept import candidates_of, kept_file
from test_decoding import random_decoder

DECODERS = [FoldedDecoder(random_decoder(seed=seed)) for seed in range(2)]
LATENTS = torch.stack([prior_candidates(40, seed=seed) for seed in range(2)])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many latents each class decoded anew."""
    counts: list[int] = []

    class Counted(Candidates):
        def __init__(self, decoder, latents, beta, derived=None) -> None:
            if derived is None:
                counts.append(len(latents))
            super().__init__(decoder, latents, beta, derived)

    monkeypatch.setattr(kept, "Candidates", Counted)
    return counts


def same(one: list[Candidates], two: list[Candidates]) -> bool:
    pairs = zip(one, two, strict=True)
    return all(torch.equal(value, b.derived()[name]) for a, b in pairs for name, value in a.derived().items())


def test_what_was_decoded_once_is_not_decoded_again(tmp_path: Path, decoded: list[int]) -> None:
    file = tmp_path / "folder" / "some.safetensors"
    first = candidates_of(DECODERS, LATENTS, 1.0, file)
    second = candidates_of(DECODERS, LATENTS, 1.0, file)
    assert decoded == [40, 40] and same(first, second)
    candidates_of(DECODERS, LATENTS, 1.0)
    assert decoded == [40] * 4  # without a file nothing is kept


def spoil(file: Path, how: str) -> None:
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return
    tensors = dict(weight_files.read(file).tensors)
    if how == "other pixels":
        tensors["0.points"] = tensors["0.points"].flip(0)
    elif how == "a class less":
        tensors = {name: value for name, value in tensors.items() if name[0] == "0"}
    elif how == "fewer points":
        tensors["1.points"] = tensors["1.points"][:-1]
    header = {"model": "candidates", "beta": 2.0 if how == "other beta" else 1.0, "code": kept._code()}
    weight_files.write(file, tensors, {**header, **({"code": "of before"} if how == "other code" else {})})


@pytest.mark.parametrize(
    "how", ["truncated", "other pixels", "a class less", "fewer points", "other beta", "other code"]
)
def test_what_does_not_fit_is_decoded_and_kept_anew(tmp_path: Path, decoded: list[int], how: str) -> None:
    file = tmp_path / "some.safetensors"
    first = candidates_of(DECODERS, LATENTS, 1.0, file)
    spoil(file, how)
    assert same(first, candidates_of(DECODERS, LATENTS, 1.0, file)) and len(decoded) == 4
    assert same(first, candidates_of(DECODERS, LATENTS, 1.0, file)) and len(decoded) == 4


def test_a_folder_that_cannot_be_written_is_not_missed(tmp_path: Path, decoded: list[int]) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    for _ in range(2):
        candidates_of(DECODERS, LATENTS, 1.0, tmp_path / "taken" / "some.safetensors")
    assert len(decoded) == 4


def test_they_are_kept_in_the_users_cache_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = kept_file("0123456789abcdef0123456789abcdef")
    assert file.name == "0123456789abcdef.safetensors" and file.parent.name == "candidates"
