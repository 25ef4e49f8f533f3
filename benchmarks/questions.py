"""What a question about a slightly moved image costs, and for ABS how far its answer is from a cold one.

    python benchmarks/questions.py

Eight test images with noise, 64 copies of each moved by a random step of the given length: asked cold, followed, and
answered around the image. Errors are mean differences of the energies of the two best classes to those asked cold.
Then the models that compare with all that they have stored, about one pixel moved: their answers are the same, which is
checked, and 64 test images say how far a list of points reaches.
Needs MNIST (``ABSYNTH_DATA``).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import absynth
from absynth import data
from absynth.classifiers import ABS
from absynth.shortlist import ComparesAll, shortlist

IMAGES, COPIES, LENGTHS = 8, 64, (0.02, 0.3, 1.0)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = absynth.load("abs")
    assert isinstance(model, ABS)
    generator = torch.Generator().manual_seed(0)
    images = data.load("mnist", "test")[0][:IMAGES]
    images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    _, found = model.follow(images)
    owner = torch.arange(IMAGES).repeat_interleave(COPIES)
    for length in LENGTHS:
        step = torch.randn(len(owner), *images.shape[1:], generator=generator)
        step *= length / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (images[owner] + step).clamp(0, 1)
        cold, seconds = timed(model, moved)
        best = cold.topk(2).indices
        line = f"moved by {length:4}: cold {seconds:.2f} ms"
        for name, answer in (
            ("followed", lambda x: model.follow(x, found.rows(owner))[0]),
            ("around", lambda x: model.around(x, found, owner)),
        ):
            logits, seconds = timed(answer, moved)
            error = images[0].numel() * (logits - cold).gather(1, best).abs().mean().item()
            line += f", {name} {seconds:.2f} ms (error {error:.4f})"
        print(line)
    for name in ("nearest-neighbor", "prototype-abs"):
        stored(name)


@torch.no_grad()
def stored(name: str) -> None:
    """The cost for a model that compares with all it has stored."""
    model = absynth.load(name)
    assert isinstance(model, ComparesAll)
    images = data.load("mnist", "test")[0][:64]
    reach = shortlist(images.flatten(1), *model._stored()).reach
    known = model.follow(images[:4])[1]
    owner = torch.arange(4).repeat_interleave(images[0].numel())
    moved = images[owner].flatten(1)
    moved[torch.arange(len(owner)), torch.arange(len(owner)) % moved.shape[1]] += 0.02
    moved = moved.clamp(0, 1).view(-1, *images.shape[1:])
    cold, whole = timed(model, moved)
    around, listed = timed(lambda x: model.around(x, known, owner), moved)
    torch.testing.assert_close(around, cold, rtol=0, atol=1e-6)
    print(f"{name}: whole {whole:.2f} ms, around {listed:.2f} ms; lists reach {reach.median():.2f} in the median")


def timed(answer: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    """The answers, and milliseconds an image."""
    started = time.perf_counter()
    logits = answer(images)
    return logits, 1000 * (time.perf_counter() - started) / len(images)


if __name__ == "__main__":
    main()
