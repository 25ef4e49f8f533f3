"""The box-constrained projection onto a half-space, against general solvers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from absynth.attacks.projection import onto_halfspace
from absynth.norms import L0, L1, L2, LINF, NORMS, Norm

ALL = pytest.mark.parametrize("norm", NORMS.values(), ids=str)


def cases(count: int = 12, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, gradients (some entries 0) and margins, from easily reached to nearly out of reach."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 1, 1, size, generator=generator)
    images[:, :, :, 0] = images[:, :, :, 0].round()  # pixels at an edge of the box
    gradient = torch.randn(count, 1, 1, size, generator=generator)
    gradient[::3, :, :, 1] = 0
    room = torch.where(gradient < 0, 1 - images, images)
    most = (gradient.abs() * room).flatten(1).sum(1)
    return images, gradient, most * torch.linspace(0.05, 0.97, count)


def by_solver(norm: Norm, x: np.ndarray, g: np.ndarray, margin: float) -> float:
    size = len(x)
    if norm == L0:
        room = np.where(g < 0, 1 - x, x)
        return next(n for n in range(1, size + 1) for s in combinations(abs(g) * room, n) if sum(s) >= margin - 1e-9)
    if norm == L2:
        found = minimize(
            lambda d: d @ d,
            np.where(g < 0, 1 - x, -x),
            jac=lambda d: 2 * d,
            bounds=list(zip(-x, 1 - x, strict=True)),
            constraints=[{"type": "ineq", "fun": lambda d: -margin - g @ d, "jac": lambda d: -g}],
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return float(np.sqrt(found.fun))
    # δ and its size: minimize Σ t (L1) or one t (L∞) with −t ≤ δ ≤ t.
    sizes = size if norm == L1 else 1
    own = np.eye(size) if norm == L1 else np.ones((size, 1))
    rows = np.block([[np.eye(size), -own], [-np.eye(size), -own], [g[None], np.zeros((1, sizes))]])
    bounds = [*zip(-x, 1 - x, strict=True), *[(0, None)] * sizes]
    cost = np.r_[np.zeros(size), np.ones(sizes)]
    return float(linprog(cost, rows, np.r_[np.zeros(2 * size), -margin], bounds=bounds).fun)


@ALL
def test_is_the_smallest_that_reaches_the_half_space(norm: Norm) -> None:
    images, gradient, margin = cases()
    delta, reached = onto_halfspace(norm, images, gradient, margin)
    assert reached.all()
    moved = images.double() + delta.double()
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    assert ((gradient.double() * delta).flatten(1).sum(1) + margin <= 1e-5).all()
    for row in range(len(images)):
        x, g = images[row].double().numpy().ravel(), gradient[row].double().numpy().ravel()
        best = by_solver(norm, x, g, float(margin[row]))
        assert float(norm.size(delta[row : row + 1].double())) == pytest.approx(best, rel=1e-4, abs=1e-5)


@ALL
def test_goes_to_the_edges_where_the_half_space_is_out_of_reach(norm: Norm) -> None:
    images, gradient, margin = cases()
    delta, reached = onto_halfspace(norm, images, gradient, 100 + margin)
    assert not reached.any()
    expected = torch.where(gradient < 0, torch.ones_like(images), torch.zeros_like(images))
    torch.testing.assert_close((images + delta)[gradient != 0], expected[gradient != 0])


@ALL
def test_stays_where_it_is_inside_the_half_space(norm: Norm) -> None:
    images, gradient, margin = cases()
    delta, reached = onto_halfspace(norm, images, gradient, -margin)
    assert reached.all()
    assert not delta.any()


@ALL
def test_the_scale_of_the_margin_does_not_matter(norm: Norm) -> None:
    images, gradient, margin = cases()
    plain, _ = onto_halfspace(norm, images, gradient, margin)
    for scale in (1e-20, 1e20):
        scaled, _ = onto_halfspace(norm, images, gradient * scale, margin.double() * scale)
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-4)


def test_no_gradient_moves_nothing() -> None:
    for norm in (L0, L1, L2, LINF):
        delta, reached = onto_halfspace(norm, torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), torch.ones(1))
        assert not delta.any() and not reached.any()
