"""Noise: the smallest amount of Gaussian or salt-and-pepper noise that fools the classifier. The floor of any
evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals, draw_normal, draw_uniform, generators
from absynth.attacks.following import FARTHER, followed, or_else
from absynth.attacks.queries import can_follow
from absynth.attacks.search import Best, Path, clean_to, first_on_path
from absynth.norms import L0, L2, Norm


@dataclass(frozen=True)
class GaussianNoise(Attack):
    """``draws`` directions of Gaussian noise; along each the first of ``steps`` lengths that is adversarial,
    bisected."""

    draws: int = 10
    steps: int = 50
    bisections: int = 8
    norm: Norm = field(default=L2, repr=False)

    family = "gaussian-noise"
    kind = "minimum"
    knowledge = "decision"
    source = "Schott et al. 2019, arXiv 1805.09190"
    deterministic = False
    queries = "up to 580 predictions"
    in_small_steps = False  # followed along each path, and asked cold where one ends

    def search(self, problem: Problem) -> Proposals:
        return _nearest(self, problem)

    def paths(self, problem: Problem) -> Iterator[Path]:
        """From each clean image into one direction of noise after the other."""
        sources = generators(problem.seeds)
        largest = self.norm.largest(problem.images)
        for _ in range(self.draws):
            noise = draw_normal(sources, problem.images)
            yield clean_to(problem, problem.images + self.norm.steepest(noise, largest))


@dataclass(frozen=True)
class SaltAndPepper(Attack):
    """``draws`` patterns of black and white pixels; of each the least dense prefix that is adversarial, bisected.

    A pattern gives every pixel a color and a rank in (0,1); at density p the pixels of rank below p take their color.
    """

    draws: int = 10
    steps: int = 50
    bisections: int = 8
    norm: Norm = field(default=L0, repr=False)

    family = "salt-and-pepper"
    kind = "minimum"
    knowledge = "decision"
    source = "Rauber et al. 2017 (Foolbox), arXiv 1707.04131"
    deterministic = False
    queries = "up to 580 predictions"
    in_small_steps = False  # followed along each path, and asked cold where one ends

    def search(self, problem: Problem) -> Proposals:
        return _nearest(self, problem)

    def paths(self, problem: Problem) -> Iterator[Path]:
        """From each clean image into one pattern after the other."""
        return (salt_and_pepper(problem, stream=draw) for draw in range(self.draws))


def salt_and_pepper(problem: Problem, stream: int | Sequence[int]) -> Path:
    """The path from the clean images at density 0 to a random black-and-white picture at density 1; ``stream`` as for
    ``generators``."""
    sources = generators(problem.seeds, stream)
    rank = draw_uniform(sources, problem.images)
    color = (draw_uniform(sources, problem.images) < 0.5).to(problem.images.dtype)

    def path(rows: Tensor, density: Tensor) -> Tensor:
        noisy = rank[rows].double() < density.view(-1, 1, 1, 1)
        return torch.where(noisy, color[rows], problem.images[rows])

    return path


def _nearest(attack: GaussianNoise | SaltAndPepper, problem: Problem) -> Proposals:
    """The nearest adversarial on any of the attack's paths.

    A classifier that searches is followed along a path and asked cold where that finds the boundary; images for which
    nothing holds are asked cold on all paths.
    """
    if not can_follow(problem.classifier):
        return _nearest_as(attack, problem, problem)
    return or_else(
        problem, _nearest_as(attack, problem, followed(problem)), lambda cold: _nearest_as(attack, cold, cold)
    )


def _nearest_as(attack: GaussianNoise | SaltAndPepper, problem: Problem, asked: Problem) -> Proposals:
    """The same, on the problem as ``asked``; what comes back holds for ``problem``."""
    grid = [((step + 1) / attack.steps) ** 2 for step in range(attack.steps)]
    best = Best(problem)
    for path in attack.paths(problem):
        position = first_on_path(asked, path, grid, attack.bisections, _limit(problem, best, path, grid))
        todo = position.isfinite().nonzero()[:, 0]
        for share in FARTHER if asked is not problem else (1.0,):
            images = path(todo, position[todo] * share)
            nearer = problem.norm.distance(images, problem.images[todo]) < best.distance[todo]
            todo, images = todo[nearer], images[nearer]
            if not len(todo):
                break
            met = torch.ones_like(nearer[nearer]) if asked is problem else problem.rows(todo).met(images)
            best.update(todo, images, met)
            todo = todo[~met]
    return best.proposals()


def _limit(problem: Problem, best: Best, path: Path, grid: list[float]) -> Tensor:
    """Per image the position (B,) from which on a path that leads away from the clean image cannot be nearer than the
    best so far: the grid's next after the first that is not; infinite where there is none."""
    everything = torch.arange(len(problem), device=problem.images.device)
    limit = torch.full_like(best.distance, torch.inf)
    for here, beyond in pairwise([*grid, torch.inf]):
        images = path(everything, torch.full_like(limit, here))
        farther = problem.norm.distance(images, problem.images) >= best.distance
        limit = torch.where(farther & limit.isinf(), beyond, limit)
    return limit
