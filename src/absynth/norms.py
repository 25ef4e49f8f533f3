"""The four norms as values: distance, projection onto a ball, steepest direction.

Everything an attack needs to know about a norm is here: one projected-gradient loop serves them all.
Shapes: a perturbation is (B, ...) with any number of trailing dimensions; a radius is a number or (B,), in the units of
[0,1]. L0 counts entries that differ at all (in a color image a pixel counts once a channel); its radius is a number of
entries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.errors import unknown_name


class Norm(ABC):
    """A norm on perturbations. The instances ``L0``, ``L1``, ``L2`` and ``LINF`` are the only ones."""

    name: str

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,) in float64 between the stored images ``first`` and ``second`` (B, ...)."""
        return self.size(first.double() - second.double())

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """The norm (B,) of perturbations (B, ...), in their own precision."""

    @abstractmethod
    def project(self, delta: Tensor, radius: Tensor | float) -> Tensor:
        """The nearest point, in L2, of the ball of ``radius``; a point inside comes back unchanged, signs are kept."""

    @abstractmethod
    def steepest(self, gradient: Tensor, radius: Tensor | float) -> Tensor:
        """The perturbation of size ``radius`` along which ``gradient`` promises the largest increase (0 where it is 0).

        L0 changes ``radius`` entries by one each, L1 a single entry by all of ``radius``.
        """

    @abstractmethod
    def largest(self, images: Tensor) -> float:
        """The size of the largest perturbation that fits into [0,1]: a bound on every search."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _L0(Norm):
    name: str = "l0"

    def size(self, delta: Tensor) -> Tensor:
        return (delta != 0).flatten(1).sum(1).to(delta.dtype)

    def project(self, delta: Tensor, radius: Tensor | float) -> Tensor:
        return torch.where(_largest_entries(delta, radius), delta, torch.zeros_like(delta))

    def steepest(self, gradient: Tensor, radius: Tensor | float) -> Tensor:
        return torch.where(_largest_entries(gradient, radius), gradient.sign(), torch.zeros_like(gradient))

    def largest(self, images: Tensor) -> float:
        return float(images[0].numel())


@dataclass(frozen=True)
class _L1(Norm):
    name: str = "l1"

    def size(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).sum(1)

    def project(self, delta: Tensor, radius: Tensor | float) -> Tensor:
        """Exact, by sorting: soft-thresholding with the one threshold that lands on the sphere (Duchi et al. 2008)."""
        limit = _column(radius, delta)
        size = delta.flatten(1).abs().double()  # (B, ...) -> (B,N)
        ordered = size.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - limit.double()
        count = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=torch.float64)
        kept = (ordered * count > excess).sum(1, keepdim=True).clamp(min=1)
        threshold = excess.gather(1, kept - 1) / kept
        shrunk = (size - threshold).clamp(min=0).to(delta.dtype) * delta.flatten(1).sign()
        # A size that rounding leaves above the radius counts as inside, or projecting twice would differ from once.
        inside = size.sum(1, keepdim=True) <= limit.double() * (1 + 1e-6)
        return torch.where(inside, delta.flatten(1), shrunk).view_as(delta)

    def steepest(self, gradient: Tensor, radius: Tensor | float) -> Tensor:
        flat = gradient.flatten(1)
        top = flat.abs().argmax(1, keepdim=True)
        step = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
        return (step * _column(radius, gradient)).view_as(gradient)

    def largest(self, images: Tensor) -> float:
        return float(images[0].numel())


@dataclass(frozen=True)
class _L2(Norm):
    name: str = "l2"

    def size(self, delta: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return size

    def project(self, delta: Tensor, radius: Tensor | float) -> Tensor:
        size = delta.flatten(1).double().norm(dim=1, keepdim=True)
        limit = _column(radius, delta).double()
        scale = torch.where(size <= limit * (1 + 1e-6), torch.ones_like(size), limit / size.clamp(min=1e-300))
        return (delta.flatten(1) * scale.to(delta.dtype)).view_as(delta)

    def steepest(self, gradient: Tensor, radius: Tensor | float) -> Tensor:
        # Scaled by the largest entry first: the square of a gradient of 1e-30 is 0 in float32.
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=1e-38)
        unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
        step: Tensor = (unit * _column(radius, gradient)).view_as(gradient)
        return step

    def largest(self, images: Tensor) -> float:
        return math.sqrt(images[0].numel())


@dataclass(frozen=True)
class _LInf(Norm):
    name: str = "linf"

    def size(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)

    def project(self, delta: Tensor, radius: Tensor | float) -> Tensor:
        limit = _column(radius, delta)
        return delta.flatten(1).clamp(-limit, limit).view_as(delta)

    def steepest(self, gradient: Tensor, radius: Tensor | float) -> Tensor:
        return (gradient.flatten(1).sign() * _column(radius, gradient)).view_as(gradient)

    def largest(self, images: Tensor) -> float:
        return 1.0


L0: Norm = _L0()
L1: Norm = _L1()
L2: Norm = _L2()
LINF: Norm = _LInf()
NORMS = {norm.name: norm for norm in (L0, L1, L2, LINF)}


def listed(*given: str) -> tuple[str, ...]:
    """The names of norms as ``NORMS`` spells them, from names in any case, of which several may stand in one text,
    separated by commas. Unknown ones stay, for ``parse`` to refuse."""
    return tuple(name.strip().lower() for text in given for name in text.split(","))


def parse(name: str) -> Norm:
    """The norm called "l0", "l1", "l2" or "linf", in any case. Raises InputError for any other name."""
    if name.lower() not in NORMS:
        raise unknown_name("norm", name, NORMS)
    return NORMS[name.lower()]


def _column(radius: Tensor | float, delta: Tensor) -> Tensor:
    """A number or (B,) as (B,1) beside a flattened perturbation."""
    if not isinstance(radius, Tensor):
        return delta.new_full((len(delta), 1), radius)  # without a copy to the device, which would wait for it
    column = radius.to(device=delta.device, dtype=delta.dtype)
    return column.expand(len(delta)).unsqueeze(1)  # () or (B,) -> (B,1)


def _largest_entries(values: Tensor, count: Tensor | float) -> Tensor:
    """Mask of the ``count`` entries of largest magnitude in each row; of equal ones the earlier goes first."""
    flat = values.flatten(1).abs()
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (rank + 1 <= _column(count, flat)).view_as(values)
