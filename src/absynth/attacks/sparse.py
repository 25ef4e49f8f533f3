"""σ-zero: L0 attack by descent on a smooth stand-in for the number of changed pixels, with an adaptive cut-off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from absynth.attacks.base import Attack, Problem, Proposals, per_image
from absynth.attacks.resetting import take_back
from absynth.attacks.search import Best
from absynth.norms import L0, Norm


@dataclass(frozen=True)
class SigmaZero(Attack):
    """Adam on margin + (1/N)·Σ δ²/(δ² + σ), gradients scaled to 1 in L∞; pixels below a cut-off are set to 0 each step.

    The cut-off grows while an image is adversarial and shrinks while it is not. In the end pixels that can be reset are
    reset. ``step_size`` falls to a tenth along a cosine.
    """

    steps: int = 300
    step_size: float = 1.0
    sigma: float = 1e-3
    cutoff: float = 0.3
    cutoff_step: float = 0.01
    norm: Norm = field(default=L0, repr=False)

    family = "sigma-zero"
    kind = "minimum"
    knowledge = "gradient"
    source = "Cinà et al. 2024, arXiv 2402.01879"
    deterministic = True
    queries = "300 gradients, 50 predictions"

    def search(self, problem: Problem) -> Proposals:
        best = Best(problem)
        everything = torch.arange(len(problem), device=problem.images.device)
        delta = torch.zeros_like(problem.images)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)  # Adam's two moments
        cutoff = torch.full_like(best.distance, self.cutoff)
        for step in range(self.steps):
            x = problem.images + delta
            margin, gradient = problem.margin_and_gradient(x)
            met = margin <= 0
            # The margin pulls only where the goal is not met.
            gradient = torch.where(per_image(met, delta) > 0, torch.zeros_like(gradient), gradient)
            sparsity = 2 * self.sigma * delta / (delta.square() + self.sigma).square() / delta[0].numel()
            gradient = gradient + sparsity
            gradient = gradient / per_image(gradient.abs().flatten(1).amax(1).clamp(min=1e-12), gradient)
            best.update(everything, x, met)
            rate = self.step_size * (0.1 + 0.9 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            scaled = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            delta = (problem.images + delta - rate * scaled).clamp(0, 1) - problem.images
            cutoff = (cutoff + torch.where(met, 1.0, -1.0) * self.cutoff_step * rate).clamp(0, 1)
            delta = torch.where(delta.abs() < per_image(cutoff, delta), torch.zeros_like(delta), delta)
        return take_back(problem, best.proposals())
