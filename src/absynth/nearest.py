"""The nearest of many stored points in each class: by one matrix product, then exactly.

Minimizing ||x - p||^2 + K over points p with costs K is maximizing x . p - (||p||^2 + K) / 2. The product is taken in
float32, and the few best of each class are compared again in float64, so that the answer does not depend on the batch.

Shapes: B queries, M points sorted by class, N values a point, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 4  # of each class, compared exactly where the product does not decide


def offsets_of(points: Tensor, costs: Tensor | None = None) -> Tensor:
    """(||p||^2 + K) / 2 of points (M,N) with costs (M,), none: 0. (M,) in the type of the points."""
    squares = points.double().square().sum(1)
    return ((squares if costs is None else squares + costs.double()) / 2).to(points.dtype)


@torch.no_grad()
def nearest_of_each_class(queries: Tensor, points: Tensor, offsets: Tensor, counts: Sequence[int]) -> Tensor:
    """Queries (B,N) -> indices (B,K) of the point with the smallest ||x - p||^2 + K of each class.

    ``counts`` (K,) are the points of each class, in their order. Of equals the first.
    """
    scores = torch.addmm(offsets, queries, points.T, alpha=-1)  # (B,M): half of what is minimized, up to ||x||^2 / 2
    found, start = [], 0
    for class_scores in torch.split(scores, list(counts), dim=1):
        best = class_scores.topk(min(KEPT, class_scores.shape[1]), largest=False)
        found.append(exactly_nearest(queries, points, offsets, best.values, best.indices + start))
        start += class_scores.shape[1]
    return torch.stack(found, dim=1)


def exactly_nearest(queries: Tensor, points: Tensor, offsets: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
    """Which of the points ``indices`` (B,I), with these ``scores`` (B,I) in ascending order, is nearest to each of the
    queries (B,N): (B,). Compared in float64 where rounding may have decided; of equals the first point."""
    chosen = indices[:, 0].clone()
    close = scores <= scores[:, :1] + 2 * score_error(points, offsets)  # (B,I)
    rows = (close.sum(1) > 1).nonzero()[:, 0]
    if len(rows):
        place, column = close[rows].nonzero(as_tuple=True)  # pairs: one of the rows, one of its points
        pairs = indices[rows[place], column]
        apart = queries[rows[place]].double() - points[pairs].double()
        extra = 2 * offsets[pairs].double() - points[pairs].double().square().sum(1)  # the costs again
        exact = apart.new_full((len(rows), indices.shape[1]), torch.inf)
        exact[place, column] = apart.square().sum(1) + extra
        tied = exact == exact.amin(1, keepdim=True)
        chosen[rows] = indices[rows].masked_fill(~tied, len(points)).amin(1)
    return chosen


def differences(queries: Tensor, points: Tensor, indices: Tensor) -> Tensor:
    """Queries (B,N), indices (B,I) of points -> queries minus points (B,I,N) in float64, so that no digit is lost."""
    return queries[:, None].double() - points[indices].double()


def score_error(points: Tensor, offsets: Tensor) -> float:
    """By how much a score, half of what is minimized, errs in float32 at most: as for ``rounding_slack``, for any
    points in [0,1], whose ||p||_1 is at most N."""
    return relative_error(points.shape[1] + 2) * (float(offsets.abs().max()) + points.shape[1])


def rounding_slack(points: Tensor, offsets: Tensor) -> float:
    """By how much ||x - p||^2 + K of the point that ``nearest_of_each_class`` returns may exceed the smallest one.

    For images x in [0,1] and points in [0,1], with n terms and unit roundoff u = 2^-24, a float32 score, summed in any
    order, errs by at most n u / (1 - n u) times the sum of its terms' magnitudes (Higham 2002, section 3.1), which is
    at most the offset plus ||p||_1. The best by score is then within twice that error of the best, in half units.
    """
    return 4 * relative_error(points.shape[1] + 2) * float((offsets.abs() + points.abs().sum(1)).max())


def relative_error(terms: int) -> float:
    """n u / (1 - n u) for n terms in float32: the most by which their sum errs, relative to the sum of magnitudes."""
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit)
