"""Attacks that know a saturating response: where the ramp is flat a model has no gradient, and no attack may need one.

A model that says what it does to its pixels first (``classifier.response``, a ``Ramp``) is attacked *through* it: the
gradient is taken on the ramp, for every pixel, and a step takes into account that a pixel gains nothing until it has
entered the ramp and nothing more once it has left it. A model without a ramp is one with a = 0, all ramp; a threshold
is the limit of a steep one.

Shapes: B images, N pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.queries import rows_of
from absynth.attacks.wrapping import Wrapping
from absynth.norms import L0, L1, L2, LINF, Norm
from absynth.responses import STEEP, Ramp, ramp_like, ramp_of

INSIDE = 2.0**-20  # how far from the ends of the ramp a gradient is taken: at an end, rounding could make it zero


@dataclass(frozen=True)
class OnTheRamp:
    """A classifier whose gradient is that of the ramp's straight line, for every pixel: flat parts hide nothing.

    Asked for a gradient, it is asked at the image with the same response all of whose pixels lie on the ramp, up to
    ``INSIDE``; asked for logits alone, at the image itself.
    """

    classifier: Callable[[Tensor], Tensor]
    ramp: Ramp
    # A threshold's gradient is that of its response: a ramp's is steeper by its slope.
    stretch: float = 1.0

    def select(self, rows: Tensor) -> OnTheRamp:
        """The same for the images ``rows`` (n,) of the batch only."""
        return OnTheRamp(rows_of(self.classifier, rows), self.ramp, self.stretch)

    def __call__(self, images: Tensor) -> Tensor:
        if not images.requires_grad:
            return self.classifier(images)
        clean = images.detach()
        edge = min(INSIDE, (0.5 - self.ramp.a) / 2)
        inside = self.ramp.inverse(self.ramp(clean)).clamp(self.ramp.a + edge, 1 - self.ramp.a - edge)
        # the difference is exactly 0
        return self.classifier(inside + self.stretch * (images - clean))

    def analyze(self, images: Tensor) -> object:
        """The classifier's own analysis."""
        return self.classifier.analyze(images)  # type: ignore[attr-defined]


def through(problem: Problem) -> tuple[Problem, Ramp]:
    """The problem with gradients of the straight line, and the ramp; a = 0 where the model has none."""
    ramp = ramp_like(problem.classifier) or Ramp(0.0)
    classifier = OnTheRamp(problem.classifier, ramp, 1.0 if ramp_of(problem.classifier) else ramp.slope)
    return Problem(classifier, problem.images, problem.goal, problem.seeds, problem.norm), ramp


def tighten(problem: Problem, proposals: Proposals, ramp: Ramp) -> Proposals:
    """Proposals with every pixel moved to where it is nearest to the clean one for the same response: what was spent on
    flat parts is taken back. Kept where the image stays adversarial and is nearer; one prediction each."""
    rows = proposals.found.nonzero().squeeze(1)
    if not len(rows):
        return proposals
    part = problem.rows(rows)
    tight = ramp.nearest(part.images, ramp(proposals.images[rows]))
    nearer = part.distance(tight) < part.distance(proposals.images[rows])
    keep = nearer & part.met(tight)
    images = proposals.images.clone()
    images[rows[keep]] = tight[keep]
    return Proposals(images, proposals.found)


@dataclass(frozen=True)
class Tightened(Wrapping):
    """Another attack, its adversarials tightened (``tighten``) for a model with a ramp."""

    mark = "refined"

    def search(self, problem: Problem) -> Proposals:
        return tighten(problem, self.attack.search(problem), through(problem)[1])


@dataclass(frozen=True)
class Straight(Tightened):
    """Another attack, given the gradient of the ramp's straight line; its adversarials tightened."""

    mark = "straight"
    for_ramps = True

    def search(self, problem: Problem) -> Proposals:
        aware, ramp = through(problem)
        return tighten(problem, self.attack.search(aware), ramp)


def onto_halfspace(norm: Norm, ramp: Ramp, images: Tensor, gradient: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest perturbation that lowers a margin linear in the response by ``need`` (B,), within [0,1].

    ``gradient`` (B,C,H,W) is the margin's on the ramp, by pixel. A pixel moved by s lowers it by |gradient| *
    clip(s - entry, 0, length). Returns delta (B,C,H,W) and whether the box lets it be reached (B,); where it does not,
    every pixel goes to its end. A need of at most 0 gives 0.

    One multiplier decides all pixels, found by bisection: in L-infinity all move by the same amount; in L2 each moves
    in proportion to its gradient where that pays for its entry, and stays where it does not (then once more among those
    that moved); L1 uses up the pixels of the largest gain for their whole way, the last one in part; L0 those of the
    largest gain, in full.
    """
    shape = images.shape
    x, w = images.flatten(1).double(), gradient.flatten(1).double()
    up, down = ramp.moves(x, up=True), ramp.moves(x, up=False)
    rises = w < 0
    entry, length = torch.where(rises, up[0], down[0]), torch.where(rises, up[1], down[1])
    direction, w = -w.sign(), w.abs()
    scale = w.amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    w = torch.where(length > 0, w / scale.unsqueeze(1), 0.0)
    length = torch.where(w > 0, length, 0.0)
    entry = torch.where(w > 0, entry, 0.0)
    need = (need.double() / scale).clamp(min=0)
    end = entry + length
    reached = (w * length).sum(1) >= need
    if norm in (L0, L1):
        amount = _fill(w * length if norm == L0 else w * length / end.clamp(min=1e-300), w, entry, length, need)
    elif norm == L2:
        amount = _shortest(w, entry, length, need)
    else:

        def level(t: Tensor) -> Tensor:
            return torch.minimum((t.unsqueeze(1) - entry).clamp(min=0), length)

        gained = level(_multiplier(level, w, need, torch.ones_like(need)))
        amount = torch.where(gained > 0, entry + gained, 0.0)
    # more of a pixel is free in L0; and a threshold gives all of it or nothing
    if norm == L0 or (norm != LINF and ramp.a >= 0.5 - STEEP):
        amount = torch.where(amount > 0, end, 0.0)
    amount = torch.where(reached.unsqueeze(1), amount, end)
    amount = torch.where((need > 0).unsqueeze(1), amount, 0.0)
    return (direction * amount).view(shape).to(images.dtype), reached


def _fill(priority: Tensor, w: Tensor, entry: Tensor, length: Tensor, need: Tensor) -> Tensor:
    """Pixels in order of ``priority`` to their ends while all of them are needed, and one more, only as far as needed:
    the one that gets there at the least cost."""
    order = priority.argsort(dim=1, descending=True, stable=True)
    w, entry, length = w.gather(1, order), entry.gather(1, order), length.gather(1, order)
    gains = w * length
    total = gains.cumsum(1)
    whole = (total <= need.unsqueeze(1)) & (gains > 0)
    rest = (need - torch.where(whole, gains, 0.0).sum(1)).clamp(min=0).unsqueeze(1)
    way = rest / w.clamp(min=1e-300)
    last = torch.where(
        ~whole & (w > 0) & (way <= length), entry + way, torch.inf
    )  # (B,N): what finishing with it costs
    cost, pixel = last.min(dim=1, keepdim=True)
    amount = torch.where(whole, entry + length, 0.0)
    amount = amount.scatter_add(1, pixel, torch.where(cost.isfinite() & (rest > 0), cost, 0.0))
    return torch.zeros_like(amount).scatter(1, order, amount)


def _shortest(w: Tensor, entry: Tensor, length: Tensor, need: Tensor) -> Tensor:
    """In L2: how far (B,N) each pixel moves."""
    end = entry + length

    def jumping(t: Tensor) -> Tensor:
        pull = t.unsqueeze(1) * w
        moved = torch.minimum(pull, end)
        return torch.where(2 * pull * (moved - entry) > moved.square(), moved - entry, 0.0)

    # at this pull a pixel has jumped and is at its end
    pull = torch.maximum(end, end.square() / (2 * length.clamp(min=1e-12)))
    most = 1.01 * torch.where(w > 0, pull / w.clamp(min=1e-12), 0.0).amax(1)
    multiplier = _multiplier(jumping, w, need, most)
    gained = w * jumping(multiplier)
    # pixels that jump together, at this very multiplier, need not all do so: as many as it takes, those of most gain
    sure = jumping(multiplier * (1 - 1e-9)) > 0
    missing = need - torch.where(sure, gained, 0.0).sum(1)
    ordered, order = torch.where(sure, 0.0, gained).sort(dim=1, descending=True)
    wanted = ordered.cumsum(1) - ordered < missing.unsqueeze(1)
    jumped = sure | (torch.zeros_like(sure).scatter(1, order, wanted) & (gained > 0))

    def sliding(t: Tensor) -> Tensor:  # those that jumped share what is needed; none of them goes back
        return torch.where(jumped, (torch.minimum(t.unsqueeze(1) * w, end) - entry).clamp(min=0), 0.0)

    amount = sliding(_multiplier(sliding, w, need, multiplier))
    return torch.where(amount > 0, entry + amount, 0.0)


def _multiplier(gained: Callable[[Tensor], Tensor], w: Tensor, need: Tensor, most: Tensor) -> Tensor:
    """The smallest t (B,) in [0, ``most``], up to 2^-60 of it, at which the gains w * gained(t) reach ``need``; else
    ``most``."""
    low, high = torch.zeros_like(most), most.clone()
    for _ in range(60):
        middle = (low + high) / 2
        enough = (w * gained(middle)).sum(1) >= need
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high
