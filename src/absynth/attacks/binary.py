"""Adversarials of models that threshold their input: pixels moved just across the threshold, all others restored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.wrapping import Wrapping


@dataclass(frozen=True)
class Thresholded(Wrapping):
    """Another attack, its adversarials refined for a model that thresholds its input at ``threshold``.

    Refined images are asked about again; where one no longer fools the model (it looks at more than the thresholded
    image), the unrefined one stays. Source: Schott et al. 2019, section 4.
    """

    threshold: float = 0.5

    mark = "refined"

    def search(self, problem: Problem) -> Proposals:
        return refine(problem, self.attack.search(problem), self.threshold)


def refine(problem: Problem, proposals: Proposals, threshold: float = 0.5) -> Proposals:
    """Proposals refined where that keeps them adversarial and does not take them farther: one prediction each."""
    rows = proposals.found.nonzero().squeeze(1)
    if not len(rows):
        return proposals
    part = problem.rows(rows)
    refined = across_threshold(part.images, proposals.images[rows], threshold)
    nearer = part.distance(refined) <= part.distance(proposals.images[rows])
    keep = part.met(refined) & nearer
    images = proposals.images.clone()
    images[rows[keep]] = refined[keep]
    return Proposals(images, proposals.found)


def across_threshold(clean: Tensor, adversarials: Tensor, threshold: float = 0.5) -> Tensor:
    """The image nearest to ``clean`` that looks like ``adversarials`` after thresholding, each (B,C,H,W) float32.

    A pixel on the same side as the clean one is restored. One that changed sides goes to the next float32 beyond the
    threshold, up or down, which is across whether the model tests > or ≥; a pixel at the threshold itself counts as up
    when it is no lower than the clean one.
    """
    level = torch.tensor(threshold, dtype=clean.dtype, device=clean.device)
    up = torch.nextafter(level, level.new_tensor(math.inf))
    down = torch.nextafter(level, level.new_tensor(-math.inf))
    upward = (clean < level) & (adversarials >= level) | (clean == level) & (adversarials > level)
    downward = (clean > level) & (adversarials <= level) | (clean == level) & (adversarials < level)
    return torch.where(upward, up, torch.where(downward, down, clean))
