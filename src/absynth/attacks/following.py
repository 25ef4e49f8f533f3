"""Attacks on a classifier that can start its own search from its last answers, as ABS can: faster, and confirmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.queries import Following, can_follow

#: Where a hit that was followed to does not hold, it is looked for so many times as far from the clean image.
FARTHER = (1.0, 1.001, 1.003, 1.01, 1.03, 1.1, 1.3)


def followed(problem: Problem) -> Problem:
    """The same problem for an attack that moves every image in small steps: a classifier that searches starts from what
    it found for the image's last position. Its hits have to be confirmed by the problem itself."""
    if not can_follow(problem.classifier):
        return problem
    return replace(problem, classifier=Following(problem.classifier, len(problem)))


def confirmed(problem: Problem, said: Proposals) -> Proposals:
    """What the classifier, asked anew, says of the images that it is ``said`` to call adversarial: where it disagrees,
    the same a little farther from the clean image, or not found."""
    images, found = problem.images.clone(), torch.zeros_like(said.found)
    todo = said.found.nonzero()[:, 0]
    asked = torch.full_like(images, torch.nan)
    for share in FARTHER:
        clean, far = problem.images[todo], said.images[todo]
        candidates = far if share == 1 else (clean + share * (far - clean)).clamp(0, 1)
        moved = (candidates != asked[todo]).flatten(1).any(1)  # black and white pixels go no farther
        todo, candidates = todo[moved], candidates[moved]
        if not len(todo):
            break
        asked[todo] = candidates
        met = problem.rows(todo).met(candidates)
        images[todo[met]], found[todo[met]] = candidates[met], True
        todo = todo[~met]
    return Proposals(images, found)


def or_else(problem: Problem, proposals: Proposals, search: Callable[[Problem], Proposals]) -> Proposals:
    """The proposals, and what another ``search`` finds for the images that have none."""
    missing = (~proposals.found).nonzero()[:, 0]
    if not len(missing):
        return proposals
    others = search(problem.rows(missing))
    images, found = proposals.images.clone(), proposals.found.clone()
    images[missing], found[missing] = others.images, others.found
    return Proposals(images, found)


def margin_afresh(problem: Problem, images: Tensor) -> Tensor:
    """The margins at ``images`` (B,C,H,W), asked cold even where the problem is followed: (B,)."""
    if isinstance(problem.classifier, Following):
        problem = replace(problem, classifier=problem.classifier.afresh)
    return problem.margin(images)


def met_afresh(problem: Problem, images: Tensor) -> Tensor:
    """Whether the goal is met at ``images`` (B,C,H,W), asked cold even where the problem is followed: (B,) bool."""
    return margin_afresh(problem, images) <= 0
