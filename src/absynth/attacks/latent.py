"""Latent Descent: walk toward what a generative classifier's second-best class would have made of the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.search import Best, Path, bisect, clean_to, toward_clean
from absynth.errors import InputError
from absynth.norms import L2, Norm


class Explanation(Protocol):
    """What ``analyze(images)`` returns: per class an energy, lower is likelier, and a reconstruction."""

    @property
    def energies(self) -> Tensor:
        """(B,K)."""

    @property
    def reconstructions(self) -> Tensor:
        """(B,K,C,H,W) in [0,1]."""


@dataclass(frozen=True)
class LatentDescent(Attack):
    """x ← (1 − ε)·x + ε·G_c(z*_c(x)), c the likeliest class other than the true one at the current x (or the target).

    Stops at the first adversarial, bisects the last step, then bisects between that point and the clean image: the
    paper's form. With ``rounds`` > 0 it goes on: the straight line from the clean image to the reconstruction at the
    adversarial is searched for the boundary, the image there is analyzed anew, and so on to a fixed point. Needs a
    classifier with ``analyze(images)``.
    """

    step_size: float = 0.01
    steps: int = 500
    bisections: int = 10
    rounds: int = 0
    norm: Norm = field(default=L2, repr=False)

    kind = "minimum"
    knowledge = "latent"
    source = "Schott et al. 2019, arXiv 1805.09190"
    deterministic = True
    in_small_steps = False

    @property
    def family(self) -> str:
        """``latent-descent``, or ``latent-descent-converged`` with rounds."""
        return "latent-descent-converged" if self.rounds else "latent-descent"

    @property
    def queries(self) -> str:
        """Analyses and predictions."""
        return f"up to {self.steps + self.rounds} analyses, {self.bisections * (2 + self.rounds)} predictions"

    def search(self, problem: Problem) -> Proposals:
        if not hasattr(problem.classifier, "analyze"):
            raise InputError(
                f"{self.name} needs a classifier with analyze(images), such as 'abs': leave it out for this model"
            )
        adversarial = self._descend(problem)
        proposals = toward_clean(problem, adversarial, self.bisections)
        best = Best(problem)
        todo = proposals.found.nonzero().squeeze(1)
        best.update(todo, proposals.images[todo], proposals.found[todo])
        for _ in range(self.rounds):
            if not len(todo):
                break
            part = problem.rows(todo)
            path = clean_to(part, _toward(part, best.images[todo]))
            reached = part.met(path(torch.arange(len(todo)), torch.ones(len(todo), dtype=torch.float64)))
            high = torch.where(reached, 1.0, torch.inf).double()
            position = bisect(part, path, torch.zeros_like(high), high, self.bisections)
            better = best.update(todo[reached], path(reached.nonzero().squeeze(1), position[reached]), reached[reached])
            todo = todo[reached][better]  # an image that gains nothing has converged
        return best.proposals()

    def _descend(self, problem: Problem) -> Proposals:
        """The first adversarial on the walk of each image, its last step bisected."""
        x, before = problem.images.clone(), problem.images.clone()
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        todo = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            part = problem.rows(todo)
            aim = _toward(part, x[todo])
            before[todo] = x[todo]
            x[todo] = (1 - self.step_size) * x[todo] + self.step_size * aim
            met = part.met(x[todo])
            found[todo[met]] = True
            todo = todo[~met]
            if not len(todo):
                break

        def last_step(rows: Tensor, position: Tensor) -> Tensor:
            return before[rows] + position.view(-1, 1, 1, 1).to(x.dtype) * (x[rows] - before[rows])

        path: Path = last_step
        high = torch.where(found, 1.0, torch.inf).double()
        position = bisect(problem, path, torch.zeros_like(high), high, self.bisections)
        rows = found.nonzero().squeeze(1)
        images = problem.images.clone()
        images[rows] = last_step(rows, position[rows])
        return Proposals(images, found)


def _toward(problem: Problem, images: Tensor) -> Tensor:
    """The reconstruction (n,C,H,W), in [0,1], of each image by its likeliest class other than the true one, or the
    target."""
    analysis: Explanation = problem.classifier.analyze(images)  # type: ignore[attr-defined]
    classes = problem.goal.classes
    if not problem.goal.toward:
        classes = analysis.energies.scatter(1, classes.unsqueeze(1), torch.inf).argmin(1)
    return analysis.reconstructions[torch.arange(len(images), device=images.device), classes].detach().clamp(0, 1)
