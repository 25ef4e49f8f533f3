"""HopSkipJump: decisions around a point of the boundary give its normal, a jump along it and a bisection the next
point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals, draw_normal, draw_uniform, generators, per_image
from absynth.attacks.following import followed
from absynth.attacks.search import Best, Path, bisect, clean_to, starting_points
from absynth.errors import InputError
from absynth.norms import L2, LINF, Norm


@dataclass(frozen=True)
class HopSkipJump(Attack):
    """From a blend into noise: estimate the boundary's normal, jump along it, come back by bisection, ``steps`` times.

    The normal is the mean of random directions weighted by the decisions at ``probe`` times the distance along them,
    ``first_probes`` times the root of the step's number of them (uniform ones in L∞, where the jump takes the normal's
    signs). A jump is the distance over the root of the step's number, halved until it lands on an adversarial. In L∞
    the way back cuts the perturbation at a level, in L2 it is straight.
    """

    norm: Norm
    steps: int = 20
    first_probes: int = 100
    probe: float = 0.05
    halvings: int = 15
    bisections: int = 14
    chunk: int = 512

    family = "hop-skip-jump"
    kind = "minimum"
    knowledge = "decision"
    source = "Chen et al. 2020, arXiv 1904.02144"
    deterministic = False
    queries = "about 6,500 predictions"
    in_small_steps = False  # the questions around a point are followed from there, all others asked cold

    def __post_init__(self) -> None:
        if self.norm not in (L2, LINF):
            raise InputError(f"hop-skip-jump knows no {self.norm}: use l2 or linf")

    def search(self, problem: Problem) -> Proposals:
        starts = starting_points(problem)
        best = Best(problem)
        todo = starts.found.nonzero()[:, 0]
        if not len(todo):
            return best.proposals()
        best.update(todo, *self._back(problem.rows(todo), starts.images[todo]))
        sources = generators(problem.seeds, stream=1)
        for step in range(1, self.steps + 1):
            part, x = problem.rows(todo), best.images[todo]
            normal = self._normal(
                part, x, [sources[row] for row in todo.tolist()], round(self.first_probes * step**0.5)
            )
            length = best.distance[todo] / step**0.5
            landed, jumped = self._jump(part, x, normal, length)
            rows = todo[landed]
            best.update(rows, *self._back(problem.rows(rows), jumped[landed]))
        return best.proposals()

    def _normal(self, problem: Problem, x: Tensor, sources: list[torch.Generator], probes: int) -> Tensor:
        """The direction (B,C,H,W) in which images at ``x`` on the boundary become adversarial, of L2 norm 1."""
        radius = self.probe * problem.distance(x)
        around = followed(problem)
        if around is not problem:
            around.logits(x)  # what is found here, the answers start from
            around = replace(around, classifier=around.classifier.settled())  # type: ignore[attr-defined]
        at_once = max(1, self.chunk // len(x))
        # the sum of all directions, and of all with the sign of their answer
        summed, signed = torch.zeros_like(x), torch.zeros_like(x)
        adversarial = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for first in range(0, probes, at_once):
            directions = []
            for _ in range(min(at_once, probes - first)):
                noise = 2 * draw_uniform(sources, x) - 1 if self.norm == LINF else draw_normal(sources, x)
                scaled = radius / L2.size(noise) * (x[0].numel() ** 0.5 if self.norm == LINF else 1)
                moved = (x + per_image(scaled, x) * noise).clamp(0, 1)
                directions.append(moved - x)
            asked = torch.stack(directions)  # (p,B,C,H,W)
            rows = torch.arange(len(x), device=x.device).repeat(len(asked))
            met = around.rows(rows).met((x + asked).flatten(0, 1)).view(len(asked), -1)  # (p*B,) -> (p,B)
            sign = torch.where(met, 1.0, -1.0).to(x)
            signed += torch.einsum("pb,pbchw->bchw", sign, asked)
            summed += asked.sum(0)
            adversarial += met.sum(0)
        mean = 2 * adversarial / probes - 1
        normal = signed - per_image(torch.where(mean.abs() < 1, mean, 0.0), x) * summed
        return normal / L2.size(normal).clamp(min=1e-12).view(-1, 1, 1, 1)

    def _jump(self, problem: Problem, x: Tensor, normal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Which images (B,) land on an adversarial, and where (B,C,H,W)."""
        direction = normal.sign() if self.norm == LINF else normal
        landed, jumped, length = torch.zeros(len(x), dtype=torch.bool, device=x.device), x.clone(), length.clone()
        todo = torch.arange(len(x), device=x.device)
        for _ in range(self.halvings):
            moved = (x[todo] + per_image(length[todo], x) * direction[todo]).clamp(0, 1)
            met = problem.rows(todo).met(moved)
            jumped[todo[met]], landed[todo[met]] = moved[met], True
            todo = todo[~met]
            if not len(todo):
                break
            length[todo] /= 2
        return landed, jumped

    def _back(self, problem: Problem, far: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarials ``far`` (n,C,H,W) brought back to the boundary, and that they are adversarial (n,)."""
        path = _cut(problem, far) if self.norm == LINF else clean_to(problem, far)
        rows = torch.arange(len(far), device=far.device)
        high = torch.ones(len(far), dtype=torch.float64, device=far.device)
        position = bisect(problem, path, torch.zeros_like(high), high, self.bisections)
        return path(rows, position), torch.ones_like(rows, dtype=torch.bool)


def _cut(problem: Problem, far: Tensor) -> Path:
    """From the clean images at 0 to ``far`` (B,C,H,W) at 1, the perturbation cut at a growing level."""
    delta = far - problem.images
    largest = delta.flatten(1).abs().amax(1).double()

    def path(rows: Tensor, position: Tensor) -> Tensor:
        level = per_image(position * largest[rows], delta)
        return (problem.images[rows] + torch.minimum(torch.maximum(delta[rows], -level), level)).clamp(0, 1)

    return path
