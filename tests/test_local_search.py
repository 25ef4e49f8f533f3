"""Local search: adversarials that lie aside of the way that gradients show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from absynth.attacks.base import Goal, Problem
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.local_search import LocalSearch
from absynth.attacks.ramp_projection import RampProjection
from absynth.attacks.search import Best
from absynth.errors import InputError
from absynth.norms import L0, L1, L2, LINF, Norm
from absynth.responses import Ramp
from attack_models import images_near, prototypes

EDGE = 0.25
MODEL = prototypes()


def jumps(images: Tensor) -> Tensor:
    """The first pixel 0.25 above 0.5 makes an adversarial; 0.18 do where the second pixel, which has no gradient, is a
    trifle brighter. (B,1,4,4) -> (B,2)."""
    flat = images.flatten(1)
    aside = (flat[:, 1] > 0.504) & (flat[:, 0] > 0.68)
    margin = 0.5 + EDGE - flat[:, 0] - torch.where(aside, 0.07, 0.0)
    return torch.stack([margin, torch.zeros_like(margin)], dim=1)


@pytest.mark.parametrize("norm", [L2, LINF], ids=str)
def test_it_finds_what_lies_aside_of_where_gradients_lead(norm: Norm) -> None:
    images, goal = torch.full((4, 1, 4, 4), 0.5), Goal.untargeted(torch.zeros(4, dtype=torch.int64))
    seeds = torch.arange(4)
    straight = BoundaryProjection(norm)(jumps, images, goal, seeds)
    assert (norm.distance(straight.images, images) > EDGE - 1e-4).all()
    aside = LocalSearch(norm)(jumps, images, goal, seeds)
    assert aside.found.all() and goal.met(jumps(aside.images)).all()
    distance = norm.distance(aside.images, images)
    assert (distance < 0.9 * EDGE).all() and (distance >= 0.18).all()


@pytest.mark.parametrize("norm", [L2, LINF], ids=str)
def test_it_is_never_farther_than_where_it_begins_and_a_row_depends_on_its_seed_alone(norm: Norm) -> None:
    images, labels = images_near(MODEL, 6)
    goal, seeds = Goal.untargeted(labels), torch.arange(6)
    begin, end = (attack(MODEL, images, goal, seeds) for attack in (BoundaryProjection(norm), LocalSearch(norm)))
    assert (norm.distance(end.images, images) <= norm.distance(begin.images, images) + 1e-9).all()
    few = LocalSearch(norm, chunk=64)(MODEL, images[2:], goal.rows(torch.arange(2, 6)), seeds[2:])
    torch.testing.assert_close(few.images, end.images[2:], atol=1e-5, rtol=0)


def test_what_is_adversarial_in_one_batch_alone_does_not_cost_the_adversarial_it_began_at() -> None:
    images, goal = torch.full((4, 1, 4, 4), 0.5), Goal.untargeted(torch.zeros(4, dtype=torch.int64))
    fooled = [0]

    def flickers(batch: Tensor) -> Tensor:
        """As ``jumps`` where many images are asked about at once; otherwise the second pixel does not matter."""
        if len(batch) > 4:
            fooled[0] += int((jumps(batch)[:, 0] <= 0).sum())
            return jumps(batch)
        flat = batch.flatten(1).clone()
        flat[:, 1] = 0.5
        return jumps(flat.view_as(batch))

    found = LocalSearch(L2)(flickers, images, goal, torch.arange(4))
    assert fooled[0] and found.found.all()
    torch.testing.assert_close(L2.distance(found.images, images), torch.full((4,), EDGE).double(), atol=1e-3, rtol=0)


def test_where_the_last_answer_is_another_the_adversarial_it_began_at_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = images_near(MODEL, 6)
    goal, seeds = Goal.untargeted(labels), torch.arange(6)

    def misled(_: LocalSearch, problem: Problem, best: Best, todo: Tensor) -> None:
        best.images[todo[::2]] = problem.images[todo[::2]]  # which it took for adversarial while it searched

    monkeypatch.setattr(LocalSearch, "_walk", misled)
    begin, end = (attack(MODEL, images, goal, seeds) for attack in (BoundaryProjection(L2), LocalSearch(L2)))
    assert end.found.all() and torch.equal(begin.images, end.images)


class Ramped:
    """Prototypes behind a ramp, which hides where most pixels lead."""

    def __init__(self) -> None:
        self.response = Ramp(0.3)

    def __call__(self, images: Tensor) -> Tensor:
        return MODEL(self.response(images))


@pytest.mark.parametrize("norm", [L2, LINF], ids=str)
def test_behind_a_ramp_it_begins_where_ramp_projection_ends(norm: Norm) -> None:
    model = Ramped()
    images = images_near(MODEL, 6)[0].round()  # on the flat parts
    goal, seeds = Goal.untargeted(model(images).argmax(1)), torch.arange(6)
    attacks = (BoundaryProjection(norm), RampProjection(norm), LocalSearch(norm, rounds=1))
    plain, ramped, walked = (attack(model, images, goal, seeds) for attack in attacks)
    assert not plain.found.any() and ramped.found.all() and walked.found.all()
    assert (norm.distance(walked.images, images) <= norm.distance(ramped.images, images) + 1e-6).all()


def test_an_image_without_an_adversarial_to_begin_with_is_not_found() -> None:
    def never(images: Tensor) -> Tensor:
        return torch.stack([images.flatten(1).sum(1) * 0 + 1, images.flatten(1).sum(1) * 0], dim=1)

    images = torch.full((2, 1, 4, 4), 0.5)
    result = LocalSearch(L2)(never, images, Goal.untargeted(torch.zeros(2, dtype=torch.int64)), torch.arange(2))
    assert not result.found.any() and torch.equal(result.images, images)


@pytest.mark.parametrize("norm", [L0, L1], ids=str)
def test_norms_it_does_not_know_are_refused(norm: Norm) -> None:
    with pytest.raises(InputError, match=f"knows no {norm}: use l2 or linf"):
        LocalSearch(norm)
