"""Resetting the pixels of an adversarial to their clean values, until no single one can be."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.queries import can_follow
from absynth.attacks.search import Procedure, run_procedures

#: Questions about one image at once where a classifier searches: it takes 51 ms for one of them, 10 for each of 16.
AHEAD = 16


def reset_pixels(
    clean: Tensor, start: Tensor, rng: np.random.Generator, ahead: int = 1
) -> Generator[Tensor, np.ndarray, Tensor]:
    """Reset pixels of ``start`` (C,H,W), adversarial, to ``clean`` until no single one can be; yields up to ``ahead``
    candidates a time, and ends the same for any number of them."""
    current = start.clone(memory_format=torch.contiguous_format)
    flat, target = current.view(-1), clean.reshape(-1)
    left = rng.permutation((flat != target).nonzero().squeeze(1).numpy())
    group = len(left) // 2
    while group > 1:
        kept, parts = [], np.array_split(left, -(-len(left) // group))
        while parts:
            refused = yield from _first_that_can_be_reset(current, target, parts, ahead)
            kept += parts[:refused]
            parts = parts[refused + 1 :]
        left = rng.permutation(np.concatenate(kept)) if kept else left[:0]
        group = min(group, len(left)) // 2
    queue, untried = list(left[:, None]), len(left)  # untried since a pixel was last reset
    while untried:
        refused = yield from _first_that_can_be_reset(current, target, queue[:untried], ahead)
        if refused == untried:
            break
        queue = queue[refused + 1 :] + queue[:refused]
        untried = len(queue)
    return current


def _first_that_can_be_reset(
    current: Tensor, target: Tensor, parts: list[np.ndarray], ahead: int
) -> Generator[Tensor, np.ndarray, int]:
    """Reset in ``current`` (C,H,W) the first of the ``parts``, pixels of the flat image, that leaves it adversarial;
    yields ``ahead`` candidates a time. Returns how many were refused before it."""
    for begin in range(0, len(parts), ahead):
        some = parts[begin : begin + ahead]
        candidates = current.repeat(len(some), 1, 1, 1)
        for candidate, part in zip(candidates, some, strict=True):
            candidate.view(-1)[part] = target[part]
        margins = yield candidates.clone()
        met = (margins <= 0).nonzero()[0]  # no answer, NaN, is no adversarial
        if len(met):
            current.copy_(candidates[met[0]])
            return begin + int(met[0])
    return len(parts)


def take_back(problem: Problem, proposals: Proposals, chunk: int = 512) -> Proposals:
    """Each proposal with every pixel reset that can be: what is left cannot be made sparser by one pixel. The order in
    which they are tried is the same for every image and seed."""
    ahead = AHEAD if can_follow(problem.classifier) else 1  # others are asked as little as can be
    clean, owner = problem.images.cpu(), proposals.found.nonzero().squeeze(1).tolist()
    procedures: list[Procedure] = [
        reset_pixels(clean[row], proposals.images[row].cpu(), np.random.default_rng(0), ahead) for row in owner
    ]
    images = proposals.images.clone()
    for row, result in zip(owner, run_procedures(problem, procedures, owner, chunk), strict=True):
        assert result is not None
        images[row] = result.to(images)
    return Proposals(images, proposals.found)
