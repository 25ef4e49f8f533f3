"""Tiny models and data for the tests of the evaluation; also reachable as ``evaluation_models:linear``."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.noise import GaussianNoise
from absynth.attacks.pointwise import Pointwise
from absynth.evaluation import evaluate
from absynth.norms import L0, L2, LINF

CLASSES = 3


class Linear(nn.Module):
    """Logits that are linear in the pixels, with fixed random weights."""

    def __init__(self, seed: int = 0, pixels: int = 64, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(pixels, classes, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight


def images(count: int = 12, seed: int = 1) -> Tensor:
    """Random images (count,1,8,8) in [0,1]."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labeled(model: nn.Module, count: int = 12, wrong: int = 2) -> tuple[Tensor, Tensor]:
    """Images with the labels the model gives them, the first ``wrong`` of them false."""
    pictures = images(count)
    with torch.no_grad():
        labels = model(pictures).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES
    return pictures, labels


FOURTH = images(12)[4, 0, 0, 0]  # a pixel of image 4


class Bad(Linear):
    """The linear model, with something wrong about it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self._calls = what, 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self._calls += 1
        marked = (images.flatten(1)[:, 0] - FOURTH).abs() < 1e-6  # image 4 and sparse changes of it
        if self.what == "raises at one image" and marked.any():
            raise RuntimeError("cannot do\nthis one")
        if self.what == "nan at one image":
            return torch.where(marked[:, None], torch.nan, logits)
        if self.what == "random":
            return logits + torch.randn(logits.shape)
        if self.what == "wrong shape":
            return logits[:, :1]
        if self.what == "constant":
            return logits * 0 + torch.tensor([3.0, 1.0, 0.0])
        if self.what == "probabilities":
            return torch.softmax(logits, dim=1)
        if self.what == "sees the batch":
            return logits + 0.5 * len(images) * torch.tensor([1.0, -1.0, 0.0])
        if self.what == "no gradient":
            return logits.detach() + images.flatten(1)[:, :1] * 0
        if self.what == "wrong shape later" and self._calls > 12:
            return logits.flatten()
        return logits


@dataclass(frozen=True)
class Traced(Attack):
    """Noise that writes down which process computes it, and takes a while: lines ``begin PID`` and ``end PID``.

    ``deadly``: the process that computes image 4 dies of it.
    """

    log: str
    seconds: float = 0.5
    deadly: bool = False
    norm: Any = field(default=L2, repr=False)
    family = "traced"
    kind = "minimum"
    knowledge = "decision"
    source = "tests"
    deterministic = False
    queries = "few"

    def __call__(self, classifier: Any, images: Tensor, goal: Any, seeds: Tensor) -> Proposals:
        self._note("begin")
        time.sleep(self.seconds)
        if self.deadly and (images.flatten(1)[:, 0] == FOURTH).any():
            os._exit(1)
        found = GaussianNoise(draws=1, steps=10)(classifier, images, goal, seeds)
        self._note("end")
        return found

    def _note(self, what: str) -> None:
        with open(self.log, "a") as file:  # a short line is appended whole
            file.write(f"{what} {os.getpid()}\n")

    def search(self, problem: Problem) -> Proposals:
        raise AssertionError


def linear() -> nn.Module:
    """A factory."""
    return Linear()


def digits() -> nn.Module:
    """A factory for the embedded digits."""
    return Linear(pixels=784, classes=10)


def few() -> nn.Module:
    """A factory of a model with three classes for the embedded digits, which have ten."""
    return Linear(pixels=784)


class Silent(Linear):
    """Answers NaN, whatever it is asked."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.nan


def silent() -> nn.Module:
    """A factory for the embedded digits of a model that answers NaN."""
    return Silent(pixels=784, classes=10)


class Opaque(Linear):
    """Keeps its gradient to itself."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def without_gradient() -> nn.Module:
    """A factory for the embedded digits of a model without gradient."""
    return Opaque(pixels=784, classes=10)


class Chatty(Linear):
    """Prints when it is asked."""

    def forward(self, images: Tensor) -> Tensor:
        print("answering")
        return super().forward(images)


def chatty() -> nn.Module:
    """A factory for the embedded digits that prints, of a model that does."""
    print("loading")
    return Chatty(pixels=784, classes=10)


def no_module() -> str:
    """A factory that is none."""
    return "nothing"


def broken() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no weights\nhere")


SUITE = (
    BoundaryProjection(L2, steps=10),
    GaussianNoise(draws=1, steps=10),
    BoundaryProjection(LINF, steps=10),
    Pointwise(L0, draws=1, steps=10),
)
ALL_NORMS = ("l0", "l2", "linf")


def run(out: Path, model: nn.Module | None = None, **options: Any) -> Any:
    """Evaluate a small model on eight images, as ``options`` say otherwise."""
    model = model or Linear()
    data = options.pop("data", None) or labeled(Linear())
    options = {"suite": SUITE, "images": 8, "batch_size": 3, "probe": False, "name": "net"} | options
    return evaluate(model, data, out=out, **options)
