"""Transfer: find a direction on a substitute model, then the smallest step along it that fools the target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from absynth.attacks.base import Attack, Classifier, Problem, Proposals
from absynth.attacks.search import Best, clean_to, first_on_path
from absynth.errors import InputError
from absynth.norms import L2, LINF, Norm

#: Radii at which the substitute is attacked, in units of the norm: about the thresholds of the paper.
RADII = {L2: (1.0, 2.0, 4.0), LINF: (0.1, 0.2, 0.4)}


@dataclass(frozen=True)
class Transfer(Attack):
    """Directions from an iterated gradient attack on ``substitute`` at several radii; the target sees a line search
    along each.

    The substitute is attacked to the full radius, past its own boundary, since what barely fools one model fools no
    other. The target is asked at ``steps`` positions up to ``reach`` times the direction, then bisected.
    """

    norm: Norm
    substitute: Classifier | None = field(default=None, repr=False)
    substitute_name: str = "transfer-cnn"
    gradient_steps: int = 20
    steps: int = 50
    reach: float = 8.0
    bisections: int = 10

    family = "transfer"
    kind = "minimum"
    knowledge = "transfer"
    source = "Papernot et al. 2016, arXiv 1605.07277"
    deterministic = True
    queries = "up to 180 predictions, none of them gradients"

    def search(self, problem: Problem) -> Proposals:
        if self.substitute is None:
            raise InputError(
                f"{self.name} needs a substitute model: pass substitute=..., such as the model 'transfer-cnn'"
            )
        there = Problem(self.substitute, problem.images, problem.goal, problem.seeds, problem.norm)
        best = Best(problem)
        for radius in RADII.get(self.norm, (1.0,)):
            far = self._push(there, radius)
            path = clean_to(problem, far)
            grid = [self.reach * ((step + 1) / self.steps) ** 2 for step in range(self.steps)]
            position = first_on_path(problem, path, grid, self.bisections)
            hit = position.isfinite().nonzero().squeeze(1)
            best.update(hit, path(hit, position[hit]), torch.ones_like(hit, dtype=torch.bool))
        return best.proposals()

    def _push(self, problem: Problem, radius: float) -> torch.Tensor:
        """Images (B,C,H,W) at ``radius``, lowering the substitute's margin all the way."""
        x = problem.images
        for _ in range(self.gradient_steps):
            _, gradient = problem.margin_and_gradient(x)
            x = x + self.norm.steepest(-gradient, 0.2 * radius)
            x = (problem.images + self.norm.project(x - problem.images, radius)).clamp(0, 1)
        return x
