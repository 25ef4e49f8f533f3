"""The Pointwise attack: take back every pixel of an adversarial that can be taken back (L0), or a part of it (L2).

Its sequential procedure is written down as such, for one image; ``run_procedures`` runs many of them in common batches.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.noise import salt_and_pepper
from absynth.attacks.search import Best, Procedure, first_on_path, run_procedures
from absynth.norms import L0, L2, Norm


@dataclass(frozen=True)
class Pointwise(Attack):
    """From salt-and-pepper adversarials, reset pixels to their clean values until none can be reset; best of ``draws``.

    Two changes to the published procedure save queries and leave what it ends in: an adversarial of which no single
    pixel can be reset. Pixels are first reset in groups of halving size, half of all of them at once to begin with. In
    the passes over single pixels an order is followed to its end and begun again, where the published one draws a fresh
    order after each success. In L2 each pixel left is then moved toward its clean value by ``bisections`` halvings,
    pass after pass, until a pass gains less than ``tolerance`` of the squared distance.
    """

    norm: Norm = L0
    draws: int = 10
    steps: int = 50
    bisections: int = 6
    tolerance: float = 0.01
    chunk: int = 512

    family = "pointwise"
    kind = "minimum"
    knowledge = "decision"
    source = "Schott et al. 2019, arXiv 1805.09190"
    deterministic = False
    queries = "1,500 to 4,000 predictions"

    def search(self, problem: Problem) -> Proposals:
        clean = problem.images.cpu()
        procedures: list[Procedure] = []
        owner: list[int] = []
        grid = [((step + 1) / self.steps) ** 2 for step in range(self.steps)]
        for draw in range(self.draws):
            path = salt_and_pepper(problem, stream=draw)
            density = first_on_path(problem, path, grid, bisections=6)
            hit = density.isfinite().nonzero().squeeze(1)
            starts = path(hit, density[hit]).cpu()
            for row, start in zip(hit.tolist(), starts, strict=True):
                rng = np.random.default_rng([int(problem.seeds[row]), draw])
                procedures.append(self._procedure(clean[row], start, rng))
                owner.append(row)
        best = Best(problem)
        for row, result in zip(owner, run_procedures(problem, procedures, owner, self.chunk), strict=True):
            assert result is not None
            index = torch.tensor([row], device=problem.images.device)
            best.update(index, result.unsqueeze(0).to(problem.images), torch.ones_like(index, dtype=torch.bool))
        return best.proposals()

    def _procedure(self, clean: Tensor, start: Tensor, rng: np.random.Generator) -> Procedure:
        current = yield from reset_pixels(clean, start, rng)
        if self.norm == L2:
            current = yield from self._shorten(clean, current, rng)
        return current

    def _shorten(
        self, clean: Tensor, current: Tensor, rng: np.random.Generator
    ) -> Generator[Tensor, np.ndarray, Tensor]:
        """Move each differing pixel (C,H,W) toward its clean value by bisection, until a pass changes next to
        nothing."""
        current = current.clone()
        flat, target = current.view(-1), clean.reshape(-1)
        while True:
            before = float((current - clean).double().square().sum())
            for pixel in rng.permutation((flat != target).nonzero().squeeze(1).numpy()):
                # ``far`` is adversarial, ``near`` is not (the clean value was refused when pixels were reset).
                far, near = float(flat[pixel]), float(target[pixel])
                for _ in range(self.bisections):
                    flat[pixel] = (far + near) / 2
                    margins = yield current.unsqueeze(0).clone()
                    far, near = (float(flat[pixel]), near) if margins[0] <= 0 else (far, float(flat[pixel]))
                flat[pixel] = far
            if before - float((current - clean).double().square().sum()) <= self.tolerance * before:
                return current


def reset_pixels(clean: Tensor, start: Tensor, rng: np.random.Generator) -> Generator[Tensor, np.ndarray, Tensor]:
    """Reset pixels of ``start`` (C,H,W), adversarial, to ``clean`` until no single one can be; yields one candidate
    a time."""
    current = start.clone()
    flat, target = current.view(-1), clean.reshape(-1)
    left = rng.permutation((flat != target).nonzero().squeeze(1).numpy())
    group = len(left) // 2
    while group > 1:
        kept = []
        for part in np.array_split(left, -(-len(left) // group)):
            values = flat[part].clone()
            flat[part] = target[part]
            margins = yield current.unsqueeze(0).clone()
            if margins[0] > 0:
                flat[part] = values
                kept.append(part)
        left = rng.permutation(np.concatenate(kept)) if kept else left[:0]
        group = min(group, len(left)) // 2
    queue, refused = list(left), 0  # refused: pixels in a row that could not be reset
    while refused < len(queue):
        pixel = queue.pop(0)
        value = float(flat[pixel])
        flat[pixel] = target[pixel]
        margins = yield current.unsqueeze(0).clone()
        if margins[0] <= 0:
            refused = 0
        else:
            flat[pixel] = value
            queue.append(pixel)
            refused += 1
    return current


def take_back(problem: Problem, proposals: Proposals, chunk: int = 512) -> Proposals:
    """Each proposal with every pixel reset that can be: what is left cannot be made sparser by one pixel."""
    clean, owner = problem.images.cpu(), proposals.found.nonzero().squeeze(1).tolist()
    procedures: list[Procedure] = [
        reset_pixels(clean[row], proposals.images[row].cpu(), np.random.default_rng([int(problem.seeds[row])]))
        for row in owner
    ]
    images = proposals.images.clone()
    for row, result in zip(owner, run_procedures(problem, procedures, owner, chunk), strict=True):
        assert result is not None
        images[row] = result.to(images)
    return Proposals(images, proposals.found)
