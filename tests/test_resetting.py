"""Resetting pixels one by one, by procedures that run side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import Goal, Problem
from absynth.attacks.queries import CountingClassifier
from absynth.attacks.resetting import reset_pixels
from absynth.attacks.search import run_procedures, starting_points
from absynth.norms import L0
from attack_models import images_near, prototypes

MODEL = prototypes()


def three_images() -> Problem:
    images, labels = images_near(MODEL, 3)
    return Problem(MODEL, images, Goal.untargeted(labels), torch.arange(3), L0)


def test_procedures_in_a_common_batch_end_as_they_do_alone() -> None:
    task = three_images()
    starts = starting_points(task)
    seen: list[int] = []

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return MODEL(images)

    shared = replace(task, classifier=counting)

    def procedures(rows: list[int]) -> list:
        return [reset_pixels(task.images[r], starts.images[r], np.random.default_rng(r)) for r in rows]

    together = run_procedures(shared, procedures([0, 1, 2]), [0, 1, 2], chunk=2)
    assert max(seen) == 2 and sum(seen) > 3
    for row in range(3):
        (alone,) = run_procedures(task, procedures([row]), [row], chunk=512)
        assert torch.equal(together[row], alone)


def test_questions_asked_ahead_of_their_answers_end_at_the_same_image() -> None:
    task = three_images()
    starts, ends, rounds = starting_points(task), {}, {}
    for ahead in (1, 3, 16):
        sizes: list[int] = []

        def counting(images: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(images))
            return MODEL(images)

        procedures = [
            reset_pixels(task.images[r], starts.images[r], np.random.default_rng(r), ahead=ahead) for r in range(3)
        ]
        ends[ahead] = run_procedures(replace(task, classifier=counting), procedures, [0, 1, 2], chunk=512)
        rounds[ahead] = len(sizes)
        assert max(sizes) <= 3 * ahead
    for ahead in (3, 16):
        for here, there in zip(ends[ahead], ends[1], strict=True):
            assert here is not None and there is not None and torch.equal(here, there)
    assert rounds[16] < rounds[3] < rounds[1]


def test_groups_save_queries_against_one_pixel_at_a_time() -> None:
    """256 pixels of which 4 matter: far fewer questions than pixels."""
    clean = torch.zeros(1, 1, 16, 16)

    def needs_four(images: Tensor) -> Tensor:
        held = images.flatten(1)[:, [3, 77, 150, 200]].amin(1)
        return torch.stack([0.5 - held, held - 0.5], dim=1)

    counted = CountingClassifier(needs_four, 1)
    task = Problem(counted, clean, Goal.untargeted(torch.tensor([0])), torch.tensor([0]), L0)
    (result,) = run_procedures(task, [reset_pixels(clean[0], clean[0] + 1, np.random.default_rng(0))], [0], chunk=8)
    assert result is not None and result.flatten().nonzero().squeeze(1).tolist() == [3, 77, 150, 200]
    assert counted.forward.item() < 80
