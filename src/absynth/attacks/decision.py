"""The Boundary attack: a random walk along the decision boundary that needs decisions only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from absynth.attacks.base import (
    Attack,
    Problem,
    Proposals,
    draw_normal,
    generators,
    per_image,
)
from absynth.attacks.following import followed, met_afresh
from absynth.attacks.search import Best, starting_points, toward_clean
from absynth.norms import L2, Norm


@dataclass(frozen=True)
class Boundary(Attack):
    """From a blend into noise: a random step on the sphere around the clean image, then a small one toward it.

    A candidate is kept when it is adversarial and nearer. Each image adapts its own two step sizes: the ``sphere`` step
    to half of the steps on the sphere staying adversarial (asked every tenth step), the ``source`` step to a fifth of
    all candidates being kept. An image is done when its source step falls below ``converged``. Both steps are relative
    to the distance.
    """

    steps: int = 5000
    sphere: float = 0.01
    toward: float = 0.01
    adaptation: float = 1.5
    converged: float = 1e-7
    norm: Norm = field(default=L2, repr=False)

    family = "boundary"
    kind = "minimum"
    knowledge = "decision"
    source = "Brendel et al. 2018, arXiv 1712.04248"
    deterministic = False
    queries = "up to 5,600 predictions"
    in_small_steps = False  # steps that are kept are asked again, cold

    def search(self, problem: Problem) -> Proposals:
        start = toward_clean(problem, starting_points(problem), steps=10)
        best = Best(problem)
        todo = start.found.nonzero().squeeze(1)
        best.update(todo, start.images[todo], start.found[todo])
        sources = generators(problem.seeds)
        sphere = torch.full_like(best.distance, self.sphere)
        toward = torch.full_like(best.distance, self.toward)
        on_sphere = _Rate(best.distance, window=10)
        kept = _Rate(best.distance, window=30)
        walk = followed(problem)
        for step in range(self.steps):
            if not len(todo):
                break
            part = walk.rows(todo)
            noise = draw_normal([sources[row] for row in todo.tolist()], part.images)
            side, candidate = self._step(part.images, best.images[todo], noise, sphere[todo], toward[todo])
            met = part.met(candidate)
            if walk is not problem and len(said := met.nonzero()[:, 0]):
                met[said] = met_afresh(part.rows(said), candidate[said])
            better = best.update(todo, candidate, met)
            kept.record(todo, better)
            if step % 10 == 9:
                on_sphere.record(todo, part.met(side))
                sphere = on_sphere.adapt(sphere, 0.2, 0.5, self.adaptation)
                toward = on_sphere.adapt(toward, 0.2, 0.5, self.adaptation)
                on_sphere.forget_full()
            toward = kept.adapt(toward, 0.1, 0.25, self.adaptation)
            kept.forget_full()
            todo = todo[(toward[todo] > self.converged) & (best.distance[todo] > 0)]
        return best.proposals()

    def _step(self, clean: Tensor, x: Tensor, noise: Tensor, sphere: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
        """A point on the sphere through x around clean, and that point moved toward clean; both (n,C,H,W) in [0,1]."""
        offset = (x - clean).flatten(1).double()  # (n,C,H,W) -> (n,N)
        distance = offset.norm(dim=1, keepdim=True)
        unit = offset / distance
        sideways = noise.flatten(1).double()
        sideways = sideways - (sideways * unit).sum(1, keepdim=True) * unit
        sideways = sideways / sideways.norm(dim=1, keepdim=True) * sphere.unsqueeze(1) * distance
        turned = (offset + sideways) / (1 + sphere.unsqueeze(1).square()).sqrt()
        side = (clean + turned.view_as(clean).to(clean.dtype)).clamp(0, 1)
        # Cutting to the box changes the distance; the step aims at (1 − toward) of the distance before it.
        length = L2.size((side - clean).double())
        scale = ((1 - toward) * distance.squeeze(1) / length.clamp(min=1e-12)).clamp(max=1)
        return side, (clean + per_image(scale, clean) * (side - clean)).clamp(0, 1)


class _Rate:
    """Successes in a row of trials, per image; a rate exists once ``window`` trials are in, and is then used up."""

    def __init__(self, like: Tensor, window: int) -> None:
        self.window, self.trials, self.successes = window, torch.zeros_like(like), torch.zeros_like(like)

    def record(self, rows: Tensor, success: Tensor) -> None:
        self.trials[rows] += 1
        self.successes[rows] += success.to(self.successes)

    def adapt(self, step: Tensor, low: float, high: float, factor: float) -> Tensor:
        """Steps (B,): larger where more than ``high`` succeeded, smaller where less than ``low`` did."""
        full, rate = self.trials >= self.window, self.successes / self.trials.clamp(min=1)
        step = torch.where(full & (rate > high), step * factor, step)
        return torch.where(full & (rate < low), step / factor, step)

    def forget_full(self) -> None:
        full = self.trials >= self.window
        self.trials[full] = 0
        self.successes[full] = 0
