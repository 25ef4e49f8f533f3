"""Can ABS itself be certified? A covering of the latent ball, by branch and bound: ``python benchmarks/cover.py``.

The energy of class c is at least the minimum over cells of: the least squared distance of the image to the interval of
images that the cell can decode to, plus beta/2 times the least ||z||^2 in the cell. Cells are boxes; the interval comes
from propagating center and radius through the folded decoder (interval arithmetic, float64). The cells with the lowest
bounds are split along their longest axis. When the lowest bound of every other class exceeds the energy found for the
true class, the image's label is proven; a certified radius would follow as in the estimate ``lipschitz``.

Prints, for each image, the bounds proven after the given number of cells; how small a cell around a rival's best
latents must be for its bound to exceed the true energy; and how many such cells the ball takes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import absynth
from absynth import data
from absynth.classifiers import ABS


def affine(layer: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a transposed convolution with its batch norm, float64."""
    weight, bias = layer.weight.double(), layer.bias.double()  # type: ignore[union-attr]
    if norm is None:
        return weight, bias
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # type: ignore[union-attr]
    return weight * scale[:, None, None], (bias - norm.running_mean.double()) * scale + norm.bias.double()  # type: ignore[operator]


class Intervals:
    """Cells (P,D) center and radius -> the lowest and highest image (P,N) they can decode to."""

    def __init__(self, decoder: nn.Module) -> None:
        self.layers = [
            (*affine(getattr(decoder, f"conv_{i}"), getattr(decoder, f"bn_{i}", None)), stride)
            for i, stride in enumerate((1, 2, 2, 1))
        ]

    @torch.no_grad()
    def __call__(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = center[:, :, None, None], radius[:, :, None, None]
        for number, (weight, bias, stride) in enumerate(self.layers):
            center = F.conv_transpose2d(center, weight, bias, stride=stride)
            radius = F.conv_transpose2d(radius, weight.abs(), stride=stride)
            low, high = center - radius, center + radius
            low, high = (F.elu(low), F.elu(high)) if number < 3 else (torch.sigmoid(low), torch.sigmoid(high))
            center, radius = (low + high) / 2, (high - low) / 2
        return (center - radius).flatten(1), (center + radius).flatten(1)


def lowest_energy(
    intervals: Intervals, image: Tensor, beta: float, limit: float, cells: int, ball: float = 5.0
) -> float:
    """A proven lower bound of the energy of image (N,): stops above ``limit`` or after ``cells`` cells."""

    def bounds(center: Tensor, radius: Tensor) -> Tensor:
        low, high = intervals(center, radius)
        distance = (torch.maximum(low - image, image - high).clamp(min=0)).square().sum(1)
        nearest = (center.abs() - radius).clamp(min=0).square().sum(1)
        return torch.where(nearest > ball**2, torch.inf, distance + beta / 2 * nearest)

    center = torch.zeros(1, 8, dtype=torch.float64)
    radius = torch.full_like(center, ball)
    heap = [(float(bounds(center, radius)[0]), 0, center[0], radius[0])]
    made = 1
    while heap[0][0] < limit and made < cells:
        chosen = [heapq.heappop(heap) for _ in range(min(64, len(heap)))]
        centers, radii = torch.stack([one[2] for one in chosen]), torch.stack([one[3] for one in chosen])
        axis = radii.argmax(1)
        rows = torch.arange(len(chosen))
        radii[rows, axis] /= 2
        both = []
        for sign in (-1, 1):
            moved = centers.clone()
            moved[rows, axis] += sign * radii[rows, axis]
            both.append(moved)
        centers, radii = torch.cat(both), radii.repeat(2, 1)
        for bound, one, size in zip(bounds(centers, radii).tolist(), centers, radii, strict=True):
            if bound < limit:
                heapq.heappush(heap, (bound, made, one, size))
            made += 1
        if not heap:
            return limit
    return min(heap[0][0], limit)


def needed_radius(intervals: Intervals, latents: Tensor, image: Tensor, limit: float) -> float:
    """Half the side of the largest cube around latents (D,) whose interval bound alone exceeds ``limit``; 0: none."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        lowest, highest = intervals(latents[None], torch.full_like(latents[None], middle))
        bound = float(torch.maximum(lowest - image, image - highest).clamp(min=0).square().sum())
        low, high = (middle, high) if bound > limit else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--cells", type=int, default=5000)
    arguments = parser.parse_args()
    model = absynth.load("abs")
    assert isinstance(model, ABS)
    images, labels = (tensor[: arguments.images] for tensor in data.load("mnist", "test"))
    analysis = model.analyze(images)
    energies = analysis.energies * images[0].numel()
    intervals = [Intervals(decoder) for decoder in model.decoders]
    started, found, proven = time.perf_counter(), [], 0
    for row, label in enumerate(labels.tolist()):
        true = float(energies[row, label])
        bounds = {
            c: lowest_energy(intervals[c], images[row].flatten().double(), model.beta, true, arguments.cells)
            for c in range(len(intervals))
            if c != label
        }
        proven += all(bound >= true for bound in bounds.values())
        sizes = {
            c: needed_radius(intervals[c], analysis.latents[row, c].double(), images[row].flatten().double(), true)
            for c in bounds
        }
        smallest = min(sizes.values())
        found.append(
            {
                "true_energy": true,
                "found": energies[row].tolist(),
                "proven_at_least": bounds,
                "cell_radius_needed": smallest,
                "cells_for_the_cube_of_side_10": (5 / smallest) ** 8 if smallest else None,
            }
        )
    seconds = (time.perf_counter() - started) / len(images)
    result = {"cells": arguments.cells, "proven": proven, "images": len(images), "seconds_an_image": seconds}
    print(json.dumps({**result, "detail": found}, indent=2))


if __name__ == "__main__":
    main()
