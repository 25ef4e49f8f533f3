"""The least norm of a perturbation that crosses a plane, or several, and stays in the box of images.

For one plane, slopes . d >= threshold with -down <= d <= up, the answers are exact, by sorting or by Newton's method on
one multiplier; for several at once, in L2, the Lagrange dual gives a lower bound. ``absynth.certificates`` rests on
both. Shapes: R problems, N pixels, T planes; float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1e-9  # relative: float64 sums of a thousand terms err by less than 1e-12


@dataclass(frozen=True)
class Box:
    """How far each pixel of an image can go: (N,) float64, both non-negative."""

    up: Tensor
    down: Tensor

    def room(self, slopes: Tensor) -> Tensor:
        """How far (R,N) each pixel can go in the direction in which it gains."""
        return torch.where(slopes > 0, self.up, self.down)


def least_l2_joint(slopes: Tensor, thresholds: Tensor, box: Box, steps: int = 60) -> tuple[Tensor, Tensor]:
    """The least L2 norm of a d in the box that passes several planes (R,T,N), (R,T) at once: a lower bound (R,) of it,
    and a d (R,N) that comes close to passing them.

    The Lagrange dual, max over m >= 0 of m . b - max over d in the box of (m A) . d - ||d||^2 / 2, by accelerated
    projected gradient steps. Its value, in float64, is a lower bound at every m >= 0, however rough the way to it.
    """
    single, targets = slopes.float(), thresholds.float()  # the way to the multipliers may be rough, their value not
    rough = Box(box.up.float(), box.down.float())
    product = single @ single.mT  # (R,T,T)
    rate = 1 / product.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp(min=1e-30)  # 1 / trace, 1 / row sum: both
    rate = torch.maximum(rate, 1 / product.abs().sum(2).amax(1, keepdim=True).clamp(min=1e-30))  # below 1 / eigenvalue
    multipliers = torch.zeros_like(targets)
    ahead, momentum = multipliers, 1.0
    for _ in range(steps):
        pull = (ahead[:, None] @ single)[:, 0]  # (R,N)
        delta = pull.sign() * torch.minimum(pull.abs(), rough.room(pull))
        passed = (single @ delta[:, :, None])[:, :, 0]  # (R,T)
        stepped = (ahead + rate * (targets - passed)).clamp(min=0)
        momentum, before = (1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum
        ahead = (stepped + (before - 1) / momentum * (stepped - multipliers)).clamp(min=0)
        multipliers = stepped
    final = multipliers.double()
    pull = (final[:, None] @ slopes)[:, 0]
    room = box.room(pull)
    bound = _dual_l2(pull.abs(), room, (final * thresholds).sum(1))
    return bound, pull.sign() * torch.minimum(pull.abs(), room)


def least_norm(slopes: Tensor, thresholds: Tensor, box: Box, norm: str) -> Tensor:
    """The least norm (R,) of a d with slopes . d >= threshold and -down <= d <= up; 0 where no d is needed, infinite
    where none reaches. slopes (R,N), thresholds (R,), float64."""
    gains, room = slopes.abs(), box.room(slopes)
    reach = (gains * room).sum(1)
    found = LEAST[norm](gains, room, thresholds.clamp(min=0))
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


LEAST = {"l0": _least_l0, "l1": _least_l1, "l2": _least_l2, "linf": _least_linf}
