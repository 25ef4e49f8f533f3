"""Norms: the properties that define a projection and a steepest direction."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

from absynth.errors import InputError
from absynth.norms import L0, L1, L2, LINF, NORMS, Norm, parse

ALL = pytest.mark.parametrize("norm", NORMS.values(), ids=str)


def perturbations(rows: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-3, 1, rows).view(-1, 1, 1, 1)
    return torch.randn(rows, 1, 4, 5, generator=generator) * scale


def test_parse_knows_the_names_and_proposes_the_nearest() -> None:
    assert [parse(name) for name in ("l0", "L1", "l2", "Linf")] == [L0, L1, L2, LINF]
    with pytest.raises(InputError, match=r"unknown norm 'l3'.*known: l0, l1, l2, linf"):
        parse("l3")


def test_distances_by_hand() -> None:
    first = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    second = torch.tensor([[[[0.5, 0.0], [0.25, 0.0]]]])
    assert L0.distance(first, second).tolist() == [2.0]
    assert L1.distance(first, second).tolist() == [1.25]
    assert L2.distance(first, second).tolist() == [0.8125**0.5]
    assert LINF.distance(first, second).tolist() == [0.75]
    assert L2.distance(first, second).dtype == torch.float64


@ALL
@pytest.mark.parametrize("radius", [0.0, 0.01, 1.0, 3.0])
def test_projection_is_idempotent_keeps_signs_and_lands_in_the_ball(norm: Norm, radius: float) -> None:
    delta = perturbations()
    once = norm.project(delta, radius)
    assert (norm.size(once.double()) <= radius * (1 + 1e-5)).all()
    assert torch.equal(norm.project(once, radius), once)
    assert ((once == 0) | (once.sign() == delta.sign())).all()
    inside = norm.size(delta) <= radius
    assert torch.equal(once[inside], delta[inside])
    outside = norm.size(delta.double()) > radius * 1.001
    if norm is not L0:
        torch.testing.assert_close(norm.size(once)[outside], torch.full((int(outside.sum()),), radius))


@ALL
def test_projection_takes_one_radius_a_row(norm: Norm) -> None:
    delta = perturbations(3)
    radii = torch.tensor([0.5, 1.0, 2.0])
    together = norm.project(delta, radii)
    for row, radius in enumerate(radii.tolist()):
        assert torch.equal(together[row : row + 1], norm.project(delta[row : row + 1], radius))


def test_l1_projection_is_the_nearest_point() -> None:
    """Against a general solver, in the orthant of the point (signs are kept)."""
    delta = perturbations(40)[20::5, :, :2, :3] * 3
    projected = L1.project(delta, 1.0)
    for point, ours in zip(delta.flatten(1).double().numpy(), projected.flatten(1).double().numpy(), strict=True):
        size = abs(point)
        found = minimize(
            lambda x, size=size: ((x - size) ** 2).sum(),
            x0=[1 / len(size)] * len(size),
            jac=lambda x, size=size: 2 * (x - size),
            bounds=[(0, None)] * len(size),
            constraints=[{"type": "ineq", "fun": lambda x: 1 - x.sum()}],
            options={"ftol": 1e-12},
        )
        assert ((abs(ours) - size) ** 2).sum() <= found.fun + 1e-6


@ALL
def test_steepest_gains_the_dual_norm(norm: Norm) -> None:
    gradient = perturbations()
    step = norm.steepest(gradient, 2.0)
    gain = (gradient * step).flatten(1).sum(1)
    size = gradient.flatten(1).abs()
    best = {L0: size.topk(2).values.sum(1), L1: 2 * size.amax(1), L2: 2 * size.norm(dim=1), LINF: 2 * size.sum(1)}[norm]
    torch.testing.assert_close(gain, best)
    torch.testing.assert_close(norm.size(step), torch.full((len(step),), 2.0))


@ALL
def test_steepest_of_nothing_is_nothing_and_tiny_gradients_still_point(norm: Norm) -> None:
    assert (norm.steepest(torch.zeros(2, 1, 3, 3), 1.0) == 0).logical_or(torch.tensor(norm is L0)).all()
    tiny = torch.full((1, 1, 2, 2), 1e-30)
    torch.testing.assert_close(norm.size(norm.steepest(tiny, 1.0)), torch.ones(1))
