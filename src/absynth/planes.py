"""The half-spaces that certificates are made of: one for each prototype of another class (``absynth.certificates``).

Which of them decide is found by bounds in float32, coarse ones for all from a few products, fine ones for those that
may matter; what decides is measured in float64.

Shapes: M prototypes, N pixels, r rivals, T prototypes of the true class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.errors import InputError
from absynth.least import Box, least_l2_joint, least_norm
from absynth.responses import Ramp

SUMS = 1e-12  # relative: float64 sums of a thousand positive terms err by less
SCREENING = 1e-3  # relative: float32 sums of a thousand positive terms err by less than 1e-4
FIRST = 64  # rivals measured before it is known how far to look
CHUNK = 16  # rivals measured at once
JOINT = 6  # rivals measured against several planes at once
ROWS = 256  # rivals screened at once: their slopes stay in the cache
FACTORS = (1.2, 1.6)  # the multipliers tried in screening, times threshold / radius^2; without a ramp 1 is the best


@dataclass(frozen=True)
class Prototypes:
    """What a classifier by the nearest prototype compares images with.

    ``points`` (M,N) float32 in [0,1], ``costs`` (M,) of 0 or more, ``labels`` (M,), sorted by label. ``slack``: the
    deployed classifier, which rounds, never prefers a class whose f exceeds another's by more than this; 0 only for one
    that does not round (``absynth.nearest.rounding_slack`` bounds what a float32 matrix product does). ``response``:
    what is done to the pixels first; None: nothing. Raises InputError for points outside [0,1], for which the bounds
    would not hold, for costs that are negative or not finite, and for a negative slack.
    """

    points: Tensor
    costs: Tensor
    labels: Tensor
    slack: float = 0.0
    response: Ramp | None = None

    def __post_init__(self) -> None:
        low, high = float(self.points.min()), float(self.points.max())
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"prototypes have values from {low:.4g} to {high:.4g}; certificates hold for points in [0, 1]: scale "
                "prototypes and images alike"
            )
        if not bool((self.costs.isfinite() & (self.costs >= 0)).all()):
            raise InputError(
                f"prototypes have costs down to {float(self.costs.min()):.4g}; expected finite ones of at least 0: "
                "subtract the smallest from all, only their differences count"
            )
        if not self.slack >= 0:
            raise InputError(f"slack is {self.slack}; expected at least 0")

    def see(self, images: Tensor) -> Tensor:
        """What is compared with the prototypes."""
        return images if self.response is None else self.response(images)


def weighted_squares(points: Tensor, weights: Tensor) -> Tensor:
    """Sums (M,B) of weights (B,N) times p^2 of points (M,N), without a copy of all of them."""
    return torch.cat([rows.square() @ weights.T for rows in points.split(ROWS)])


def gaining(ours: Tensor, rise: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """For each p of ``ours`` (T,N), weights (T,N) and constants (T,) that make the sum of rise * (p' - p)+ and
    fall * (p - p')+ at most <p', weights> + constant, for values in [0,1]: the first is at most p' (1 - p), the second
    p (1 - p')."""
    return rise * (1 - ours) - fall * ours, (fall * ours).sum(1)


@dataclass(frozen=True)
class View:
    """What one image (N,) looks like to the prototypes, and what moving its pixels does to that.

    ``exact`` in float64; ``seen`` the same in float32, and in float32 too, for screening: how much each pixel gains
    going ``up`` and ``down`` as far as it can, and the most it gains for each unit of the way, ``rise`` and ``fall``; 0
    where it cannot go. ``box``: the ways, in float64, in which a unit changes what is seen by ``slope``.
    """

    pixels: Tensor
    exact: Tensor
    box: Box
    slope: float
    seen: Tensor
    up: Tensor
    down: Tensor
    rise: Tensor
    fall: Tensor

    @staticmethod
    def of(image: Tensor, response: Ramp | None) -> View:
        """The view of an image (N,) float32."""
        pixels = image.double()
        if response is None:
            box, exact, slope = Box(1 - pixels, pixels), pixels, 1.0
            rise, fall = (box.up > 0).float(), (box.down > 0).float()
        else:
            enter_up, up = response.moves(pixels, up=True)
            enter_down, down = response.moves(pixels, up=False)
            box, exact, slope = Box(up, down, enter_up, enter_down), response(pixels), response.slope
            rise = torch.where(up > 0, slope * up / (enter_up + up), 0.0).float()
            fall = torch.where(down > 0, slope * down / (enter_down + down), 0.0).float()
        up, down = (slope * box.up).float(), (slope * box.down).float()
        return View(pixels, exact, box, slope, exact.float(), up, down, rise, fall)

    def within(self, radius: float) -> tuple[Tensor, Tensor]:
        """The most (N,) that each pixel gains, up and down, by a move of ``radius`` or less."""

        def gained(entry: Tensor | None, length: Tensor) -> Tensor:
            way = torch.full_like(length, radius) if entry is None else radius - entry
            return (self.slope * torch.minimum(way.clamp(min=0), length)).float()

        return gained(self.box.enter_up, self.box.up), gained(self.box.enter_down, self.box.down)


@dataclass(frozen=True)
class Planes:
    """The half-spaces (1) of one image (N,).

    ``own`` (T,) are the prototypes of the true class nearest to it. For every prototype p' of all, ``promising`` (M,T)
    says which of them are, the larger the more, of which ``tried`` are held against it; ``first`` (M,) is the best, as
    an index into ``own``, ``thresholds`` (M,) its b, and ``distances`` (M,) its L2 distance without the box, infinite
    for prototypes of the true class: in float32, for screening, and lowered by what that may err. ``error`` bounds the
    error of a float32 product of two images. ``gained`` (M,), where it is known, is the most that a unit in L-infinity
    gains a prototype on that first one.
    """

    prototypes: Prototypes
    view: View
    own: Tensor
    promising: Tensor
    tried: int
    first: Tensor
    thresholds: Tensor
    distances: Tensor
    error: float
    gained: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """The image in float64."""
        return self.view.pixels

    @property
    def box(self) -> Box:
        """How far its pixels can go."""
        return self.view.box

    def best(self, rivals: Tensor) -> Tensor:
        """The prototypes (r,t) of the true class that are held against rivals (r,), the most promising first."""
        return self.own[self.promising[rivals].topk(min(self.tried, len(self.own)), dim=1).indices]

    def exactly(self, rivals: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Rivals (r,) and prototypes of the true class (r,t) -> slopes (r,t,N) and thresholds (r,t), float64."""
        points, costs = self.prototypes.points, self.prototypes.costs.double()
        theirs, ours = points[rivals].double()[:, None], points[chosen].double()
        theirs_f = (self.view.exact - theirs).square().sum(2) + costs[rivals, None]  # (r,1)
        ours_f = (self.view.exact - ours).square().sum(2) + costs[chosen]  # (r,t)
        rounding = SUMS * (theirs_f + ours_f)  # where both are the same exactly, neither may win by rounding
        return self.view.slope * (theirs - ours), (theirs_f - ours_f - self.prototypes.slack - rounding) / 2

    def coarse(self, norm: str) -> Tensor:
        """Lower bounds (M,) of what every prototype asks for, from a few products; infinite for the true class's."""
        if norm == "l2":
            bounds = self.distances  # the box can only make it more
        elif norm == "linf":
            most = self._gained(self.view.rise, self.view.fall) if self.gained is None else self.gained
            bounds = self.thresholds / (most + self.error)
        elif norm == "l0":
            bounds = self.thresholds  # no pixel gains more than 1
        else:
            bounds = self.thresholds / max(float(self.view.rise.max()), float(self.view.fall.max()), 1e-30)
        bounds = torch.where(self.thresholds > 0, bounds * (1 - SCREENING), -torch.inf)
        return torch.where(self.distances == torch.inf, torch.inf, bounds)

    def beyond(self, radius: float) -> Tensor:
        """Which of the prototypes (M,) ask for more than ``radius`` in L-infinity, by one product; the others may."""
        most = self._gained(*self.view.within(radius)) + self.error
        return self.thresholds * (1 - SCREENING) > most

    def _gained(self, rise: Tensor, fall: Tensor) -> Tensor:
        """At least the sum (M,) of rise * (p' - p)+ and fall * (p - p')+, by one product."""
        weights, constants = gaining(self.prototypes.points[self.own], rise, fall)
        products = self.prototypes.points @ weights.T + constants  # (M,T)
        return products.gather(1, self.first[:, None])[:, 0]

    def fine(self, norm: str, rivals: Tensor, radius: float) -> Tensor:
        """Lower bounds (r,) of what rivals (r,) ask for, in float32, from the first of their planes alone; ``radius``,
        the smallest known, is where they should be tight."""
        points, ours = self.prototypes.points, self.prototypes.points[self.own]
        bounds = []
        for rows in rivals.split(ROWS):
            threshold = self.thresholds[rows]
            slopes = points[rows].sub_(ours[self.first[rows]])  # (r,N)
            if norm == "linf" and self.prototypes.response is None:
                bounds.append(threshold / (self._useful(slopes) + self.error))
                continue
            bounds.append(self._fine(norm, slopes.clamp(min=0), slopes.clamp_(max=0).neg_(), threshold, radius))
        found = torch.cat(bounds) * (1 - SCREENING)
        if norm == "l0":
            found = found.ceil()
        return torch.where(self.thresholds[rivals] > 0, found, -torch.inf)

    def _useful(self, slopes: Tensor) -> Tensor:
        """The sums (r,) of rise * s+ and fall * (-s)+ over slopes (r,N), which are lost: s+ is (|s| + s) / 2."""
        rise, fall = self.view.rise, self.view.fall
        signed = slopes @ ((rise - fall) / 2)
        return slopes.abs_() @ ((rise + fall) / 2) + signed

    def _fine(self, norm: str, rise: Tensor, fall: Tensor, threshold: Tensor, radius: float) -> Tensor:
        """The same for slopes (r,N), split into those upward and those downward."""
        view = self.view
        if norm == "l0":
            gains = rise.mul_(view.up).add_(fall.mul_(view.down))
            # k pixels gain at most k t + the sum of what exceeds t, for every t
            fewest = threshold / gains.amax(1)
            for level in (0.4, 0.6, 0.75, 0.9):
                fewest = torch.maximum(fewest, (threshold - (gains - level).clamp_(min=0).sum(1)) / level)
            return fewest
        ramp, known = self.prototypes.response is not None, math.isfinite(radius) and radius > 0
        if ramp and known and norm == "linf":
            up, down = view.within(radius)
            most = rise @ up + fall @ down
            return torch.where(threshold * (1 - SCREENING) > most, radius * (1 + 2 * SCREENING), 0.0)
        dual = self._dual(rise, fall, threshold, radius) if ramp and known and norm == "l2" else None
        useful = rise.mul_(view.rise).add_(fall.mul_(view.fall))  # slopes where there is room at all
        if norm == "l2":
            plain = threshold / torch.linalg.vector_norm(useful, dim=1)
            return plain if dual is None else torch.maximum(plain, dual)
        return threshold / (useful.sum(1) if norm == "linf" else useful.amax(1))

    def _dual(self, rise: Tensor, fall: Tensor, threshold: Tensor, radius: float) -> Tensor:
        """The Lagrange dual's value (r,) through a ramp, at multipliers that suit rivals at about ``radius``."""
        enter_up, enter_down = self.box.enter_up, self.box.enter_down
        assert enter_up is not None and enter_down is not None
        upward = rise > 0
        entry = torch.where(upward, enter_up.float(), enter_down.float())
        end = entry + torch.where(upward, self.box.up.float(), self.box.down.float())
        slopes = (rise + fall).mul_(self.view.slope)
        best = torch.zeros_like(threshold)
        for factor in FACTORS:
            reward = factor * radius**2
            pull = slopes * (reward / threshold.clamp(min=1e-12))[:, None]
            delta = torch.minimum(pull, end)
            # the pixels' own part: pull * gain - delta^2 / 2, where it is above 0
            lost = (delta - entry).mul_(pull).sub_(delta.square_().div_(2)).clamp_(min=0).sum(1)
            best = torch.maximum(best, 2 * (reward * (1 - SCREENING / 10) - lost))
        return best.clamp(min=0).sqrt()


def smallest_radius(planes: Planes, norm: str, joint: int) -> float:
    """The smallest radius over all rivals: coarse bounds say which to screen, fine ones which to measure."""
    bounds = planes.coarse(norm).double()  # (M,), replaced by better ones as they come
    first = bounds.topk(min(FIRST, len(bounds)), largest=False).indices
    smallest = _measure(planes, norm, bounds, first[bounds[first] < math.inf], math.inf)
    looked_at = torch.zeros_like(bounds, dtype=torch.bool)
    looked_at[first] = True
    if norm == "linf" and planes.prototypes.response is not None and 0 < smallest < math.inf:
        looked_at |= planes.beyond(smallest)
    rest = ((bounds < smallest) & ~looked_at).nonzero()[:, 0]
    smallest = _measure(planes, norm, bounds, rest, smallest)
    done = torch.zeros_like(looked_at)
    while joint > 0 and 0 < smallest < math.inf:
        lowest = bounds.topk(min(JOINT, len(bounds)), largest=False).indices
        smallest = float(bounds[lowest[0]])
        lowest = lowest[~done[lowest] & (bounds[lowest] < math.inf)]
        if not len(lowest) or done[bounds.argmin()]:
            break
        together, _ = least_l2_joint(*planes.exactly(lowest, planes.own.expand(len(lowest), -1)), planes.box)
        bounds[lowest] = torch.maximum(together, bounds[lowest])
        done[lowest] = True
        joint -= len(lowest)
        smallest = float(bounds.min())
    return smallest


def _measure(planes: Planes, norm: str, bounds: Tensor, rivals: Tensor, smallest: float) -> float:
    """Put better bounds of ``rivals`` (r,) in their places, as far as they may matter; the smallest radius measured."""
    if not len(rivals):
        return smallest
    bounds[rivals] = torch.maximum(bounds[rivals], planes.fine(norm, rivals, smallest).double())
    for chunk in rivals[bounds[rivals].argsort()].split(CHUNK):
        if not float(bounds[chunk[0]]) < smallest:
            break
        slopes, thresholds = planes.exactly(chunk, planes.best(chunk))  # (r,t,N), (r,t)
        radii = least_norm(slopes.flatten(0, 1), thresholds.flatten(), planes.box, norm)
        bounds[chunk] = radii.view(thresholds.shape).amax(1)  # the best of the planes: all of them must be passed
        smallest = min(smallest, float(bounds[chunk].min()))
    return smallest
