"""Random moves around the nearest adversarial that gradients lead to: for models whose answers jump nearby."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals, draw_normal, draw_uniform, generators, per_image
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.following import confirmed
from absynth.attacks.ramp_projection import RampProjection
from absynth.attacks.search import Best, clean_to, first_on_path
from absynth.errors import InputError
from absynth.norms import L2, LINF, Norm
from absynth.responses import ramp_like


@dataclass(frozen=True)
class LocalSearch(Attack):
    """From the nearest adversarial of boundary projection, shortened to one of ``shares`` of its distance: ``rounds``
    of ``offspring`` random moves within that distance, each from the one of least margin so far. Behind a ramp or a
    threshold it begins at that of ramp projection where this is nearer.

    Gradients see what an answer does in small steps. A classifier that searches may answer otherwise a little aside,
    where its search ends in another valley, and there an adversarial may lie nearer than all that gradients lead to.
    What is found is brought back toward the clean image, and the search goes on from there. Moves are ``sizes`` of the
    distance long, half of them of pixels that differ and of a tenth of the others; they get shorter while no move
    lowers the margin. An evolution strategy, (1+offspring). Every question is asked cold.
    """

    norm: Norm
    shares: tuple[float, ...] = (0.975, 0.93, 0.86)
    rounds: int = 8
    offspring: int = 32
    sizes: tuple[float, ...] = (0.8, 0.4, 0.2, 0.1, 0.05, 0.025)
    chunk: int = 512

    family = "local-search"
    kind = "minimum"
    knowledge = "gradient"
    source = "Rechenberg 1973, Evolutionsstrategie; from the adversarials of absynth's boundary projection"
    deterministic = False
    queries = "about 70 gradients, 850 predictions"
    in_small_steps = False  # its start is followed to, everything else asked cold

    def __post_init__(self) -> None:
        if self.norm not in (L2, LINF):
            raise InputError(f"local-search knows no {self.norm}: use l2 or linf")

    def search(self, problem: Problem) -> Proposals:
        best = Best(problem)
        for attack in self._before(problem):
            start = confirmed(problem, attack.search(problem))
            best.update(torch.arange(len(problem), device=problem.images.device), start.images, start.found)
        begun, rows = best.images.clone(), best.distance.isfinite().nonzero()[:, 0]
        for some in rows.split(max(1, self.chunk // self.offspring)):
            self._walk(problem, best, some)
        # An adversarial at the edge of a jump may be none in another batch, by rounding.
        lost = rows[~problem.rows(rows).met(best.images[rows])]
        best.images[lost] = begun[lost]
        return best.proposals()

    def _before(self, problem: Problem) -> list[Attack]:
        """The attacks whose nearest adversarial the search begins at."""
        behind_a_ramp = ramp_like(problem.classifier) is not None
        return [BoundaryProjection(self.norm), *([RampProjection(self.norm)] if behind_a_ramp else [])]

    def _walk(self, problem: Problem, best: Best, todo: Tensor) -> None:
        """The search of the images ``todo`` (n,), which have an adversarial; what it finds goes to ``best``."""
        sources = generators(problem.seeds[todo.cpu()], stream=1)
        share, tried = torch.zeros_like(todo), torch.zeros_like(todo)  # which of the shares, and its rounds so far
        shares = torch.tensor([*self.shares, 1.0], dtype=torch.float64, device=todo.device)
        parent, radius = _shortened(problem, best, todo, shares[share])
        margin = torch.full((len(todo),), torch.inf, device=todo.device)
        scale = torch.ones_like(margin)
        while len(going := (share < len(self.shares)).nonzero()[:, 0]):
            rows = todo[going]
            moved = self._moves([sources[row] for row in going.tolist()], parent[going], radius[going], scale[going])
            images = (problem.images[rows, None] + moved).clamp(0, 1)  # (n,o,C,H,W)
            asked = problem.rows(rows.repeat_interleave(self.offspring))
            margins, least = asked.margin(images.flatten(0, 1)).view(len(rows), -1).nan_to_num(torch.inf).min(1)
            child = images[torch.arange(len(rows), device=rows.device), least]
            better = margins < margin[going]
            parent[going[better]] = (child - problem.images[rows])[better]
            margin[going] = torch.minimum(margin[going], margins)
            scale[going] = torch.where(better, 1.3, 0.7).to(scale) * scale[going]
            scale[going] = torch.where(scale[going] < 0.1, 1.0, scale[going].clamp(max=1))
            tried[going] += 1
            nearer = margins <= 0
            nearer[nearer.clone()] = _back(problem, best, rows[nearer], child[nearer])
            given_up = (tried[going] >= self.rounds) & ~nearer
            share[going[given_up]] += 1
            anew = going[nearer | given_up]
            tried[anew], scale[anew], margin[anew] = 0, 1.0, torch.inf
            parent[anew], radius[anew] = _shortened(problem, best, todo[anew], shares[share[anew]])

    def _moves(self, sources: list[torch.Generator], parent: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
        """Random perturbations (n,o,C,H,W) around ``parent`` (n,C,H,W), none larger than its ``radius`` (n,)."""
        like = parent[:, None].expand(-1, self.offspring, *parent.shape[1:])
        noise = draw_normal(sources, like)
        few = (like != 0) | (draw_uniform(sources, like) < 0.1)
        few[:, ::2] = True
        unit = parent[0].numel() ** 0.5 if self.norm == L2 else 1.0  # noise in all pixels is about so long
        sizes = torch.tensor(self.sizes, device=parent.device).repeat_interleave(2)
        sizes = sizes.repeat(-(-self.offspring // len(sizes)))[: self.offspring]
        length = per_image(radius * scale.double() / unit, parent)[:, None] * sizes.view(1, -1, 1, 1, 1)
        moved = like + length * noise * few
        flat = self.norm.project(moved.flatten(0, 1), radius.repeat_interleave(self.offspring))
        return flat.view_as(moved)


def _shortened(problem: Problem, best: Best, rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The perturbations (n,C,H,W) of the best adversarials, at a ``share`` (n,) of their distance, and that
    distance."""
    delta = best.images[rows] - problem.images[rows]
    return per_image(share, delta) * delta, share * best.distance[rows]


def _back(problem: Problem, best: Best, rows: Tensor, found: Tensor) -> Tensor:
    """Adversarials ``found`` (n,C,H,W) of the images ``rows``, as near as the way to the clean image allows. Returns
    which are nearer than the best so far (n,)."""
    nearer = torch.zeros_like(rows, dtype=torch.bool)
    if len(rows):
        part = problem.rows(rows)
        path = clean_to(part, found)
        position = first_on_path(part, path, [0.9, 0.95, 0.98, 1.0], bisections=6)
        hit = position.isfinite().nonzero()[:, 0]  # asked anew: not one whose answer depends on the batch
        nearer[hit] = best.update(rows[hit], path(hit, position[hit]), torch.ones_like(hit, dtype=torch.bool))
    return nearer
