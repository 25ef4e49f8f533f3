"""Searches that many attacks share: along a path, back to the clean image, over radii, and sequential procedures.

All of them work on a whole batch and drop an image the moment it is done, so that it costs no more queries.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import (
    BudgetAttack,
    Problem,
    Proposals,
    draw_uniform,
    generators,
    per_image,
)
from absynth.attacks.wrapping import Wrapping

#: Images (n,C,H,W) for the images ``rows`` (n,) of the problem at path positions (n,) in float64.
Path = Callable[[Tensor, Tensor], Tensor]
#: Yields candidate images (m,C,H,W), is sent their margins as an array (m,), returns the final image or None.
Procedure = Generator[Tensor, np.ndarray, Tensor | None]


class Best:
    """The best adversarial of each image so far: images (B,C,H,W), distance (B,) float64, infinite where there is
    none."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.images = problem.images.clone()
        self.distance = torch.full((len(problem),), torch.inf, dtype=torch.float64, device=problem.images.device)

    def update(self, rows: Tensor, candidates: Tensor, met: Tensor) -> Tensor:
        """Keep the candidates (n,C,H,W) of images ``rows`` (n,) that are ``met`` (n,) and nearer; returns which
        (n,)."""
        distance = self.problem.norm.distance(candidates, self.problem.images[rows])
        better = met & (distance < self.distance[rows])
        self.images[rows[better]] = candidates[better]
        self.distance[rows[better]] = distance[better]
        return better

    def proposals(self) -> Proposals:
        """The result of the attack."""
        return Proposals(self.images, self.distance.isfinite())


def clean_to(problem: Problem, far: Tensor) -> Path:
    """The straight path from the clean images at 0 to ``far`` (B,C,H,W) at 1, cut to [0,1] beyond that."""

    def path(rows: Tensor, position: Tensor) -> Tensor:
        clean = problem.images[rows]
        return (clean + per_image(position, clean) * (far[rows] - clean)).clamp(0, 1)

    return path


def first_on_path(
    problem: Problem, path: Path, grid: Sequence[float], bisections: int, limit: Tensor | None = None
) -> Tensor:
    """The first position of ``grid`` (increasing) that is adversarial, refined by bisection: (B,) float64, inf for
    none.

    Positions of ``limit`` (B,) and beyond are not asked about. Between grid points the path may cross the boundary
    twice without being noticed: a finer grid sees more and costs one query a point.
    """
    device = problem.images.device
    low = torch.zeros(len(problem), dtype=torch.float64, device=device)
    high = torch.full_like(low, torch.inf)
    todo = torch.arange(len(problem), device=device)
    for position in grid:
        if limit is not None:
            todo = todo[limit[todo] > position]
        if not len(todo):
            break
        met = problem.rows(todo).met(path(todo, torch.full_like(low[todo], position)))
        high[todo[met]] = position
        low[todo[~met]] = position
        todo = todo[~met]
    return bisect(problem, path, low, high, bisections)


def bisect(problem: Problem, path: Path, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Halve the interval between ``low``, not adversarial, and ``high``, adversarial, each (B,); infinite ``high``
    rests."""
    low, high = low.clone(), high.clone()
    todo = high.isfinite().nonzero().squeeze(1)
    for _ in range(steps if len(todo) else 0):
        middle = (low[todo] + high[todo]) / 2
        met = problem.rows(todo).met(path(todo, middle))
        high[todo[met]] = middle[met]
        low[todo[~met]] = middle[~met]
    return high


def toward_clean(problem: Problem, proposals: Proposals, steps: int) -> Proposals:
    """Bisect every proposal on the straight line to its clean image: the answer is adversarial and never farther."""
    path = clean_to(problem, proposals.images)
    high = torch.where(proposals.found, 1.0, torch.inf).double()
    position = bisect(problem, path, torch.zeros_like(high), high, steps)
    moved = (position < 1).nonzero().squeeze(1)
    images = proposals.images.clone()
    images[moved] = path(moved, position[moved])
    return Proposals(images, proposals.found)


def starting_points(problem: Problem, tries: int = 4, steps: int = 20, stream: int = 1000) -> Proposals:
    """Some adversarial for each image, by decisions alone: blends into noise, then plain images and the inverted one.

    ``tries`` uniform-noise images, and one of the target class if the goal has some, are blended in, in ``steps``
    steps, the least blend that is adversarial being kept. What is left is tried with black, white, gray and inverted
    images. Images nothing works on come back not found.
    """
    best = Best(problem)
    sources = generators(problem.seeds, stream)
    grid = [(step + 1) / steps for step in range(steps)]
    blended = [draw_uniform(sources, problem.images) for _ in range(tries)]
    if problem.goal.starts is not None:
        blended.append(problem.goal.starts.to(problem.images))
    for end in blended:
        _keep_first(problem, best, clean_to(problem, end), grid)
    for end in [torch.full_like(problem.images, value) for value in (0.0, 1.0, 0.5)] + [1 - problem.images]:
        if best.distance.isfinite().all():
            break
        _keep_first(problem, best, clean_to(problem, end), [1.0], only_missing=True)
    return best.proposals()


def _keep_first(problem: Problem, best: Best, path: Path, grid: Sequence[float], only_missing: bool = False) -> None:
    limit = torch.where(best.distance.isfinite(), 0.0, torch.inf).double() if only_missing else None
    position = first_on_path(problem, path, grid, bisections=0, limit=limit)
    hit = position.isfinite().nonzero().squeeze(1)
    best.update(hit, path(hit, position[hit]), torch.ones_like(hit, dtype=torch.bool))


def run_procedures(
    problem: Problem,
    procedures: Sequence[Procedure],
    owner: Sequence[int],
    chunk: int,
    ask: Callable[[Problem, Tensor], Tensor] = Problem.margin,
) -> list[Tensor | None]:
    """Run sequential procedures side by side: each round puts the open candidates of all of them into common batches.

    ``owner`` says to which image of the problem a procedure belongs. A procedure sees what it would see alone; one that
    has ended asks nothing more. Batches hold at most about ``chunk`` images. ``ask`` answers for the images (m,C,H,W)
    of such a batch, a row each: their margins, or what else the procedures want. Returns what each procedure returned.
    """
    results: list[Tensor | None] = [None] * len(procedures)
    waiting: list[tuple[int, Tensor]] = []

    def advance(index: int, margins: np.ndarray | None) -> tuple[int, Tensor] | None:
        try:
            procedure = procedures[index]
            return index, (next(procedure) if margins is None else procedure.send(margins))
        except StopIteration as stop:
            results[index] = stop.value
            return None

    waiting = [entry for index in range(len(procedures)) if (entry := advance(index, None)) is not None]
    while waiting:
        asked, waiting = waiting, []
        while asked:
            size, count = 0, 0
            while count < len(asked) and (count == 0 or size + len(asked[count][1]) <= chunk):
                size += len(asked[count][1])
                count += 1
            batch, asked = asked[:count], asked[count:]
            lengths = [len(candidates) for _, candidates in batch]
            rows = torch.tensor([owner[index] for index, _ in batch]).repeat_interleave(torch.tensor(lengths))
            images = torch.cat([candidates for _, candidates in batch]).to(problem.images.device)
            margins = ask(problem.rows(rows.to(images.device)), images).cpu().numpy()
            for (index, _), part in zip(batch, np.split(margins, np.cumsum(lengths)[:-1]), strict=True):
                if (entry := advance(index, part)) is not None:
                    waiting.append(entry)
    return results


@dataclass(frozen=True)
class SmallestRadius(Wrapping):
    """Any budget attack as one that minimizes: the smallest radius at which it succeeds, by bracketing and bisection.

    Starts at ``first`` (in the norm's units), doubles until the attack succeeds or the radius exceeds the largest
    perturbation that fits into [0,1], then bisects. An image is done when its bracket is narrower than ``tolerance`` of
    its distance. Every proposal on the way counts, so the result is the nearest of all, moved to the boundary in the
    end.
    """

    attack: BudgetAttack
    first: float
    steps: int = 12
    tolerance: float = 0.01
    bisections: int = 8

    kind = "minimum"
    in_small_steps = True  # an attempt stays within its radius, the whole need not

    @property
    def family(self) -> str:
        """As the inner attack."""
        return self.attack.family

    @property
    def queries(self) -> str:
        """Up to ``steps`` attempts."""
        return f"{self.attack.queries}, up to {self.steps} times"

    def search(self, problem: Problem) -> Proposals:
        best = Best(problem)
        largest = self.norm.largest(problem.images)
        low = torch.zeros(len(problem), dtype=torch.float64)
        radius = torch.full_like(low, min(self.first, largest))
        todo = torch.arange(len(problem))
        for _ in range(self.steps):
            if not len(todo):
                break
            rows = todo.to(problem.images.device)
            attempt = self.attack.attempt(problem.rows(rows), radius[todo])
            best.update(rows, attempt.images, attempt.found)
            high = best.distance.cpu()[todo]
            low[todo] = torch.where(attempt.found.cpu(), low[todo], radius[todo]).clamp(max=high)
            going = torch.where(high.isfinite(), high - low[todo] > self.tolerance * high, low[todo] < largest)
            radius[todo] = torch.where(high.isfinite(), (low[todo] + high) / 2, (2 * low[todo]).clamp(max=largest))
            todo = todo[going]
        return toward_clean(problem, best.proposals(), self.bisections)
