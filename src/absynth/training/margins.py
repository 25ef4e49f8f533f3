"""How much of a gap between two explanations an attacker can close within a ball: what the margins of a training are
measured in.

Image x is seen as t(x), and explained by p_y (true class) and p_c (rival). Moving x to x' lowers the gap f_c - f_y by

    2 <p_c - p_y, t(x') - t(x)>,

a sum over pixels, so that what is possible within a ball is known: exactly for L0 and L-infinity, and in L2 as close as
weak duality comes, with one multiplier an image. If the gap is ``room`` times the most that can be closed, the pair
holds within the ball wherever ``room`` exceeds 1. The certificates (``absynth.certificates``) are built on the same
sums, with rounding accounted for; here a gradient flows through them.

Shapes: B images, N values of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from absynth.errors import InputError
from absynth.responses import Ramp

BISECTIONS = 18  # of the multiplier, over ten powers of two


def closable(apart: Tensor, pixels: Tensor, response: Ramp, norm: str, radius: float) -> Tensor:
    """The most (B,) by which <apart, t(x') - t(x)> can grow within a ball around ``pixels`` (B,N) in [0,1].

    ``apart`` (B,N) is p_c - p_y. ``norm``: "l2" (an upper bound that differs from the maximum by a pixel's share at
    most), "linf" or "l0", exact. Raises InputError for another norm.
    """
    up, down = apart.clamp(min=0), (-apart).clamp(min=0)
    seen = response(pixels)
    if norm == "linf":
        higher = response((pixels + radius).clamp(max=1)) - seen
        lower = seen - response((pixels - radius).clamp(min=0))
        gained: Tensor = (up * higher + down * lower).sum(1)
        return gained
    if norm == "l0":
        whole = up * (1 - seen) + down * seen  # a pixel that goes to its end
        most: Tensor = whole.topk(min(int(radius), whole.shape[1]), dim=1).values.sum(1)
        return most
    if norm == "l2":
        return _closable_in_l2(apart, pixels, response, radius)
    raise InputError(f"norm is {norm!r}; margins are known in l2, linf and l0")


def _closable_in_l2(apart: Tensor, pixels: Tensor, response: Ramp, radius: float) -> Tensor:
    """min over m > 0 of m r^2 + sum over pixels of max over d of [gain(d) - m d^2], which no perturbation exceeds."""
    upwards, downwards = response.moves(pixels, up=True), response.moves(pixels, up=False)
    rising = apart > 0
    entry = torch.where(rising, upwards[0], downwards[0])
    length = torch.where(rising, upwards[1], downwards[1])
    slope = torch.where(length > 0, apart.abs(), 0.0) * response.slope  # what a unit on the ramp gains

    def best(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """The moves (B,N) that a pixel is worth at this multiplier (B,1), and what they are worth."""
        move = torch.minimum(torch.maximum(slope / (2 * multiplier), entry), entry + length)
        return move, slope * (move - entry) - multiplier * move.square()

    with torch.no_grad():
        middle = (slope.square().sum(1, keepdim=True) / 4 / radius**2).sqrt().log2().clamp(min=-20)  # were it linear
        low, high = middle - 5, middle + 5
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            move, worth = best(middle.exp2())
            too_far = ((worth > 0) * move.square()).sum(1, keepdim=True) > radius**2
            low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
        multiplier = high.exp2()
    _, worth = best(multiplier)
    return multiplier[:, 0] * radius**2 + worth.clamp(min=0).sum(1)


def room(gap: Tensor, apart: Tensor, pixels: Tensor, response: Ramp, norm: str, radius: float) -> Tensor:
    """The gap f_c - f_y (B,) in units of the most that can be closed within the ball: above 1 the pair holds."""
    return gap / (2 * closable(apart, pixels, response, norm, radius) + 1e-6)
