"""Certificates: radii within which no image, whatever the attack, gets another label. Deterministic and proven.

They are for classifiers by the nearest prototype: class c has a finite set of prototypes p with costs K, and

    f_c(x) = min over its prototypes of ||x - p||^2 + K,          the label is the class of the smallest f.

**Theorem.** Let x have label y, let x + d be an image in [0,1] with another label c, reached by its prototype p'. Then
for *every* prototype p of class y, ||x + d - p'||^2 + K' <= ||x + d - p||^2 + K, which expands to

    d . (p' - p) >= (||x - p'||^2 + K' - ||x - p||^2 - K) / 2  =:  b(p', p).                                    (1)

Hence the least norm of a d that stays in the box and satisfies (1) for p' and any non-negative combination of the p
is a lower bound of the distance to the images that p' claims, and the smallest of these over all p' of all other
classes is a certified radius. For a single p the least norms have closed forms: they come from the pixels' room in the
box, r_i = 1 - x_i where p' - p is positive and x_i where it is negative (without the box, L2 is the distance to the
bisecting plane, b / ||p' - p||). For several p at once, L2 takes the Lagrange dual, whose value is a lower bound at
*every* multiplier, however it was found.

**Floating point.** Prototypes are screened in float32 with a margin far above its rounding; what decides is computed in
float64 from the stored float32 image and prototypes, and the result is lowered by ``MARGIN`` of itself. The deployed
classifier rounds too: ``Prototypes.slack`` bounds by how much it may misjudge a difference of two f, and b is lowered
by half of that. The certificate is for the prototypes as this machine decoded them.

Shapes: M prototypes, N pixels, R rivals, T prototypes of the true class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from absynth.checks import check_images
from absynth.errors import InputError

METHOD = "bisector"
MARGIN = 1e-9  # relative: float64 sums of a thousand terms err by less than 1e-12
SCREENING = 1e-3  # relative: float32 sums of a thousand terms err by less than 1e-4


@dataclass(frozen=True)
class Prototypes:
    """What a classifier by the nearest prototype compares images with.

    ``points`` (M,N) float32 in [0,1], ``costs`` (M,), ``labels`` (M,), sorted by label. ``slack``: the deployed
    classifier, which rounds, never prefers a class whose f exceeds another's by more than this.
    """

    points: Tensor
    costs: Tensor
    labels: Tensor
    slack: float = 0.0


@runtime_checkable
class HasPrototypes(Protocol):
    """A classifier that decides by its nearest prototype, and so can be certified."""

    def prototypes(self) -> Prototypes:
        """The prototypes, their costs and labels."""


@dataclass(frozen=True)
class Box:
    """How far each pixel of an image can go: (N,) float64, both non-negative."""

    up: Tensor
    down: Tensor

    def room(self, slopes: Tensor) -> Tensor:
        """How far (R,N) each pixel can go in the direction in which it gains."""
        return torch.where(slopes > 0, self.up, self.down)


def check_norms(norms: Iterable[str]) -> None:
    """Raise InputError for a norm that has no certificates."""
    for norm in norms:
        if norm not in _LEAST:
            raise InputError(f"norm is {norm!r}; certificates are for {', '.join(_LEAST)}: choose among these")


def check_model(model: object) -> None:
    """Raise InputError for a model that has no certificates."""
    if not isinstance(model, HasPrototypes):
        raise InputError(
            f"{type(model).__name__} has no certificates: only classifiers by the nearest prototype have them, "
            "prototype-abs and nearest-neighbor"
        )


def certified_radii(
    model: HasPrototypes, images: Tensor, labels: Tensor, norms: Iterable[str] = ("l0", "l1", "l2", "linf")
) -> dict[str, Tensor]:
    """Certified radii (B,), float64, of images (B,C,S,S) in [0,1] with labels (B,), for each norm.

    No image in [0,1] at a distance *below* the radius gets another label; a misclassified image, or one where another
    class comes within the classifier's rounding, has radius 0. In L0 the radius is the number of pixels that an attack
    needs at least. Raises InputError for a model without prototypes, for unknown norms, for images out of range.
    """
    check_model(model)
    return Certifier(model.prototypes()).radii(images, labels, norms)


class Certifier:
    """Certificates for one set of prototypes.

    ``near``: how many prototypes of the true class, nearest first, may be held against a rival; ``tried``: how many of
    these, the most promising first, are, one by one; ``joint``: on how many of the closest rivals, in L2, all ``near``
    are held at once (0: none). More can only raise a radius.
    """

    def __init__(self, prototypes: Prototypes, *, near: int = 16, tried: int = 4, joint: int = 24) -> None:
        self.prototypes, self.near, self.tried, self.joint = prototypes, near, tried, joint
        self.squares = prototypes.points.square().sum(1)  # (M,)
        order = prototypes.labels
        if bool((order[1:] < order[:-1]).any()):
            raise InputError("the prototypes are not sorted by label: sort points, costs and labels together")

    def radii(self, images: Tensor, labels: Tensor, norms: Iterable[str]) -> dict[str, Tensor]:
        """As ``certified_radii``."""
        wanted = tuple(norms)
        check_norms(wanted)
        check_images(images, channels=images.shape[1] if images.ndim == 4 else 1, size=None)
        if images[0].numel() != self.prototypes.points.shape[1]:
            raise InputError(
                f"images have {images[0].numel()} values, the prototypes {self.prototypes.points.shape[1]}: give "
                "images of the size the model was made for"
            )
        found = [self._image(image, int(label), wanted) for image, label in zip(images.flatten(1), labels, strict=True)]
        return {norm: torch.tensor([one[norm] for one in found], dtype=torch.float64) for norm in wanted}

    @torch.no_grad()
    def _image(self, image: Tensor, label: int, norms: tuple[str, ...]) -> dict[str, float]:
        """The radii of one image (N,)."""
        planes, threshold, own = self._hold_against(image, label)
        radii = {}
        for norm, bounds in _screen(planes, threshold, norms).items():
            bounds[own] = torch.inf
            radius = _smallest(planes, norm, bounds * (1 - SCREENING), self.joint if norm == "l2" else 0)
            radii[norm] = radius if norm == "l0" else radius * (1 - MARGIN)
        return radii

    @torch.no_grad()
    def planes(self, image: Tensor, label: int, norm: str) -> tuple[_Planes, Tensor]:
        """The half-spaces of one image (N,), and a quick lower bound (M,) of what each prototype of another class asks
        for; infinite for those of its own."""
        planes, threshold, own = self._hold_against(image, label)
        bounds = _screen(planes, threshold, (norm,))[norm].double() * (1 - SCREENING)
        bounds[own] = torch.inf
        return planes, bounds

    def _hold_against(self, image: Tensor, label: int) -> tuple[_Planes, Tensor, slice]:
        """The half-spaces, the threshold (M,) of the best one for every prototype, and the true class's own."""
        points, labels = self.prototypes.points, self.prototypes.labels
        first, last = torch.searchsorted(labels, torch.tensor([label, label + 1], device=labels.device)).tolist()
        if first == last:
            raise InputError(f"label is {label}, of which there is no prototype: give labels of the model's classes")
        energies = self.squares + self.prototypes.costs - 2 * (points @ image)  # (M,), up to ||x||^2
        own = first + energies[first:last].topk(min(self.near, last - first), largest=False).indices  # (T,)
        # the unbounded L2 distance to every bisecting plane tells which p of its own class to hold against a rival
        apart = (self.squares[:, None] + self.squares[own] - 2 * (points @ points[own].T)).clamp(min=1e-12).sqrt()
        thresholds = (energies[:, None] - energies[own]) / 2  # (M,T)
        best = (thresholds / apart).topk(min(self.tried, len(own)), dim=1).indices  # (M,t)
        threshold = thresholds.gather(1, best[:, :1])[:, 0] - self.prototypes.slack / 2
        return _Planes(self.prototypes, image, own, best), threshold, slice(first, last)

    def broken(self, image: Tensor, label: int) -> bool:
        """Whether an image (N,), float64, is nearer to a prototype of another class; a tie is broken."""
        points, costs = self.prototypes.points.double(), self.prototypes.costs.double()
        energies = (points - image).square().sum(1) + costs
        own = self.prototypes.labels == label
        return bool(energies[~own].min() <= energies[own].min())


CHUNK = 16  # rivals measured at once
ROWS = 256  # rivals screened at once: their slopes stay in the cache


class _Planes:
    """The half-spaces (1) of one image (N,): ``own`` (T,) prototypes of the true class, and for every prototype p' of
    all the most promising t of them, ``best`` (M,t), as indices into ``own``."""

    def __init__(self, prototypes: Prototypes, image: Tensor, own: Tensor, best: Tensor) -> None:
        self.prototypes, self.image, self.own, self.best = prototypes, image, own, best
        self.exact = image.double()
        self.box = Box(1 - self.exact, self.exact)

    def exactly(self, rivals: Tensor, against: Tensor) -> tuple[Tensor, Tensor]:
        """Rivals (r,), and indices into ``own`` (r,t) -> slopes (r,t,N) and thresholds (r,t), float64."""
        return self.planes_of(rivals, self.own[against])

    def planes_of(self, rivals: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Rivals (r,) and prototypes of the true class (r,t) -> slopes (r,t,N) and thresholds (r,t), float64."""
        points, costs = self.prototypes.points, self.prototypes.costs.double()
        theirs, ours = points[rivals].double()[:, None], points[chosen].double()
        theirs_f = (self.exact - theirs).square().sum(2) + costs[rivals, None]  # (r,1)
        ours_f = (self.exact - ours).square().sum(2) + costs[chosen]  # (r,t)
        return theirs - ours, (theirs_f - ours_f - self.prototypes.slack) / 2


def _screen(planes: _Planes, thresholds: Tensor, norms: Iterable[str]) -> dict[str, Tensor]:
    """Quick lower bounds (M,) on what each prototype asks for, in float32, from the best of its planes alone."""
    up, down = 1 - planes.image, planes.image
    can_rise, can_fall = (up > 0).float(), (down > 0).float()
    bounds = {norm: torch.empty_like(thresholds) for norm in norms}
    points, ours = planes.prototypes.points, planes.prototypes.points[planes.own]
    for start in range(0, len(thresholds), ROWS):
        rows = slice(start, start + ROWS)
        threshold = thresholds[rows]
        slopes = points[rows] - ours[planes.best[rows, 0]]  # (r,N)
        rise, fall = slopes.clamp(min=0), slopes.clamp_(max=0).neg_()
        useful = rise * can_rise + fall * can_fall  # slopes where there is room at all
        if "l2" in bounds:
            bounds["l2"][rows] = threshold / torch.linalg.vector_norm(useful, dim=1)
        if "linf" in bounds:
            bounds["linf"][rows] = threshold / useful.sum(1)
        if "l1" in bounds:
            bounds["l1"][rows] = threshold / useful.amax(1)
        if "l0" in bounds:
            gains = rise.mul_(up).add_(fall.mul_(down))
            # k pixels gain at most k t + the sum of what exceeds t, for every t
            fewest = threshold / gains.amax(1)
            for level in (0.4, 0.6, 0.75, 0.9):
                fewest = torch.maximum(fewest, (threshold - (gains - level).clamp_(min=0).sum(1)) / level)
            bounds["l0"][rows] = fewest
    return bounds


def _smallest(planes: _Planes, norm: str, bounds: Tensor, joint: int) -> float:
    """The smallest radius over all rivals: those with the lowest quick bounds are measured until none can be lower.

    ``joint`` of the lowest are then measured again, against all planes at once.
    """
    if norm == "l0":
        bounds = bounds.ceil()
    bounds = bounds.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # 0 / 0: the same prototype
    order = bounds.argsort()[: int((bounds < math.inf).sum())]
    smallest, measured = math.inf, 0
    for rivals in order.split(CHUNK):
        if not float(bounds[rivals[0]]) < smallest:
            break
        slopes, thresholds = planes.exactly(rivals, planes.best[rivals])  # (r,t,N), (r,t)
        radii = least_norm(slopes.flatten(0, 1), thresholds.flatten(), planes.box, norm)
        bounds[rivals] = radii.view(thresholds.shape).amax(1)  # the best of the planes: all of them must be passed
        smallest = min(smallest, float(bounds[rivals].min()))
        measured += len(rivals)
    if not joint or smallest == 0 or math.isinf(smallest):
        return smallest
    # what has not been measured keeps its quick bound, which is no lower than the smallest
    lowest = bounds.topk(min(joint + 1, len(order)), largest=False).indices
    if len(lowest) > joint:
        lowest, next_one = lowest[:joint], float(bounds[lowest[joint]])
    else:
        next_one = math.inf
    every = torch.arange(len(planes.own), device=lowest.device).expand(len(lowest), -1)
    together = torch.maximum(least_l2_joint(*planes.exactly(lowest, every), planes.box)[0], bounds[lowest])
    return min(float(together.min()), next_one)


def least_l2_joint(slopes: Tensor, thresholds: Tensor, box: Box, steps: int = 60) -> tuple[Tensor, Tensor]:
    """The least L2 norm of a d in the box that passes several planes (R,T,N), (R,T) at once: a lower bound (R,) of it,
    and a d (R,N) that comes close to passing them.

    The Lagrange dual, max over m >= 0 of m . b - max over d in the box of (m A) . d - ||d||^2 / 2, by accelerated
    projected gradient steps. Its value is a lower bound at every m >= 0; the best one found is taken.
    """
    product = slopes @ slopes.mT  # (R,T,T)
    rate = 1 / product.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp(
        min=1e-300
    )  # below 1 / the largest eigenvalue
    rate = torch.maximum(rate, 0.99 / product.abs().sum(2).amax(1, keepdim=True).clamp(min=1e-300))
    multipliers = torch.zeros_like(thresholds)
    delta = torch.zeros_like(slopes[:, 0])
    ahead, best, momentum = multipliers, delta[:, 0], 1.0
    for _ in range(steps):
        pull = (ahead[:, None] @ slopes)[:, 0]  # (R,N)
        room = box.room(pull)
        moved = torch.minimum(pull.abs(), room)
        best = torch.maximum(best, _dual_l2(pull.abs(), room, (ahead * thresholds).sum(1)))
        delta = pull.sign() * moved
        passed = (slopes @ delta[:, :, None])[:, :, 0]  # (R,T)
        stepped = (ahead + rate * (thresholds - passed)).clamp(min=0)
        momentum, before = (1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum
        # `ahead` must stay non-negative: only then is the dual's value a bound
        ahead = (stepped + (before - 1) / momentum * (stepped - multipliers)).clamp(min=0)
        multipliers = stepped
    return best, delta


def least_norm(slopes: Tensor, thresholds: Tensor, box: Box, norm: str) -> Tensor:
    """The least norm (R,) of a d with slopes . d >= threshold and -down <= d <= up; 0 where no d is needed, infinite
    where none reaches. slopes (R,N), thresholds (R,), float64."""
    gains, room = slopes.abs(), box.room(slopes)
    reach = (gains * room).sum(1)
    found = _LEAST[norm](gains, room, thresholds.clamp(min=0))
    found = torch.where(reach < thresholds, torch.inf, found)
    return torch.where(thresholds <= 0, 0.0, found)


def _least_l0(gains: Tensor, room: Tensor, thresholds: Tensor) -> Tensor:
    """The pixels that gain most, each moved as far as it can go."""
    total = (gains * room).sort(dim=1, descending=True).values.cumsum(1)
    # a sum short of the threshold by its rounding counts as reaching it
    return torch.searchsorted(total, (thresholds * (1 - MARGIN))[:, None])[:, 0].double() + 1


def _least_l1(gains: Tensor, room: Tensor, thresholds: Tensor) -> Tensor:
    """The steepest pixels first, each as far as it can go, the last one only in part."""
    gains, order = gains.sort(dim=1, descending=True)
    room = room.gather(1, order)
    total, spent = (gains * room).cumsum(1), room.cumsum(1)
    last = torch.searchsorted(total, thresholds[:, None]).clamp(max=gains.shape[1] - 1)  # (R,1)
    before = (last - 1).clamp(min=0)
    rest = thresholds[:, None] - torch.where(last > 0, total.gather(1, before), 0.0)
    spent = torch.where(last > 0, spent.gather(1, before), 0.0)
    return (spent + rest / gains.gather(1, last).clamp(min=1e-300))[:, 0]


def _least_linf(gains: Tensor, room: Tensor, thresholds: Tensor) -> Tensor:
    """Every pixel by the same amount e, or as far as it can go: sum of gain * min(e, room) is piecewise linear in e."""
    room, order = torch.where(gains > 0, room, 0.0).sort(dim=1)
    gains = gains.gather(1, order)
    stuck = (gains * room).cumsum(1)  # gained by the pixels up to this one, at the end of their room
    free = gains.sum(1, keepdim=True) - gains.cumsum(1)  # slopes of the pixels after it
    last = torch.searchsorted(stuck + room * free, thresholds[:, None]).clamp(max=gains.shape[1] - 1)  # (R,1)
    before = (last - 1).clamp(min=0)
    rest = thresholds[:, None] - torch.where(last > 0, stuck.gather(1, before), 0.0)
    slope = torch.where(last > 0, free.gather(1, before), gains.sum(1, keepdim=True))
    return (rest / slope.clamp(min=1e-300))[:, 0]


def _least_l2(gains: Tensor, room: Tensor, thresholds: Tensor) -> Tensor:
    """d = min(m * gain, room) for one multiplier m: Newton's method on m, then the value of the dual, a lower bound at
    every m."""
    free = torch.where(room > 0, gains, 0.0).square().sum(1)
    multiplier = thresholds / free.clamp(min=1e-300)
    for _ in range(50):  # from below, on a concave piecewise linear function: a few suffice
        moved = multiplier[:, None] * gains
        missing = thresholds - (gains * torch.minimum(moved, room)).sum(1)
        slope = torch.where(moved < room, gains, 0.0).square().sum(1)
        step = torch.where((missing > 1e-12 * thresholds) & (slope > 0), missing / slope.clamp(min=1e-300), 0.0)
        if not bool(step.any()):
            break
        multiplier = multiplier + step
    return _dual_l2(gains * multiplier[:, None], room, multiplier * thresholds)


def _dual_l2(pull: Tensor, room: Tensor, reward: Tensor) -> Tensor:
    """The dual's value as a distance: sqrt(2 (reward - max of pull . d - ||d||^2 / 2 over the box)), at least 0."""
    moved = torch.minimum(pull, room)
    value = reward - (pull * moved - moved.square() / 2).sum(1)
    return (2 * value).clamp(min=0).sqrt()


_LEAST = {"l0": _least_l0, "l1": _least_l1, "l2": _least_l2, "linf": _least_linf}
