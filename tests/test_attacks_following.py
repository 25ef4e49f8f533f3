"""Attacks on models that can start from what they found for an image close by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from absynth.analysis import Found
from absynth.attacks.base import Goal
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.queries import CountingClassifier, Following
from absynth.norms import L2
from attack_models import SIDE, images_near, prototypes

MODEL = prototypes()


class Remembering:
    """A model that can start from its last answer, which it then gives too early for an adversarial: by ``error``."""

    def __init__(self, model: Callable[[Tensor], Tensor], error: float) -> None:
        self.model, self.error, self.followed, self.asked = model, error, 0, 0
        self.before: list[Tensor | None] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return self.model(images)

    def follow(self, images: Tensor, before: Found | None) -> tuple[Tensor, Found]:
        self.followed += len(images)
        self.before.append(None if before is None else before.energies[:, 0])
        logits = self.model(images)
        top = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
        seen = images.detach().flatten(1)[:, :1].clone()  # (n,1)
        return logits - self.error * top, Found(seen, seen[:, None], seen[:, None], seen > 2)


@pytest.mark.parametrize("error", [0.0, 0.02])
def test_an_attack_on_a_model_that_remembers_confirms_its_hits_cold(error: float) -> None:
    images, labels = images_near(MODEL, 6)
    goal, seeds = Goal.untargeted(labels), torch.arange(6)
    model = Remembering(MODEL, error)
    counted = CountingClassifier(model, 6)
    warm, cold = (
        BoundaryProjection(L2)(counted, images, goal, seeds),
        BoundaryProjection(L2)(MODEL, images, goal, seeds),
    )
    assert model.followed > 4 * model.asked / 5 and int(counted.forward.sum()) == model.followed + model.asked
    assert warm.found.all() and goal.met(MODEL(warm.images)).all()
    ratio = L2.distance(warm.images, images) / L2.distance(cold.images, images)
    assert (ratio > 1 - 1e-3).all() and (ratio < 1.001 + error).all()


def test_an_image_on_which_a_model_remembers_wrongly_is_searched_cold() -> None:
    images, labels = images_near(MODEL, 6)
    goal, seeds = Goal.untargeted(labels), torch.arange(6)
    misled, cold = (BoundaryProjection(L2)(one, images, goal, seeds) for one in (Remembering(MODEL, 1e6), MODEL))
    assert misled.found.all()
    torch.testing.assert_close(L2.distance(misled.images, images), L2.distance(cold.images, images), atol=1e-4, rtol=0)


def test_each_image_is_followed_from_its_own_last_answer() -> None:
    model = Remembering(MODEL, 0.0)
    following = Following(CountingClassifier(model, 5), 5)
    tint = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    images = tint.view(5, 1, 1, 1).expand(5, 1, SIDE, SIDE)
    following(images)
    some = following.select(torch.tensor([4, 1, 2]))
    some(images[[4, 1, 2]] + 0.05)
    some.select(torch.tensor([2, 0]))(images[[2, 4]])
    following(images)
    expected = [None, [0.5, 0.2, 0.3], [0.35, 0.55], [0.1, 0.25, 0.3, 0.4, 0.5]]
    for before, values in zip(model.before, expected, strict=True):
        assert before is None if values is None else torch.allclose(before, torch.tensor(values))
