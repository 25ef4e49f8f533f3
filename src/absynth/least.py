"""The least norm of a perturbation that crosses a plane, or several, and stays in the box of images.

For one plane, slopes . d >= threshold with -down <= d <= up, the answers are exact, by sorting or by Newton's method on
one multiplier; for several at once, in L2, the Lagrange dual gives a lower bound. ``absynth.certificates`` rests on
both. Shapes: R problems, N pixels, T planes; float64.

A pixel seen through a ramp (``absynth.responses.Ramp``) first has to enter it: moved by delta it gains
slope * clip(delta - entry, 0, room). L0 and L-infinity stay exact. In L2 the problem is no longer convex, and the value
of the Lagrange dual, a lower bound at every multiplier, is what counts; in L1 each pixel's gain is replaced by its
concave envelope, the straight line to its end, of which no gain is larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1e-9  # relative: float64 sums of a thousand terms err by less than 1e-12


@dataclass(frozen=True)
class Box:
    """How far each pixel of an image can go while it gains: (N,) float64, both non-negative; with ``enter_up`` and
    ``enter_down`` (N,), by how much it has to be moved before it gains anything."""

    up: Tensor
    down: Tensor
    enter_up: Tensor | None = None
    enter_down: Tensor | None = None

    def room(self, slopes: Tensor) -> Tensor:
        """How far (R,N) each pixel can go in the direction in which it gains."""
        return torch.where(slopes > 0, self.up, self.down)

    def entry(self, slopes: Tensor) -> Tensor | None:
        """What (R,N) has to be spent before each pixel gains; None: nothing anywhere."""
        if self.enter_up is None or self.enter_down is None:
            return None
        return torch.where(slopes > 0, self.enter_up, self.enter_down)

    def float(self) -> Box:
        """The same in float32."""
        up, down = self.enter_up, self.enter_down
        return Box(
            self.up.float(),
            self.down.float(),
            None if up is None else up.float(),
            None if down is None else down.float(),
        )


def least_l2_joint(slopes: Tensor, thresholds: Tensor, box: Box, steps: int = 60) -> tuple[Tensor, Tensor]:
    """The least L2 norm of a d in the box that passes several planes (R,T,N), (R,T) at once: a lower bound (R,) of it,
    and a d (R,N) that comes close to passing them.

    The Lagrange dual, max over m >= 0 of m . b - max over d in the box of (m A) . d - ||d||^2 / 2, by accelerated
    projected gradient steps. Its value, in float64, is a lower bound at every m >= 0, however rough the way to it.
    """
    single, targets = slopes.float(), thresholds.float()  # the way to the multipliers may be rough, their value not
    rough = box.float()
    product = single @ single.mT  # (R,T,T)
    rate = 1 / product.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp(min=1e-30)  # 1 / trace, 1 / row sum: both
    rate = torch.maximum(rate, 1 / product.abs().sum(2).amax(1, keepdim=True).clamp(min=1e-30))  # below 1 / eigenvalue
    multipliers = torch.zeros_like(targets)
    ahead, momentum = multipliers, 1.0
    best, best_value = multipliers, torch.full_like(targets[:, 0], -math.inf)
    for _ in range(steps):
        pull = (ahead[:, None] @ single)[:, 0]  # (R,N)
        gained, spent = _response_to(pull.abs(), rough.room(pull), rough.entry(pull))
        passed = (single @ (pull.sign() * gained)[:, :, None])[:, :, 0]  # (R,T)
        if rough.enter_up is not None:  # where pixels jump the ascent is no longer sure to rise: keep the best
            value = (ahead * targets).sum(1) - (pull.abs() * gained - spent.square() / 2).sum(1)
            best = torch.where((value > best_value)[:, None], ahead, best)
            best_value = torch.maximum(value, best_value)
        stepped = (ahead + rate * (targets - passed)).clamp(min=0)
        momentum, before = (1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum
        ahead = (stepped + (before - 1) / momentum * (stepped - multipliers)).clamp(min=0)
        multipliers = stepped
    final = (multipliers if rough.enter_up is None else best).double()
    pull = (final[:, None] @ slopes)[:, 0]
    room, entry = box.room(pull), box.entry(pull)
    bound = _dual_l2(pull.abs(), room, entry, (final * thresholds).sum(1))
    return bound, pull.sign() * _response_to(pull.abs(), room, entry)[1]


def least_norm(slopes: Tensor, thresholds: Tensor, box: Box, norm: str) -> Tensor:
    """The least norm (R,) of a d with slopes . d >= threshold and -down <= d <= up; 0 where no d is needed, infinite
    where none reaches. slopes (R,N), thresholds (R,), float64."""
    gains, room, entry = slopes.abs(), box.room(slopes), box.entry(slopes)
    reach = (gains * room).sum(1)
    if entry is None or norm == "l0":
        found = LEAST[norm](gains, room, thresholds.clamp(min=0))
    else:
        found = THROUGH_A_RAMP[norm](gains, room, entry, thresholds.clamp(min=0))
    # no further than to the end of the box; a sum short of the threshold by its rounding counts as reaching it
    way = torch.where(gains * room > 0, room if entry is None else entry + room, 0.0)
    found = torch.minimum(found, _END[norm](way))
    found = torch.where(reach < thresholds * (1 - MARGIN), torch.inf, found)
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
    return _dual_l2(gains * multiplier[:, None], room, None, multiplier * thresholds)


def _response_to(pull: Tensor, room: Tensor, entry: Tensor | None) -> tuple[Tensor, Tensor]:
    """What maximizes pull * g - delta^2 / 2 for each pixel, where delta moves it and g = clip(delta - entry, 0, room)
    is what it gains: (g, delta). A pixel that would only lose stays."""
    if entry is None:
        moved = torch.minimum(pull, room)
        return moved, moved
    delta = torch.minimum(pull, entry + room)
    gained = delta - entry
    pays = 2 * pull * gained > delta.square()
    return torch.where(pays, gained, 0.0), torch.where(pays, delta, 0.0)


def _dual_l2(pull: Tensor, room: Tensor, entry: Tensor | None, reward: Tensor) -> Tensor:
    """The dual's value as a distance: sqrt(2 (reward - max of pull . g - ||delta||^2 / 2 over the box)), at least 0."""
    gained, delta = _response_to(pull, room, entry)
    value = reward - (pull * gained - delta.square() / 2).sum(1)
    return (2 * value).clamp(min=0).sqrt()


def _ramp_l1(gains: Tensor, room: Tensor, entry: Tensor, thresholds: Tensor) -> Tensor:
    """Each pixel's gain is at most what it gains in all, in proportion to the way."""
    way = entry + room
    return _least_l1(gains * room / way.clamp(min=1e-300), way, thresholds)


def _ramp_linf(gains: Tensor, room: Tensor, entry: Tensor, thresholds: Tensor) -> Tensor:
    """Every pixel by the same amount e: the sum of gain * clip(e - entry, 0, room) is piecewise linear in e, with two
    kinks a pixel."""
    gains = torch.where(room > 0, gains, 0.0)
    kinks, order = torch.cat([entry, entry + room], dim=1).sort(dim=1)  # (R,2N)
    changes = torch.cat([gains, -gains], dim=1).gather(1, order)
    slope, offset = changes.cumsum(1), (changes * kinks).cumsum(1)  # after each kink
    total = (kinks * slope - offset).cummax(1).values  # gained at each kink; rising, up to rounding
    last = torch.searchsorted(total, thresholds[:, None]).clamp(max=kinks.shape[1] - 1)  # (R,1): a kink that suffices
    before = (last - 1).clamp(min=0)
    low, high = torch.where(last > 0, kinks.gather(1, before), 0.0), kinks.gather(1, last)
    at = (thresholds[:, None] + offset.gather(1, before)) / slope.gather(1, before).clamp(min=1e-300)
    return torch.minimum(torch.maximum(at, low), high)[:, 0]


def _ramp_l2(gains: Tensor, room: Tensor, entry: Tensor, thresholds: Tensor) -> Tensor:
    """The Lagrange dual in one multiplier m, concave: where its derivative, threshold minus what is gained, changes
    sign. The search for m is rough, in float32; the value, a lower bound at every m, is not."""
    rough = gains.float(), room.float(), entry.float()
    targets = thresholds.float()

    def falls_short(multiplier: Tensor) -> Tensor:
        gained, _ = _response_to(multiplier[:, None] * rough[0], rough[1], rough[2])
        return (rough[0] * gained).sum(1) < targets

    free = torch.where(room > 0, gains, 0.0).square().sum(1).float()
    low = targets / free.clamp(min=1e-30)  # what would do if nothing had to be entered and there were no end
    high = low
    for _ in range(40):
        short = falls_short(high)
        if not bool(short.any()):
            break
        low, high = torch.where(short, high, low), torch.where(short, 2 * high, high)
    for _ in range(14):
        middle = (low + high) / 2
        short = falls_short(middle)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    bounds = [_dual_l2(gains * m.double()[:, None], room, entry, m.double() * thresholds) for m in (low, high)]
    return torch.maximum(*bounds)


_END = {  # the norm of the d that goes as far as it can in every pixel that gains
    "l0": lambda way: (way > 0).sum(1).double(),
    "l1": lambda way: way.sum(1),
    "l2": lambda way: torch.linalg.vector_norm(way, dim=1),
    "linf": lambda way: way.amax(1),
}
LEAST = {"l0": _least_l0, "l1": _least_l1, "l2": _least_l2, "linf": _least_linf}
THROUGH_A_RAMP = {"l1": _ramp_l1, "l2": _ramp_l2, "linf": _ramp_linf}
