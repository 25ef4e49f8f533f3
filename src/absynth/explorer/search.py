"""The smallest adversarial of one image, searched under a deadline and watched while it is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.attacks.base import Classifier, Goal
from absynth.errors import InputError
from absynth.evaluation.plan import choose_attacks
from absynth.norms import Norm, parse

SUITE = "quick,pointwise-l0"  # the strongest attack of each norm, and one in L0 that needs no gradient
SLACK = 1e-6  # past the boundary: what is found must hold when it is asked about alone


class OutOfTime(Exception):
    """The search is to end now."""


@dataclass(frozen=True)
class Result:
    """``image`` (1,S,S) float32 is the smallest adversarial found, None if none was; ``stopped``: time was up first."""

    label: int
    image: Tensor | None
    distance: float | None
    adversarial_label: int | None
    stopped: bool
    attacks: tuple[str, ...]


class Watch:
    """A classifier under attack that remembers the nearest adversarial it was ever shown, and can end the search.

    ``seconds`` after its making, or once ``stop`` is set, the next question raises ``OutOfTime``.
    """

    def __init__(self, model: Classifier, image: Tensor, norm: Norm, seconds: float) -> None:
        self.model, self.image, self.norm = model, image[None], norm
        self.goal: Goal | None = None
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self.stop = threading.Event()
        self.queries = 0
        self.hits: list[tuple[float, Tensor]] = []  # nearer and nearer

    def __call__(self, images: Tensor) -> Tensor:
        if self.stop.is_set() or time.monotonic() > self.deadline:
            raise OutOfTime
        logits = self.model(images)
        self.queries += len(images)
        if self.goal is not None:
            self._remember(images.detach(), logits.detach(), self.goal)
        return logits

    def _remember(self, images: Tensor, logits: Tensor, goal: Goal) -> None:
        every = Goal(goal.classes.expand(len(images)), goal.toward, goal.slack)
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)
        distance = self.norm.distance(images, self.image)
        distance = torch.where(every.met(logits) & inside, distance, torch.inf)
        best = int(distance.argmin())
        if float(distance[best]) < self.nearest:
            self.hits.append((float(distance[best]), images[best].clone()))

    @property
    def nearest(self) -> float:
        """The distance of the nearest adversarial so far."""
        return self.hits[-1][0] if self.hits else float("inf")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


def watch(model: Classifier, image: Tensor, norm: str, seconds: float) -> Watch:
    """A watch for ``smallest``. Raises InputError for an unknown norm."""
    return Watch(model, image, parse(norm), seconds)


@torch.enable_grad()
def smallest(watched: Watch, target: int | None = None) -> Result:
    """Search the smallest adversarial of the watched image: any label but the model's own, or ``target``.

    Blocks until the attacks are done or time is up. Raises InputError for a target that the model has no class for, or
    that it says already.
    """
    with torch.no_grad():
        logits = watched.model(watched.image)
    label, classes = int(logits.argmax()), logits.shape[1]
    if target is not None and not 0 <= target < classes:
        raise InputError(f"target is {target}; the model has classes 0 to {classes - 1}: choose one of them")
    if target == label:
        raise InputError(f"the model says {target} already: choose another target")
    goal = (
        Goal.untargeted(torch.tensor([label]), SLACK)
        if target is None
        else Goal.targeted(torch.tensor([target]), SLACK)
    )
    watched.goal = goal
    attacks = choose_attacks(SUITE, [str(watched.norm)], watched.model)
    used, stopped = [], False
    for attack in attacks:
        try:
            used.append(attack.name)
            attack(watched, watched.image, goal, torch.zeros(1, dtype=torch.int64))
        except OutOfTime:
            stopped = True
            break
    for distance, image in reversed(watched.hits):
        # Asked about alone: sums in another batch round differently, and the very nearest may not hold.
        with torch.no_grad():
            answer = int(watched.model(image[None]).argmax())
        if answer != label if target is None else answer == target:
            return Result(label, image, distance, answer, stopped, tuple(used))
    return Result(label, None, None, None, stopped, tuple(used))
