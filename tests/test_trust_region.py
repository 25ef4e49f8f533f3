"""The step of the Brendel-Bethge attack against a linear program and a general solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from absynth.attacks.brendel_bethge import trust_region_step
from absynth.norms import L1, L2, LINF, Norm

SIZE = 30
WIDE = 100.0  # a radius that restricts nothing


def _task(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Aim, lower and upper bounds, normal, each (1,N) float64, and an offset (1,) that the aim does not reach."""
    draw = torch.Generator().manual_seed(seed)
    x, clean, b = (torch.rand(1, SIZE, generator=draw).double() for _ in range(3))
    b = (b - 0.5) * 2
    aim = clean - x
    reached = (b * aim).sum(1)
    lowest = torch.minimum(-b * x, b * (1 - x)).sum(1)
    return aim, -x, 1 - x, b, reached + 0.4 * (lowest - reached)


def _program(norm: Norm, aim: np.ndarray, low: np.ndarray, high: np.ndarray, b: np.ndarray, c: float) -> float:
    """The least distance to ``aim`` of a step within the bounds and beyond the boundary: a linear program in L1 and
    L-infinity, its extra unknowns the distance of every entry, or of all."""
    extra = SIZE if norm == L1 else 1
    spread = np.eye(SIZE) if norm == L1 else np.ones((SIZE, 1))
    rows = np.block([[np.eye(SIZE), -spread], [-np.eye(SIZE), -spread], [b[None], np.zeros((1, extra))]])
    found = linprog(
        np.r_[np.zeros(SIZE), np.ones(extra)],
        A_ub=rows,
        b_ub=np.r_[aim, -aim, c],
        bounds=[*zip(low, high, strict=True), *[(0, None)] * extra],
    )
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize("norm", [L1, LINF], ids=str)
def test_without_a_radius_the_step_is_the_optimum_of_a_linear_program(norm: Norm) -> None:
    for seed in range(8):
        aim, low, high, b, c = _task(seed)
        delta = trust_region_step(norm, aim, low, high, b, c, WIDE)
        assert ((delta >= low) & (delta <= high)).all() and float((b * delta).sum()) <= float(c + 1e-3 * c.abs() + 1e-6)
        best = _program(norm, *(part[0].numpy() for part in (aim, low, high, b)), float(c))
        assert float(norm.distance(aim, delta)) == pytest.approx(best, abs=2e-3)


def _solved(
    norm: Norm, aim: np.ndarray, low: np.ndarray, high: np.ndarray, b: np.ndarray, c: float, start: np.ndarray, r: float
) -> float:
    """The least distance that SLSQP finds from ``start`` within the radius ``r``. In L1 the distance of every entry is
    an unknown of its own, so that what is minimized is smooth."""
    n = SIZE
    inside = [
        {"type": "ineq", "fun": lambda d: c - b @ d[:n]},
        {"type": "ineq", "fun": lambda d: r**2 - d[:n] @ d[:n]},
    ]
    bounds: list[tuple[float, float | None]] = list(zip(low, high, strict=True))
    if norm == L2:
        found = minimize(lambda d: np.square(d - aim).sum(), start, bounds=bounds, constraints=inside, method="SLSQP")
        return float(np.sqrt(found.fun))
    apart = [{"type": "ineq", "fun": lambda d, sign=sign: d[n:] - sign * (d[:n] - aim)} for sign in (1, -1)]
    first = np.r_[start, np.abs(start - aim) + 1e-3]
    bounds += [(0, None)] * n
    found = minimize(lambda d: d[n:].sum(), first, bounds=bounds, constraints=inside + apart, method="SLSQP")
    return float(found.fun)


@pytest.mark.parametrize("norm", [L1, L2], ids=str)
def test_within_a_radius_no_general_solver_does_better(norm: Norm) -> None:
    for seed in range(3):
        aim, low, high, b, c = _task(seed)
        radius = 0.95 * float(trust_region_step(norm, aim, low, high, b, c, WIDE).norm())
        delta = trust_region_step(norm, aim, low, high, b, c, radius)
        assert float(delta.norm()) <= 1.001 * radius and float((b * delta).sum()) <= float(c + 2e-3 * c.abs())
        parts = [part[0].numpy() for part in (aim, low, high, b)]
        best = _solved(norm, *parts, float(c), delta[0].numpy(), radius)
        assert float(norm.distance(aim, delta)) <= 1.01 * best
