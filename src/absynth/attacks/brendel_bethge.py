"""The Brendel-Bethge attack: follow the decision boundary inward, each step the best within a trust region.

Written for batches, with the trust-region problem solved by two nested bisections over all images at once: it needs no
compiler, and its rows do not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.following import or_else
from absynth.attacks.gradient import FastGradient
from absynth.attacks.greedy import greedy_flips
from absynth.attacks.noise import SaltAndPepper
from absynth.attacks.resetting import take_back
from absynth.attacks.search import Best, starting_points, toward_clean
from absynth.norms import L0, L1, L2, LINF, Norm

#: Changes below this are rounding, in L0.
SNAP = 1e-4


@dataclass(frozen=True)
class BrendelBethge(Attack):
    """Start at an adversarial far away, go to the boundary, then follow it toward the clean image.

    A step δ from x brings x + δ as near to the clean image as possible, subject to b·δ = c, ‖δ‖₂ ≤ r and x + δ in
    [0,1]: b is the gradient of the margin, averaged over steps with ``momentum``; c leads across the linearized
    boundary by the factor ``overshoot``; r is ``trust`` times the root of the number of values, multiplied by ``decay``
    ``decays`` times in a run. ``trust`` is 0.03 unless given; in L0 0.3, since a pixel that is given back moves by all
    it differs at once. Larger ones do better against models whose gradients mislead near the image, and with more
    ``momentum``. Where the boundary is out of reach within r, the step goes as far toward it as it can.
    Starts where the clean image's gradient or a blend into noise crosses the boundary, whichever is nearer
    (L0: at salt and pepper; where that finds nothing, as elsewhere).
    """

    norm: Norm
    steps: int = 200
    trust: float | None = None
    decay: float = 0.5
    decays: int = 20
    overshoot: float = 1.1
    momentum: float = 0.8
    bisections: int = 10
    called: str = field(default="brendel-bethge", repr=False)

    kind = "minimum"
    knowledge = "gradient"
    source = "Brendel et al. 2019, arXiv 1907.01003"
    deterministic = False
    queries = "up to 200 gradients, 100 predictions"

    @property
    def family(self) -> str:
        """What it is called."""
        return self.called

    def __post_init__(self) -> None:
        if self.trust is None:
            object.__setattr__(self, "trust", 0.3 if self.norm == L0 else 0.03)

    def search(self, problem: Problem) -> Proposals:
        best = self._start(problem)
        rows = best.distance.isfinite().nonzero().squeeze(1)
        if not len(rows):
            return best.proposals()
        part = problem.rows(rows)
        clean = part.images.flatten(1).double()  # (n,C,H,W) -> (n,N)
        x = best.images[rows].flatten(1).double()
        normal = torch.zeros_like(x)
        assert self.trust is not None
        radius = self.trust * math.sqrt(x.shape[1])
        for step in range(self.steps):
            images = x.view_as(part.images).to(part.images.dtype)
            margin, gradient = part.margin_and_gradient(images)
            best.update(rows, images, margin <= 0)
            # Scaled by the image's own largest entry, so that gradients of any size average as they are.
            normal = (1 - self.momentum) * gradient.flatten(1).double() + (self.momentum if step else 0) * normal
            scale = normal.abs().amax(1, keepdim=True).clamp(min=1e-300)
            ahead = torch.where(margin > 0, self.overshoot, 2 - self.overshoot).double() * -margin.double()
            if step and step % max(1, self.steps // self.decays) == 0:
                radius *= self.decay
            delta = trust_region_step(self.norm, clean - x, -x, 1 - x, normal / scale, ahead / scale.squeeze(1), radius)
            x = (x + delta).clamp(0, 1)
            if self.norm == L0:
                x = torch.where((x - clean).abs() < SNAP, clean, x)
        images = x.view_as(part.images).to(part.images.dtype)
        best.update(rows, images, part.met(images))
        found = best.proposals()
        return take_back(problem, found) if self.norm == L0 else toward_clean(problem, found, self.bisections)

    def _start(self, problem: Problem) -> Best:
        """Adversarials to begin with, and on the boundary: along the gradient or toward noise, the nearer one."""
        if self.norm == L0:  # salt and pepper is sparse, and on the boundary already
            starts = [or_else(problem, SaltAndPepper(draws=2).search(problem), self._blends)]
        else:
            gradient = FastGradient(LINF if self.norm == LINF else L2).search(problem)
            starts = [toward_clean(problem, gradient, self.bisections), self._blends(problem)]
        best = Best(problem)
        for start in starts:
            rows = start.found.nonzero().squeeze(1)
            best.update(rows, start.images[rows], start.found[rows])
        return best

    def _blends(self, problem: Problem) -> Proposals:
        """Where blends into noise cross the boundary."""
        return toward_clean(problem, starting_points(problem), self.bisections)


@dataclass(frozen=True)
class BrendelBethgeFromFlips(BrendelBethge):
    """The same in L0, from pixels set to black or white one after the other, the one that helps most by the gradient;
    where these lead nowhere, from where the other begins."""

    def _start(self, problem: Problem) -> Best:
        best = Best(problem)
        flipped = greedy_flips(problem)
        best.update(rows := flipped.found.nonzero().squeeze(1), flipped.images[rows], flipped.found[rows])
        missing = (~flipped.found).nonzero().squeeze(1)
        if len(missing):
            other = super()._start(problem.rows(missing))
            best.update(missing, other.images, other.distance.isfinite())
        return best


def trust_region_step(
    norm: Norm, aim: Tensor, low: Tensor, high: Tensor, b: Tensor, c: Tensor, radius: float
) -> Tensor:
    """The δ that minimizes ‖aim − δ‖ in ``norm`` subject to b·δ ≤ c (met with equality), ‖δ‖₂ ≤ radius, low ≤ δ ≤ high.

    All (n,N) in float64, ``c`` (n,). Where no such δ exists: the δ within radius and bounds of the smallest b·δ (of the
    largest, where c > 0 asks for a retreat). For a multiplier λ of the boundary and a level (the multiplier of the
    radius, or in L∞ the distance itself) every entry of δ has a closed form; λ and the level follow by bisection, both
    monotone.
    """
    if norm == LINF:
        # δ is at most ``radius`` long, so the distance changes by no more; and no δ within the bounds is farther away.
        far = aim.abs().amax(1)
        levels = (far - radius).clamp(min=0), torch.minimum(far + radius, torch.maximum(aim - low, high - aim).amax(1))
        entry = _linf_entry
    else:
        levels = torch.full_like(c, -16.0), torch.full_like(c, 16.0)  # natural logarithms
        entry = {L0: _l0_entry, L1: _l1_entry, L2: _l2_entry}[norm]

    def at(level: Tensor) -> tuple[Tensor, Tensor]:
        """δ (n,N) for a level (n,), and whether it reaches the boundary within the radius (n,)."""
        delta = _on_plane(
            lambda multiplier: entry(aim, low, high, multiplier.unsqueeze(1) * b, level.unsqueeze(1)),
            b,
            c,
            convex=norm != L0,
        )
        tolerance = 1e-6 + 1e-3 * c.abs()
        return delta, ((b * delta).sum(1) <= c + tolerance) & (delta.norm(dim=1) <= radius * 1.001)

    under, over = levels
    delta, reached = at(over)
    for _ in range(10):
        middle = (under + over) / 2
        candidate, fits = at(middle)
        over, under = torch.where(fits, middle, over), torch.where(fits, under, middle)
        delta = torch.where(fits.unsqueeze(1), candidate, delta)
        reached = reached | fits
    return torch.where(reached.unsqueeze(1), delta, _farthest(low, high, b, c, radius))


def _on_plane(delta_of: Callable[[Tensor], Tensor], b: Tensor, c: Tensor, convex: bool) -> Tensor:
    """δ at the smallest multiplier with b·δ ≤ c; b·δ falls as the multiplier grows. Bisected in sinh: both signs,
    any size. In L1 it may fall at one multiplier by much, since an entry jumps there: all between the two δ are as good
    if what is minimized is ``convex``, and one of them has b·δ = c."""
    under, over = torch.full_like(c, -25.0), torch.full_like(c, 25.0)
    for _ in range(22):
        middle = (under + over) / 2
        crossed = (b * delta_of(middle.sinh())).sum(1) <= c
        over, under = torch.where(crossed, middle, over), torch.where(crossed, under, middle)
    beyond = delta_of(over.sinh())
    if not convex:
        return beyond
    before = delta_of(under.sinh())
    gap = (b * before).sum(1) - c  # positive, but where c is reached at the smallest multiplier, or nowhere
    share = (gap / (b * (before - beyond)).sum(1).clamp(min=1e-300)).clamp(0, 1)
    return torch.where((gap > 0).unsqueeze(1), before + share.unsqueeze(1) * (beyond - before), beyond)


def _l2_entry(aim: Tensor, low: Tensor, high: Tensor, pull: Tensor, level: Tensor) -> Tensor:
    """argmin of (δ − aim)² + 2·pull·δ + μ·δ², μ = exp(level)."""
    return torch.clamp((aim - pull) / (1 + level.exp()), low, high)


def _l1_entry(aim: Tensor, low: Tensor, high: Tensor, pull: Tensor, level: Tensor) -> Tensor:
    """argmin of |δ − aim| + pull·δ + μ·δ²/2, μ = exp(level)."""
    weight = level.exp()
    return torch.clamp(torch.clamp(aim, (-1 - pull) / weight, (1 - pull) / weight), low, high)


def _l0_entry(aim: Tensor, low: Tensor, high: Tensor, pull: Tensor, level: Tensor) -> Tensor:
    """argmin of [δ ≠ aim] + pull·δ + μ·δ²/2, μ = exp(level): the better of the aim and the free minimum."""
    weight = level.exp()
    free = torch.clamp(-pull / weight, low, high)
    cost_free = 1 + pull * free + weight * free.square() / 2
    cost_aim = pull * aim + weight * aim.square() / 2
    return torch.where(cost_free < cost_aim, free, aim)


def _linf_entry(aim: Tensor, low: Tensor, high: Tensor, pull: Tensor, level: Tensor) -> Tensor:
    """The shortest δ along −pull with |δ − aim| ≤ level."""
    return torch.clamp(
        -pull, torch.maximum(low, aim - level).minimum(high), torch.minimum(high, aim + level).maximum(low)
    )


def _farthest(low: Tensor, high: Tensor, b: Tensor, c: Tensor, radius: float) -> Tensor:
    """The δ of length at most ``radius`` within the bounds that goes farthest along −b (along b where c > 0)."""
    toward = torch.where(c > 0, 1.0, -1.0).unsqueeze(1) * b
    under, over = torch.full_like(c, -25.0), torch.full_like(c, 25.0)  # natural logarithms of the length along b
    for _ in range(22):
        middle = (under + over) / 2
        fits = torch.clamp(middle.exp().unsqueeze(1) * toward, low, high).norm(dim=1) <= radius
        under, over = torch.where(fits, middle, under), torch.where(fits, over, middle)
    return torch.clamp(under.exp().unsqueeze(1) * toward, low, high)
