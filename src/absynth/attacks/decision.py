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
    to the distance. A walk that is done within a quarter of its steps is stuck, as on a blend that is adversarial
    where none around it is: the image gets another start, from other noise, ``starts`` in all.
    """

    steps: int = 5000
    sphere: float = 0.01
    toward: float = 0.01
    adaptation: float = 1.5
    converged: float = 1e-7
    starts: int = 3
    norm: Norm = field(default=L2, repr=False)

    family = "boundary"
    kind = "minimum"
    knowledge = "decision"
    source = "Brendel et al. 2018, arXiv 1712.04248"
    deterministic = False
    queries = "up to 5,600 predictions, and some 1,000 for each walk that is stuck"
    in_small_steps = False  # what is followed to is asked again, cold, now and then

    def search(self, problem: Problem) -> Proposals:
        nearest = Best(problem)
        todo = torch.arange(len(problem), device=problem.images.device)
        for attempt in range(self.starts):
            if not len(todo):
                break
            part = problem.rows(todo)
            start = toward_clean(part, starting_points(part, stream=1000 + attempt), steps=10)
            found, taken = self._walk(part, start, attempt)
            reached = found.distance.isfinite()
            nearest.update(todo, found.images, reached)
            todo = todo[reached & (found.distance > 0) & (taken < self.steps // 4)]
        return nearest.proposals()

    def _walk(self, problem: Problem, start: Proposals, stream: int) -> tuple[Best, Tensor]:
        """Where walks from ``start`` lead, and how many steps (B,) each took."""
        best = Best(problem)
        todo = start.found.nonzero().squeeze(1)
        best.update(todo, start.images[todo], start.found[todo])
        sources = generators(problem.seeds, stream)
        sphere = torch.full_like(best.distance, self.sphere)
        toward = torch.full_like(best.distance, self.toward)
        taken = todo.new_zeros(len(problem))
        on_sphere = _Rate(best.distance, window=10)
        kept = _Rate(best.distance, window=30)
        walk = followed(problem)
        sure = _Sure(best, kept) if walk is not problem else None
        for step in range(self.steps):
            if not len(todo):
                break
            part = walk.rows(todo)
            noise = draw_normal([sources[row] for row in todo.tolist()], part.images)
            side, candidate = self._step(part.images, best.images[todo], noise, sphere[todo], toward[todo])
            better = best.update(todo, candidate, part.met(candidate))
            kept.record(todo, better)
            if sure is not None:
                sure.look_after(walk, todo[better])
            if step % 10 == 9:
                on_sphere.record(todo, part.met(side))
                sphere = on_sphere.adapt(sphere, 0.2, 0.5, self.adaptation)
                toward = on_sphere.adapt(toward, 0.2, 0.5, self.adaptation)
                on_sphere.forget_full()
            if sure is not None:  # where hardly a step is kept, what was found last may be what misleads
                sure.confirm(walk, kept.below(0.1))
            toward = kept.adapt(toward, 0.1, 0.25, self.adaptation)
            kept.forget_full()
            taken[todo] = step + 1
            todo = todo[(toward[todo] > self.converged) & (best.distance[todo] > 0)]
        if sure is not None:
            sure.confirm(walk, sure.pending.nonzero()[:, 0])
        return best, taken

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


class _Sure:
    """What of a walk that is followed holds when it is asked about cold, now and then, and what to go back to.

    An image's walk is asked about after so many kept steps: one more than before where it held, up to ``MOST``, after
    the very next where it did not, and then it goes back to where it last did.
    """

    MOST = 16

    def __init__(self, best: Best, kept: _Rate) -> None:
        self.best, self.images, self.distance = best, best.images.clone(), best.distance.clone()
        self.rate = kept
        self.interval = torch.ones_like(best.distance, dtype=torch.int64)  # kept steps from one question to the next
        self.pending = torch.zeros_like(self.interval)  # kept steps since the last one

    def look_after(self, walk: Problem, kept: Tensor) -> None:
        """The images ``kept`` (n,) have made a step: ask about those that are due."""
        self.pending[kept] += 1
        self.confirm(walk, kept[self.pending[kept] >= self.interval[kept]])

    def confirm(self, walk: Problem, rows: Tensor) -> None:
        """Ask cold about where the images ``rows`` (n,) are; what does not hold goes back."""
        if not len(rows):
            return
        held = met_afresh(walk.rows(rows), self.best.images[rows])
        good, bad = rows[held], rows[~held]
        self.images[good], self.distance[good] = self.best.images[good], self.best.distance[good]
        self.best.images[bad], self.best.distance[bad] = self.images[bad], self.distance[bad]
        self.interval[good] = (self.interval[good] + 1).clamp(max=self.MOST)
        self.interval[bad] = 1
        self.rate.take_back(bad, self.pending[bad])
        self.pending[rows] = 0
        if len(bad):  # so that it is followed from where it stands now
            met_afresh(walk.rows(bad), self.best.images[bad])


class _Rate:
    """Successes in a row of trials, per image; a rate exists once ``window`` trials are in, and is then used up."""

    def __init__(self, like: Tensor, window: int) -> None:
        self.window, self.trials, self.successes = window, torch.zeros_like(like), torch.zeros_like(like)

    def record(self, rows: Tensor, success: Tensor) -> None:
        self.trials[rows] += 1
        self.successes[rows] += success.to(self.successes)

    def take_back(self, rows: Tensor, count: Tensor) -> None:
        """So many (n,) of the successes of images ``rows`` (n,) were none."""
        self.successes[rows] = (self.successes[rows] - count).clamp(min=0)

    def adapt(self, step: Tensor, low: float, high: float, factor: float) -> Tensor:
        """Steps (B,): larger where more than ``high`` succeeded, smaller where less than ``low`` did."""
        full, rate = self.trials >= self.window, self.successes / self.trials.clamp(min=1)
        step = torch.where(full & (rate > high), step * factor, step)
        return torch.where(full & (rate < low), step / factor, step)

    def below(self, low: float) -> Tensor:
        """The images (n,) of which fewer than ``low`` succeeded."""
        return ((self.trials >= self.window) & (self.successes < low * self.trials)).nonzero()[:, 0]

    def forget_full(self) -> None:
        full = self.trials >= self.window
        self.trials[full] = 0
        self.successes[full] = 0
