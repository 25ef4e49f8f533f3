"""The nouns of every attack: classifier, goal, proposals, problem, attack.

An attack *proposes*: it returns one image per row and says for which rows it found one. Whether a proposal counts is
decided elsewhere, by classifying it again. Shapes: B images, K classes, C channels, H x W pixels with values in [0,1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.queries import can_follow, rows_of
from absynth.checks import check_logits
from absynth.errors import InputError
from absynth.norms import Norm

#: float32 images (B,C,H,W) in [0,1] -> logits (B,K); works under autograd; a pure function of each image.
Classifier = Callable[[Tensor], Tensor]
#: A proposal that misses the boundary by rounding is moved away from the clean image by these shares of its
#: perturbation.
NUDGES = (1e-5, 1e-4, 1e-3, 1e-2)

Kind = Literal["minimum", "budget"]
Knowledge = Literal["gradient", "score", "decision", "transfer", "latent"]


@dataclass(frozen=True)
class Goal:
    """What counts as adversarial: any class but ``classes`` (untargeted), or ``classes`` itself (targeted).

    A tie counts as broken. ``slack`` asks for a little more: the goal is met when the margin is at most ``-slack``, so
    that a proposal on the very boundary survives the rounding of another batch size. ``starts`` are images of the
    target classes, from which attacks on decisions begin where noise leads nowhere, as it mostly does for a target.
    """

    classes: Tensor  # (B,) int64
    toward: bool = False
    slack: float = 0.0
    starts: Tensor | None = None  # (B,C,H,W)

    @staticmethod
    def untargeted(labels: Tensor, slack: float = 0.0) -> Goal:
        """Any class but the true ``labels`` (B,)."""
        return Goal(_class_indices(labels, "labels"), toward=False, slack=slack)

    @staticmethod
    def targeted(classes: Tensor, slack: float = 0.0, starts: Tensor | None = None) -> Goal:
        """Exactly the ``classes`` (B,); ``starts`` (B,C,H,W) may be images of these."""
        return Goal(_class_indices(classes, "classes"), toward=True, slack=slack, starts=starts)

    def margin(self, logits: Tensor) -> Tensor:
        """(B,K) -> (B,): by how much the goal is missed; at most 0 when it is met, NaN where logits are NaN.

        Raises InputError for a class the logits do not have.
        """
        if len(self.classes) and int(self.classes.max()) >= logits.shape[1]:
            raise InputError(
                f"class {int(self.classes.max())} is out of range: the model has classes 0 to {logits.shape[1] - 1}"
            )
        own = logits.gather(1, self.classes.unsqueeze(1)).squeeze(1)
        rival = logits.scatter(1, self.classes.unsqueeze(1), -torch.inf).amax(1)
        return rival - own if self.toward else own - rival

    def met(self, logits: Tensor) -> Tensor:
        """(B,K) -> (B,) bool."""
        return self.margin(logits) <= -self.slack

    def rows(self, index: Tensor) -> Goal:
        """The goal of the images ``index`` (n,), in that order; an index may come twice."""
        return Goal(self.classes[index], self.toward, self.slack, None if self.starts is None else self.starts[index])


@dataclass(frozen=True)
class Proposals:
    """What an attack returns: ``images`` (B,C,H,W) float32 in [0,1] and ``found`` (B,) bool.

    Where nothing was found, the image is the clean one. An image that met the goal from the start comes back unchanged,
    found.
    """

    images: Tensor
    found: Tensor


@dataclass(frozen=True)
class Problem:
    """A batch under attack, and the questions an attack may put to the classifier about it.

    ``rows`` makes the problem of some of the images only: an attack asks about the images that are not done, and no
    others.
    """

    classifier: Classifier
    images: Tensor  # (B,C,H,W), clean
    goal: Goal
    seeds: Tensor  # (B,) int64
    norm: Norm

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> Problem:
        """The problem of the images ``index`` (n,), in that order; an index may come twice."""
        classifier = rows_of(self.classifier, index)
        return Problem(classifier, self.images[index], self.goal.rows(index), self.seeds[index.cpu()], self.norm)

    def logits(self, images: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,K), without gradient. Raises InputError when the classifier returns another shape."""
        with torch.no_grad():
            return check_logits(self.classifier(images), len(self.images))

    def margin(self, images: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,): how far each image is from meeting the goal, at most 0 where it is met."""
        return self.goal.margin(self.logits(images)) + self.goal.slack

    def met(self, images: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,) bool."""
        return self.margin(images) <= 0

    def margin_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Margin (B,) and its gradient (B,C,H,W), non-finite entries as 0: one forward and one backward query."""
        images = images.detach().requires_grad_()
        margin = self.goal.margin(check_logits(self.classifier(images), len(self.images))) + self.goal.slack
        (gradient,) = torch.autograd.grad(margin.sum(), images)
        return margin.detach(), torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def logits_and_jacobian(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B,K) and the gradients (B,k,C,H,W) of the logits of ``classes`` (B,k): one forward, k backward
        queries."""
        images = images.detach().requires_grad_()
        logits = check_logits(self.classifier(images), len(self.images))
        count = classes.shape[1]
        gradients = [
            torch.autograd.grad(logits.gather(1, classes[:, i : i + 1]).sum(), images, retain_graph=i + 1 < count)[0]
            for i in range(count)
        ]
        return logits.detach(), torch.nan_to_num(torch.stack(gradients, dim=1), nan=0.0, posinf=0.0, neginf=0.0)

    def ranked_rivals(self, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Logits (B,K) and the ``count`` likeliest classes (B,k) other than the goal's own, k at most K − 1."""
        logits = self.logits(images)
        others = logits.scatter(1, self.goal.classes.unsqueeze(1), -torch.inf)
        return logits, others.topk(min(count, logits.shape[1] - 1), dim=1).indices

    def distance(self, images: Tensor) -> Tensor:
        """(B,) float64, from the clean images."""
        return self.norm.distance(images, self.images)


class Attack(ABC):
    """An attack: a frozen dataclass whose fields are its parameters, so that its repr is its provenance.

    Called with a classifier, images (B,C,H,W) in [0,1], a goal and one seed per image; returns ``Proposals``. A row
    depends on its image, its goal and its seed alone, never on the rest of the batch or on global random state.
    """

    norm: Norm  # the norm it makes small

    @property
    @abstractmethod
    def family(self) -> str:
        """What it is called in every norm: ``deepfool``."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Whether it searches the smallest perturbation or any within a given radius (budget)."""

    @property
    @abstractmethod
    def knowledge(self) -> Knowledge:
        """What it needs from the model."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where it was published."""

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the seeds make no difference."""

    @property
    @abstractmethod
    def queries(self) -> str:
        """What a typical image costs."""

    @property
    def in_small_steps(self) -> bool:
        """Whether a classifier that searches may start from what it found for an image's last position. Not in attacks
        that see to this themselves, want the whole analysis, or must stay within a radius, since a hit may have to go
        a little farther."""
        return self.kind == "minimum"

    @property
    def name(self) -> str:
        """The family and the norm: ``deepfool-l2``."""
        return f"{self.family}-{self.norm}"

    def __call__(self, classifier: Classifier, images: Tensor, goal: Goal, seeds: Tensor) -> Proposals:
        """Attack ``images``. Raises InputError for inputs that do not fit together or a classifier that does not
        fit."""
        check_inputs(images, goal, seeds)
        images = images.detach().contiguous()
        if not len(images):
            return Proposals(images.clone(), torch.zeros(0, dtype=torch.bool, device=images.device))
        everything = Problem(classifier, images, goal, seeds.cpu(), self.norm)
        found = everything.met(images)
        adversarials = images.clone()
        todo = (~found).nonzero().squeeze(1)
        if len(todo):
            problem = everything.rows(todo)
            if self.in_small_steps and can_follow(classifier):
                from absynth.attacks.confirming import by_following  # which is made of attacks

                proposed = by_following(problem, self.search)
            else:
                proposed = self.search(problem)
            candidates = todo[proposed.found]
            hits = proposed.images[proposed.found].to(images.dtype).clamp(0, 1)
            # One more question for each hit: success is what the classifier says of the image that is returned. One on
            # the very boundary may be answered otherwise in another batch: then a hair farther, if the radius lets it.
            for nudge in (0.0, *NUDGES) if self.kind == "minimum" else (0.0,):
                if not len(candidates):
                    break
                clean = images[candidates]
                moved = (clean + (1 + nudge) * (hits - clean)).clamp(0, 1) if nudge else hits
                held = everything.rows(candidates).met(moved)
                adversarials[candidates[held]] = moved[held]
                found[candidates[held]] = True
                candidates, hits = candidates[~held], hits[~held]
        return Proposals(adversarials, found)

    def check_installed(self) -> None:  # noqa: B027 (most attacks need no more than absynth itself)
        """Raise InputError where a package that the attack needs is missing."""

    @abstractmethod
    def search(self, problem: Problem) -> Proposals:
        """The attack itself, on images none of which meets the goal yet."""


class BudgetAttack(Attack):
    """An attack that looks for an adversarial within a radius; ``SmallestRadius`` turns it into one that minimizes."""

    radius: float | None
    kind = "budget"

    def search(self, problem: Problem) -> Proposals:
        if self.radius is None:
            raise InputError(f"{self.name} needs a radius: give one, or wrap it in SmallestRadius")
        return self.attempt(problem, torch.full((len(problem),), self.radius, dtype=torch.float64))

    @abstractmethod
    def attempt(self, problem: Problem, radius: Tensor) -> Proposals:
        """Look within ``radius`` (B,), in float64 on the CPU, one for each image."""


def generators(seeds: Tensor, stream: int | Sequence[int] = 0) -> list[torch.Generator]:
    """One CPU generator per image; another ``stream`` (a restart, say; one for all, or one each) gives independent
    draws."""
    streams = [stream] * len(seeds) if isinstance(stream, int) else stream
    pairs = zip(seeds.tolist(), streams, strict=True)
    states = [np.random.SeedSequence([int(seed), one]).generate_state(1, np.uint64)[0] for seed, one in pairs]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def draw_normal(sources: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise in the shape of ``like`` (B, ...), row by row from each row's own generator."""
    return torch.stack([torch.randn(like.shape[1:], generator=source) for source in sources]).to(like.device)


def draw_uniform(sources: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Uniform noise on [0,1) in the shape of ``like`` (B, ...), row by row from each row's own generator."""
    return torch.stack([torch.rand(like.shape[1:], generator=source) for source in sources]).to(like.device)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1) in the type and on the device of ``like``."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def check_inputs(images: Tensor, goal: Goal, seeds: Tensor) -> None:
    """Raises InputError unless images, goal and seeds describe one batch."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise InputError(f"images are {images.dtype} {tuple(images.shape)}: expected float32 (B,C,H,W) in [0,1]")
    if len(images) and not ((images >= 0) & (images <= 1)).all():  # also catches NaN
        low, high = images.min().item(), images.max().item()
        raise InputError(f"image values run from {low:g} to {high:g}: expected [0,1], divide by 255 or clip")
    if len(goal.classes) != len(images):
        raise InputError(f"the goal names {len(goal.classes)} classes for {len(images)} images: give one per image")
    if goal.starts is not None and goal.starts.shape != images.shape:
        raise InputError(f"starts are {tuple(goal.starts.shape)} for images {tuple(images.shape)}: give one per image")
    if seeds.shape != (len(images),) or seeds.is_floating_point() or (seeds < 0).any():
        raise InputError(f"seeds are {seeds.dtype} {tuple(seeds.shape)}: expected {len(images)} integers from 0 up")


def _class_indices(classes: Tensor, what: str) -> Tensor:
    if classes.ndim != 1 or classes.is_floating_point() or (classes < 0).any():
        raise InputError(
            f"{what} are {classes.dtype} {tuple(classes.shape)}: expected one integer class per image, from 0 up"
        )
    return classes.long()
