"""The Pointwise attack: take back every pixel of an adversarial that can be taken back (L0), or a part of it (L2).

Its sequential procedure is written down as such, for one image; ``run_procedures`` runs many of them in common batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.following import confirmed, followed, or_else
from absynth.attacks.noise import salt_and_pepper
from absynth.attacks.queries import can_follow
from absynth.attacks.resetting import reset_pixels, take_back
from absynth.attacks.search import Best, Procedure, first_on_path, run_procedures
from absynth.norms import L0, L2, Norm


@dataclass(frozen=True)
class Pointwise(Attack):
    """From salt-and-pepper adversarials, reset pixels to their clean values until none can be reset; best of ``draws``.

    Where salt and pepper meets no target, it begins at the goal's ``starts``.

    Two changes to the published procedure save queries and leave what it ends in: an adversarial of which no single
    pixel can be reset. Pixels are first reset in groups of halving size, half of all of them at once to begin with. In
    the passes over single pixels an order is followed to its end and begun again, where the published one draws a fresh
    order after each success. In L2 each pixel left is then moved toward its clean value by ``bisections`` halvings,
    pass after pass, until a pass gains less than ``tolerance`` of the squared distance.
    """

    norm: Norm = L0
    draws: int = 10
    steps: int = 15
    bisections: int = 6
    tolerance: float = 0.01
    chunk: int = 512

    family = "pointwise"
    kind = "minimum"
    knowledge = "decision"
    source = "Schott et al. 2019, arXiv 1805.09190"
    deterministic = False
    queries = "1,300 to 4,100 predictions"
    in_small_steps = False  # every draw is followed by itself

    def search(self, problem: Problem) -> Proposals:
        nearest = self._best_draw(problem, followed)
        if not can_follow(problem.classifier):
            return nearest
        # What was followed to holds, but a pixel may be left that, asked cold, can be reset.
        return take_back(problem, or_else(problem, nearest, self._best_draw), self.chunk)

    def _best_draw(self, problem: Problem, asked: Callable[[Problem], Problem] = lambda cold: cold) -> Proposals:
        """The nearest of all draws, on the problem as ``asked``; what comes back holds for ``problem``."""
        count = len(problem)
        owner = torch.arange(count, device=problem.images.device).repeat(self.draws)  # (draws*B,): draw after draw
        cold = problem.rows(owner)
        runs = asked(cold)  # each draw is followed by itself
        path = salt_and_pepper(cold, [draw for draw in range(self.draws) for _ in range(count)])
        density = first_on_path(
            runs, path, [((step + 1) / self.steps) ** 2 for step in range(self.steps)], bisections=6
        )
        begun = path(torch.arange(len(cold), device=density.device), density.nan_to_num(posinf=0.0))
        if cold.goal.starts is not None:  # where salt and pepper never is what is wanted
            usable = density.isinf() & cold.met(cold.goal.starts.to(begun))
            begun[usable], density[usable] = cold.goal.starts.to(begun)[usable], 1.0
        hit = density.isfinite().nonzero()[:, 0]
        clean, starts = cold.images[hit].cpu(), begun[hit].cpu()
        seeds = [[int(cold.seeds[row]), row // count] for row in hit.tolist()]
        procedures = [
            self._procedure(clean[row], start, np.random.default_rng(seeds[row])) for row, start in enumerate(starts)
        ]
        images = cold.images.clone()
        for row, result in zip(hit.tolist(), run_procedures(runs, procedures, hit.tolist(), self.chunk), strict=True):
            assert result is not None
            images[row] = result.to(images)
        proposals = Proposals(images, density.isfinite())
        if runs is not cold:
            proposals = confirmed(cold, proposals)
        best = Best(problem)
        for draw in torch.arange(len(owner), device=owner.device).split(count):
            best.update(owner[draw], proposals.images[draw], proposals.found[draw])
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
        current = current.clone(memory_format=torch.contiguous_format)
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
