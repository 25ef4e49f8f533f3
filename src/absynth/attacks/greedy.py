"""Pixels flipped one after the other, by the gradient: a fallback in L0, and a repair of what is nearly adversarial."""

from __future__ import annotations

import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.search import Best


def greedy_flips(problem: Problem, most: int = 100, start: Tensor | None = None) -> Proposals:
    """One pixel after the other set to black or white, the one that helps most by the gradient at the image so far, at
    most ``most`` of them; ends where none helps (after JSMA, Papernot et al. 2016, arXiv 1511.07528). Begins at
    ``start`` (B,C,H,W), or at the clean images."""
    best, x = Best(problem), (problem.images if start is None else start).clone()
    free = torch.ones_like(x[:, 0].flatten(1), dtype=torch.bool)  # (B,H*W)
    todo = torch.arange(len(x), device=x.device)
    for _ in range(most):
        margin, gradient = problem.rows(todo).margin_and_gradient(x[todo])
        best.update(todo, x[todo], margin <= 0)
        gradient, flat = gradient.flatten(2), x[todo].flatten(2)  # (n,C,H*W)
        flipped = torch.where(gradient > 0, 0.0, 1.0).to(flat)
        gain = (gradient * (flat - flipped)).sum(1).masked_fill(~free[todo], 0.0)  # (n,H*W): of the margin's fall
        largest, pixel = gain.max(1)
        going = ((margin > 0) & (largest > 0)).nonzero()[:, 0]
        todo, pixel = todo[going], pixel[going]
        if not len(todo):
            break
        flat = flat[going]
        rows = torch.arange(len(todo), device=x.device)
        flat[rows, :, pixel] = flipped[going, :, pixel]
        free[todo, pixel] = False
        x[todo] = flat.view_as(x[todo])
    return best.proposals()
