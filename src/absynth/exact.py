"""The exact L2 robustness of a classifier by the nearest prototype, image by image: both sides of it.

An image is given to another class exactly where one of its prototypes p' beats *every* prototype of the true class: a
polyhedron inside the box. The distance to it is a quadratic program with one constraint a prototype of the true class,
of which few matter: planes are added where the nearest point found violates them most (cutting planes) until it
violates none. The dual's value is a certified lower bound at every stage; the last point, pushed a hair further and
classified, is an adversarial image and so an upper bound.

Theorem and assumptions: those of ``absynth.certificates``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.certificates import Certifier
from absynth.errors import InputError
from absynth.least import MARGIN, least_l2_joint

FINE = 4000  # rivals whose bounds are screened
ROUNDS = 12  # of adding planes
STEPS = 300  # of the dual's ascent
ADDED = 8  # planes a round
PUSHES = (1.0, 1.001, 1.01, 1.1, 1.5, 2.0)  # how far beyond the point found an adversarial is looked for, relative


@dataclass(frozen=True)
class Exact:
    """``lower`` is certified: no adversarial is nearer. ``adversarial`` (N,) is one at distance ``upper``; None and
    infinite where none was found within the box."""

    lower: float
    upper: float
    adversarial: Tensor | None


@torch.no_grad()
def exact_distance(certifier: Certifier, image: Tensor, label: int, *, rivals: int = 200) -> Exact:
    """The L2 distance from image (N,) in [0,1] with this label to the nearest image of another label.

    ``rivals``: how many prototypes of other classes are solved at most; what is left counts by its quick bound. Both
    sides are infinite where no image in the box has another label. Raises InputError for an image that is
    misclassified: its distance is 0.
    """
    planes = certifier.planes(image, label)
    if certifier.broken(planes.pixels, label):
        raise InputError("the image is misclassified, or lies at a tie: its distance is 0")
    bounds = planes.coarse("l2").double()
    near = bounds.topk(min(FINE, len(bounds)), largest=False).indices
    near = near[bounds[near] < math.inf]
    bounds[near] = torch.maximum(bounds[near], planes.fine("l2", near, math.inf).double())
    prototypes = certifier.prototypes
    own = (prototypes.labels == label).nonzero()[:, 0]
    points, costs = prototypes.points.double(), prototypes.costs.double()
    order = bounds.argsort()[: int((bounds < math.inf).sum())]
    lower, upper, adversarial = math.inf, math.inf, None
    for place, rival in enumerate(order.tolist()):
        if float(bounds[rival]) >= min(lower, upper):
            break
        if place == rivals:
            lower = min(lower, float(bounds[rival]))
            break
        index = torch.tensor([rival])
        against = planes.own  # (T,): prototypes of the true class
        for _ in range(ROUNDS):
            slopes, thresholds = planes.exactly(index, against[None])
            values, deltas = least_l2_joint(slopes, thresholds, planes.box, steps=STEPS)
            value, moved = float(values[0]), planes.pixels + deltas[0]
            seen = prototypes.see(moved)
            if value >= upper:
                break
            theirs = (seen - points[rival]).square().sum() + costs[rival]
            excess = theirs - (points[own] - seen).square().sum(1) - costs[own]  # above 0: violated
            worst = excess.topk(min(ADDED, len(own)))
            new = own[worst.indices[worst.values > 1e-6]]
            new = new[~torch.isin(new, against)]
            if not len(new):
                break
            against = torch.cat([against, new])
        lower = min(lower, max(value, float(bounds[rival])))
        trial = _just_across(certifier, planes.pixels, moved, label)
        if trial is not None and float((trial - planes.pixels).norm()) < upper:
            upper, adversarial = float((trial - planes.pixels).norm()), trial
    return Exact(min(lower, upper) * (1 - MARGIN), upper, adversarial)


def _just_across(certifier: Certifier, image: Tensor, nearest: Tensor, label: int) -> Tensor | None:
    """The first broken image (N,) on the way from ``image`` through ``nearest``; None if there is none nearby."""

    def at(push: float) -> Tensor:
        return (image + push * (nearest - image)).clamp(0, 1)

    safe = 0.9
    for push in PUSHES:
        if certifier.broken(at(push), label):
            for _ in range(10):
                middle = (safe + push) / 2
                safe, push = (safe, middle) if certifier.broken(at(middle), label) else (middle, push)
            return at(push)
        safe = push
    return None
