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

**Floating point.** Prototypes are screened in float32, with a bound on its rounding taken off (Higham 2002, section
3.1; tensor cores that round products to fewer bits must be off, as is PyTorch's default); what decides is computed in
float64 from the stored float32 image and prototypes, and the result is lowered by ``MARGIN`` of itself. The deployed
classifier rounds too: ``Prototypes.slack`` bounds by how much it may misjudge a difference of two f, and b is lowered
by half of that. The certificate is for the prototypes as this machine decoded them.

**Through a ramp.** Where the classifier compares a response t(x) with its prototypes (``Prototypes.response``), (1)
holds with t(x + d) - t(x) for d and t(x) for x. What a pixel gains by a move is then a known function of the move,
flat, linear, flat, and the least norms follow: exact in L0 and L-infinity, lower bounds in L2 and L1 (``least``).

Shapes: M prototypes, N pixels, R rivals, T prototypes of the true class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from absynth.checks import check_images
from absynth.errors import InputError
from absynth.least import LEAST, MARGIN
from absynth.nearest import relative_error
from absynth.norms import listed
from absynth.planes import Planes, Prototypes, View, gaining, smallest_radius, weighted_squares
from absynth.threads import side_by_side

METHOD = "bisector"


TOGETHER = 8  # images whose products with all prototypes are taken at once


@runtime_checkable
class HasPrototypes(Protocol):
    """A classifier that decides by its nearest prototype, and so can be certified."""

    def prototypes(self) -> Prototypes:
        """The prototypes, their costs and labels."""


def check_norms(norms: Iterable[str]) -> None:
    """Raise InputError for a norm that has no certificates."""
    for norm in norms:
        if norm not in LEAST:
            raise InputError(f"norm is {norm!r}; certificates are for {', '.join(LEAST)}: choose among these")


def check_model(model: object) -> None:
    """Raise InputError for a model that has no certificates."""
    if not isinstance(model, HasPrototypes):
        raise InputError(
            f"{type(model).__name__} has no certificates: only classifiers by the nearest prototype have them, "
            "prototype-abs, saturating-prototype-abs and nearest-neighbor; the paper's bounds of abs and binary-abs, "
            "which guarantee nothing, are what --estimates gives"
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
        # by how much float32 products of an image or a prototype with a prototype may err, in any order of summation
        largest = float((self.squares + prototypes.costs + 2 * prototypes.points.abs().sum(1)).max())
        self.error = relative_error(prototypes.points.shape[1] + 4) * 2 * largest
        order = prototypes.labels
        if bool((order[1:] < order[:-1]).any()):
            raise InputError("the prototypes are not sorted by label: sort points, costs and labels together")

    def radii(self, images: Tensor, labels: Tensor, norms: Iterable[str]) -> dict[str, Tensor]:
        """As ``certified_radii``."""
        wanted = listed(*norms)
        check_norms(wanted)
        check_images(images, channels=images.shape[1] if images.ndim == 4 else 1, size=None)
        if images[0].numel() != self.prototypes.points.shape[1]:
            raise InputError(
                f"images have {images[0].numel()} values, the prototypes {self.prototypes.points.shape[1]}: give "
                "images of the size the model was made for"
            )
        found: list[dict[str, float]] = []
        for part, given in zip(images.flatten(1).split(TOGETHER), labels.split(TOGETHER), strict=True):
            planes = self._planes(part, given, "linf" in wanted)
            found += side_by_side(lambda one: self._radii(one, wanted), planes)
        return {norm: torch.tensor([one[norm] for one in found], dtype=torch.float64) for norm in wanted}

    @torch.no_grad()
    def _radii(self, planes: Planes, norms: tuple[str, ...]) -> dict[str, float]:
        """The radii of one image."""
        radii = {}
        for norm in norms:
            radius = smallest_radius(planes, norm, self.joint if norm == "l2" else 0)
            radii[norm] = radius if norm == "l0" else radius * (1 - MARGIN)
        return radii

    def planes(self, image: Tensor, label: int) -> Planes:
        """The half-spaces (1) of one image (N,). Raises InputError for a label that no prototype has."""
        return self._planes(image[None], torch.tensor([label]), False)[0]

    @torch.no_grad()
    def _planes(self, images: Tensor, labels: Tensor, linf: bool) -> list[Planes]:
        """The half-spaces (1) of images (B,N): what takes a pass over all prototypes is done for all images in one.
        ``linf``: with what bounds in L-infinity need."""
        points, response = self.prototypes.points, self.prototypes.response
        views = [View.of(image, response) for image in images]
        seen = torch.stack([view.seen for view in views])  # (B,N)
        fixed = self.squares + self.prototypes.costs  # (M,): energies up to ||x||^2 - 2 x . p
        energies = fixed[:, None] - 2 * (points @ seen.T)  # (M,B)
        own = [self._nearest(column, int(label)) for column, label in zip(energies.T, labels, strict=True)]
        # the unbounded L2 distance to every bisecting plane tells which p of its own class to hold against a rival;
        # through a ramp each pixel counts by what it can gain for its way
        weights = None
        if response is not None:
            weights = torch.stack([torch.maximum(view.rise, view.fall).square() for view in views])  # (B,N)
        ours = [points[some] if weights is None else points[some] * weights[n] for n, some in enumerate(own)]
        sizes = [len(some) for some in own]
        products = (points @ torch.cat(ours).T).split(sizes, dim=1)  # B x (M,T)
        squares = None if weights is None else weighted_squares(points, weights)  # (M,B)
        gained: Sequence[Tensor] = []
        if linf:
            pairs = [gaining(points[some], view.rise, view.fall) for some, view in zip(own, views, strict=True)]
            sums = (points @ torch.cat([pair[0] for pair in pairs]).T).split(sizes, dim=1)
            gained = [one + pair[1] for one, pair in zip(sums, pairs, strict=True)]
        found = []
        for n, view in enumerate(views):
            counted = self.squares if squares is None else squares[:, n]
            rounding = self.error * (1 if weights is None else float(weights[n].max()))
            apart = (counted[:, None] + counted[own[n]] - 2 * products[n]).clamp_(min=0)
            apart = apart.add_(rounding).sqrt_()  # at least the distance
            thresholds = energies[:, n, None] - (energies[own[n], n] + self.prototypes.slack + self.error)
            thresholds /= 2  # (M,T), at most b
            promising = thresholds / apart  # (M,T)
            distance, first = promising.max(1)
            threshold = thresholds.gather(1, first[:, None])[:, 0]
            distance[self.prototypes.labels == labels[n]] = torch.inf  # the true class's own claim nothing
            most = gained[n].gather(1, first[:, None])[:, 0] if linf else None
            found.append(
                Planes(
                    self.prototypes, view, own[n], promising, self.tried, first, threshold, distance, self.error, most
                )
            )
        return found

    def _nearest(self, energies: Tensor, label: int) -> Tensor:
        """The prototypes (T,) of this class with the lowest energies (M,)."""
        labels = self.prototypes.labels
        first, last = torch.searchsorted(labels, torch.tensor([label, label + 1], device=labels.device)).tolist()
        if first == last:
            raise InputError(f"label is {label}, of which there is no prototype: give labels of the model's classes")
        nearest: Tensor = first + energies[first:last].topk(min(self.near, last - first), largest=False).indices
        return nearest

    def broken(self, image: Tensor, label: int) -> bool:
        """Whether an image (N,), float64, is nearer to a prototype of another class; a tie is broken."""
        points, costs = self.prototypes.points.double(), self.prototypes.costs.double()
        energies = (points - self.prototypes.see(image)).square().sum(1) + costs
        own = self.prototypes.labels == label
        return bool(energies[~own].min() <= energies[own].min())
