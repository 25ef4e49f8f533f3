"""Foolbox through its adapter: seeds, scales and the box are kept, and our attacks are no weaker than its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from absynth.attacks.base import Goal
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.decision import Boundary
from absynth.attacks.foolbox_adapter import Foolbox
from absynth.attacks.gradient import DeepFool, ProjectedGradient
from absynth.attacks.hop_skip_jump import HopSkipJump
from absynth.norms import L1, L2, LINF, NORMS
from attack_models import SIDE, images_near, prototypes, trained_digits

MODEL = prototypes()


def test_foolbox_leaves_the_global_generators_alone() -> None:
    images, labels = images_near(MODEL, 1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    Foolbox(L2, "foolbox-boundary", steps=20)(MODEL, images, Goal.untargeted(labels), torch.arange(1))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_ours_are_no_weaker_than_foolbox() -> None:
    """The same attack on the same network: DeepFool, the Boundary attack, HopSkipJump, PGD at a fixed radius."""
    import foolbox

    network, images, labels = trained_digits()
    images, labels = images[:30], labels[:30]
    theirs = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    goal, seeds = Goal.untargeted(labels), torch.arange(30)

    for norm, other in ((L2, foolbox.attacks.L2DeepFoolAttack), (LINF, foolbox.attacks.LinfDeepFoolAttack)):
        _, clipped, success = other()(theirs, images, labels, epsilons=[None])
        distance = torch.where(success[0], norm.distance(clipped[0], images), torch.inf)
        ours = DeepFool(norm)(network, images, goal, seeds)
        assert norm.distance(ours.images, images).mean() <= distance.mean()

    boundary = Boundary(steps=600)(network, images[:5], goal.rows(seeds[:5]), seeds[:5])
    same = Foolbox(L2, "foolbox-boundary", steps=600)(network, images[:5], goal.rows(seeds[:5]), seeds[:5])
    assert L2.distance(boundary.images, images[:5]).median() <= L2.distance(same.images, images[:5]).median() * 1.05

    for norm in (L2, LINF):
        jumps = HopSkipJump(norm, steps=8)(network, images[:5], goal.rows(seeds[:5]), seeds[:5])
        same = Foolbox(norm, "foolbox-hop-skip-jump", steps=8)(network, images[:5], goal.rows(seeds[:5]), seeds[:5])
        reached = torch.where(same.found, norm.distance(same.images, images[:5]), torch.inf)
        assert jumps.found.all() and norm.distance(jumps.images, images[:5]).median() <= reached.median() * 1.05

    radius = 0.08
    _, _, success = foolbox.attacks.LinfPGD(steps=20, random_start=False)(theirs, images, labels, epsilons=radius)
    ours = ProjectedGradient(LINF, radius=radius, steps=20, relative_step=0.1)(network, images, goal, seeds)
    assert 0 < int(success.sum()) <= int(ours.found.sum())


def test_ead_asks_within_the_box() -> None:
    """Its momentum leaves it where pixels lie at the edges, as those of MNIST do; models refuse such images."""
    model = prototypes()
    torch.manual_seed(0)
    model.prototypes = (torch.rand(3, 1, SIDE, SIDE) > 0.5).float()
    images = (model.prototypes[:2] + 0.3 * torch.rand(2, 1, SIDE, SIDE)).clamp(0, 1)
    beyond = []

    def watched(asked: Tensor) -> Tensor:
        beyond.append(asked.min() < 0 or asked.max() > 1)
        logits: Tensor = model(asked.clamp(0, 1))
        return logits

    attack, goal = Foolbox(L1, "ead", steps=60), Goal.untargeted(torch.arange(2))
    assert attack(watched, images, goal, torch.arange(2)).found.all()
    assert not any(beyond)


@pytest.mark.parametrize("method", ["ddn", "carlini-wagner", "fmn"])
def test_foolbox_attacks_do_not_depend_on_the_scale_of_the_logits(method: str) -> None:
    images, labels = images_near(MODEL, 4)
    attack, goal, seeds = Foolbox(L2, method, steps=60), Goal.untargeted(labels), torch.arange(4)
    as_is, tiny = attack(MODEL, images, goal, seeds), attack(lambda x: 1e-3 * MODEL(x), images, goal, seeds)
    assert as_is.found.all() and tiny.found.all()
    torch.testing.assert_close(L2.distance(tiny.images, images), L2.distance(as_is.images, images), atol=0, rtol=0.01)


@pytest.mark.parametrize("norm", NORMS.values(), ids=str)
def test_boundary_projection_is_among_the_strongest(norm) -> None:
    network, images, labels = trained_digits()
    images, labels, seeds = images[:20], labels[:20], torch.arange(20)
    goal = Goal.untargeted(labels)
    ours = norm.distance(BoundaryProjection(norm)(network, images, goal, seeds).images, images)
    other = Foolbox(norm, "fmn", steps=100)(network, images, goal, seeds)
    theirs = torch.where(other.found, norm.distance(other.images, images), torch.inf)
    assert ours.median() <= theirs.median() * 1.02
