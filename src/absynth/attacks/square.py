"""The Square attack: random squares, kept when the score falls. Needs scores only."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import BudgetAttack, Problem, Proposals
from absynth.attacks.following import margin_afresh
from absynth.attacks.queries import Following
from absynth.attacks.search import Best, Procedure, run_procedures
from absynth.errors import InputError
from absynth.norms import L2, LINF, Norm

#: Shares of the run after which the squares' area is halved.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Square(BudgetAttack):
    """Random search over square windows within ``radius``, L∞ or L2; squares shrink from ``area`` of the image.

    In L∞ a window takes ± the radius. In L2 one window takes over the perturbation's energy from another, in the shape
    of a peak, and what the box cuts off is spent again. An image is done at its first adversarial.
    """

    norm: Norm
    radius: float | None = None
    steps: int = 1000
    area: float = 0.8
    chunk: int = 512

    family = "square"
    knowledge = "score"
    source = "Andriushchenko et al. 2020, arXiv 1912.00049"
    deterministic = False
    queries = "up to 1,000 predictions"

    def __post_init__(self) -> None:
        if self.norm not in (L2, LINF):
            raise InputError(f"square knows no {self.norm}: use l2 or linf")

    def attempt(self, problem: Problem, radius: Tensor) -> Proposals:
        run = self._linf if self.norm == LINF else self._l2
        clean, owner = problem.images.cpu(), list(range(len(problem)))
        procedures: list[Procedure] = [
            run(clean[row], float(radius[row]), np.random.default_rng([int(problem.seeds[row])])) for row in owner
        ]
        best = Best(problem)
        for row, result in enumerate(run_procedures(problem, procedures, owner, self.chunk, _settled)):
            if result is not None:
                index = torch.tensor([row], device=problem.images.device)
                best.update(index, result.unsqueeze(0).to(problem.images), torch.ones_like(index, dtype=torch.bool))
        return best.proposals()

    def _side(self, step: int, height: int, width: int) -> int:
        """The side of the square at ``step``, from its area's schedule."""
        area = self.area / 2 ** sum(step >= share * self.steps for share in HALVINGS)
        return int(np.clip(round((area * height * width) ** 0.5), 1, min(height, width)))

    def _linf(
        self, clean: Tensor, radius: float, rng: np.random.Generator
    ) -> Generator[Tensor, np.ndarray, Tensor | None]:
        channels, height, width = clean.shape
        stripes = torch.from_numpy(rng.choice([-radius, radius], size=(channels, 1, width))).to(clean.dtype)
        x = (clean + stripes).clamp(0, 1)  # vertical stripes to begin with
        _, lowest = yield from _judged(x)
        for step in range(self.steps):
            if lowest <= 0:
                return x
            side = self._side(step, height, width)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            window = (slice(None), slice(top, top + side), slice(left, left + side))
            candidate = x.clone()
            sign = torch.from_numpy(rng.choice([-radius, radius], size=(channels, 1, 1))).to(clean.dtype)
            candidate[window] = (clean[window] + sign).clamp(0, 1)
            if torch.equal(candidate, x):
                continue  # nothing to ask
            margin, settled = yield from _judged(candidate)
            if margin < lowest:
                x, lowest = candidate, settled
        return x if lowest <= 0 else None

    def _l2(
        self, clean: Tensor, radius: float, rng: np.random.Generator
    ) -> Generator[Tensor, np.ndarray, Tensor | None]:
        channels, height, width = clean.shape
        tile = max(1, min(height, width) // 5)
        delta = torch.zeros_like(clean)
        for top in range(0, height - tile + 1, tile):  # a grid of peaks to begin with
            for left in range(0, width - tile + 1, tile):
                delta[:, top : top + tile, left : left + tile] = _peak(tile, rng, channels)
        x = _on_sphere(clean, delta, radius)
        _, lowest = yield from _judged(x)
        for step in range(self.steps):
            if lowest <= 0:
                return x
            side = max(min(3, height, width), self._side(step, height, width))
            delta = x - clean
            corners = rng.integers(0, [height - side + 1, width - side + 1], size=(2, 2))
            gain, give = ((slice(None), slice(t, t + side), slice(s, s + side)) for t, s in corners.tolist())
            both = torch.zeros_like(delta, dtype=torch.bool)
            both[gain] = both[give] = True
            energy = delta[both].square().sum() + max(radius**2 - float(delta.square().sum()), 0.0)
            shape = _peak(side, rng, channels) + delta[gain] / (delta[gain].norm() + 1e-10)
            delta = delta.clone()
            delta[give] = 0
            delta[gain] = shape / (shape.norm() + 1e-10) * energy.sqrt()
            candidate = _on_sphere(clean, delta, radius)
            margin, settled = yield from _judged(candidate)
            if margin < lowest:
                x, lowest = candidate, settled
        return x if lowest <= 0 else None


def _settled(problem: Problem, images: Tensor) -> Tensor:
    """(n,C,H,W) -> (n,2): the margins, and the same asked cold where a classifier that follows sees the goal met."""
    margins = problem.margin(images)
    settled = margins.clone()
    if isinstance(problem.classifier, Following) and len(hits := (margins <= 0).nonzero()[:, 0]):
        settled[hits] = margin_afresh(problem.rows(hits), images[hits])
    return torch.stack([margins, settled], dim=1)


def _judged(candidate: Tensor) -> Generator[Tensor, np.ndarray, tuple[float, float]]:
    """Both margins of a candidate (C,H,W), infinite where there is no answer, so that any answer is better. A walk goes
    on from the second: one that believed the first would be done, or wait for what is better than a mistake."""
    margin, settled = (yield candidate.unsqueeze(0))[0].tolist()
    return (math.inf if math.isnan(margin) else margin), (math.inf if math.isnan(settled) else settled)


def _on_sphere(clean: Tensor, delta: Tensor, radius: float) -> Tensor:
    """The perturbation scaled to ``radius`` and cut to the box (C,H,W)."""
    scaled: Tensor = (clean + delta / (torch.linalg.vector_norm(delta) + 1e-10) * radius).clamp(0, 1)
    return scaled


def _peak(side: int, rng: np.random.Generator, channels: int) -> Tensor:
    """Two pyramids of opposite sign, side by side, turned at random, one sign a channel; norm 1:
    (channels,side,side)."""
    rows = torch.arange(side, dtype=torch.float32)
    half = max(1, side // 2)

    def pyramid(length: int) -> Tensor:
        down = (rows.view(-1, 1) - (side - 1) / 2).abs()
        across = (torch.arange(length).view(1, -1) - (length - 1) / 2).abs()
        return 1 / (1 + torch.maximum(down, across).square())  # (side,length), falling off from the middle

    peak = torch.cat([pyramid(half), -pyramid(side - half)], dim=1) if side > 1 else torch.ones(1, 1)
    peak = peak.T if rng.random() < 0.5 else peak
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=(channels, 1, 1))).float()
    shape: Tensor = signs * peak / torch.linalg.vector_norm(peak)
    return shape
