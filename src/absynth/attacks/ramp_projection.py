"""Boundary projection through a saturating response, solved exactly pixel by pixel; and a greedy L0 attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals, draw_normal, generators, per_image
from absynth.attacks.following import or_else
from absynth.attacks.greedy import greedy_flips
from absynth.attacks.ramp import onto_halfspace, through, tighten
from absynth.attacks.resetting import take_back
from absynth.attacks.search import Best, bisect
from absynth.norms import L0, Norm
from absynth.responses import Ramp


@dataclass
class Lines:
    """Margins linear in the response, one a run: margin(x) = ``clean`` + ``gradient`` . (y(x) - y(clean image)), where
    y is the image of the same response on the ramp."""

    gradient: Tensor  # (R,C,H,W)
    clean: Tensor  # (R,) float64: at the clean image

    def toward(self, other: Lines, share: Tensor) -> Lines:
        """The share (R,) of the way to other margins."""
        return Lines(
            self.gradient + per_image(share, self.gradient) * (other.gradient - self.gradient),
            self.clean + share * (other.clean - self.clean),
        )

    def rows(self, index: Tensor) -> Lines:
        """Those of some runs."""
        return Lines(self.gradient[index], self.clean[index])

    def put(self, index: Tensor, other: Lines) -> None:
        """Replace those of some runs."""
        self.gradient[index], self.clean[index] = other.gradient, other.clean


@dataclass(frozen=True)
class RampProjection(Attack):
    """The nearest image of the linearized boundary, through the ramp and within the box, iterated to a fixed point.

    As ``BoundaryProjection``, but the margin is linearized in the response, with its gradient on the ramp, and the
    clean image is projected with what every pixel really gains: it stays where it is, or jumps onto the ramp and moves
    there. A step that does not improve on the best adversarial of its run mixes its margin with the one that led there,
    half and half, then less. A run that finds nothing however far past the boundary it goes is led on from the image it
    has come to. In the end the margin asked for is bisected. ``restarts`` adds runs from random images
    whose pixels lie inside the ramp. A threshold is taken for a steep ramp; for a model that has neither this is
    another boundary projection. Every question is asked cold, at three times the price: a search that follows an image
    keeps the true class's explanation for longer than a cold one finds it, and ends up to a third farther away.
    """

    norm: Norm
    steps: int = 40
    targets: int = 4
    candidates: int = 9
    restarts: int = 0
    overshoot: float = 0.02
    noise: float = 0.3  # of the starts inside the ramp, in units of the response
    patience: int = 12
    bisections: int = 10

    family = "ramp-projection"
    kind = "minimum"
    knowledge = "gradient"
    source = "absynth; after Croce & Hein 2020, arXiv 1907.02044"
    for_ramps = True
    for_thresholds = True
    in_small_steps = False  # what follows misses the nearest

    @property
    def deterministic(self) -> bool:
        """Random only in the restarts."""
        return self.restarts == 0

    @property
    def queries(self) -> str:
        """Gradients of all runs, and the final bisection."""
        return f"about {60 * (1 + self.restarts)} gradients, 15 predictions"

    def search(self, problem: Problem) -> Proposals:
        aware, ramp = through(problem)
        owner, rivals = self._runs(aware, ramp)  # (R,), (R,)
        runs = aware.rows(owner)
        best, x = Best(runs), self._starts(runs, ramp, len(problem))
        share = torch.ones(len(runs), dtype=torch.float64, device=x.device)
        beyond = torch.full_like(share, self.overshoot / 2)
        stale = torch.zeros(len(runs), dtype=torch.int64, device=x.device)
        made = Lines(torch.zeros_like(x), torch.zeros_like(share))  # what led to x
        led = Lines(torch.zeros_like(x), torch.zeros_like(share))  # what led to the best of each run
        todo = torch.arange(len(runs), device=x.device)
        for _ in range(self.steps):
            lines, met = self._linearize(runs.rows(todo), ramp, x[todo], rivals[todo])
            improved = best.update(todo, x[todo], met)
            led.put(todo[improved], made.rows(todo[improved]))
            found = best.distance[todo].isfinite()
            share[todo] = torch.where(improved, (2 * share[todo]).clamp(max=1), share[todo])
            share[todo] = torch.where(found & ~improved, (share[todo] / 2).clamp(min=1 / 64), share[todo])
            beyond[todo] = torch.where(found, self.overshoot, (2 * beyond[todo]).clamp(max=1))
            stale[todo] = torch.where(improved, 0, stale[todo] + 1)
            mixed = led.rows(todo).toward(lines, torch.where(found, share[todo], 1.0))
            made.put(todo, mixed)
            x[todo] = self._next(runs.images[todo], ramp, mixed, beyond[todo], x[todo], lines, found)
            todo = todo[(stale[todo] < self.patience) | best.distance[todo].isinf()]
            if not len(todo):
                break
        if len(todo):
            improved = best.update(todo, x[todo], runs.rows(todo).met(x[todo]))
            led.put(todo[improved], made.rows(todo[improved]))
        return self._finish(problem, ramp, best, led, owner, beyond)

    def _finish(self, problem: Problem, ramp: Ramp, best: Best, led: Lines, owner: Tensor, beyond: Tensor) -> Proposals:
        """The nearest run of each image, with as little of the margin as it takes."""
        count = len(owner) // len(problem)
        nearest = best.distance.view(-1, count).argmin(1) + count * torch.arange(len(problem), device=owner.device)
        proposals = Proposals(best.images[nearest], best.distance[nearest].isfinite())
        lines, factor = led.rows(nearest), 1 + beyond[nearest]

        def path(rows: Tensor, position: Tensor) -> Tensor:
            return self._project(problem.images[rows], ramp, lines.rows(rows), factor[rows] * position)

        # a start that was adversarial as it was has no margin that led to it
        whole = torch.ones_like(factor)
        shorter = path(torch.arange(len(problem), device=owner.device), whole)
        usable = proposals.found & problem.met(shorter)
        high = torch.where(usable, whole, torch.inf)
        position = bisect(problem, path, torch.zeros_like(high), high, self.bisections)
        overall = Best(problem)
        everything = torch.arange(len(problem), device=owner.device)
        overall.update(everything, proposals.images, proposals.found)
        rows = usable.nonzero().squeeze(1)
        overall.update(rows, path(rows, position[rows]), torch.ones_like(rows, dtype=torch.bool))
        if self.norm == L0:
            return take_back(problem, or_else(problem, overall.proposals(), greedy_flips))
        return tighten(problem, overall.proposals(), ramp)

    def _project(self, images: Tensor, ramp: Ramp, lines: Lines, factor: Tensor) -> Tensor:
        delta, _ = onto_halfspace(self.norm, ramp, images, lines.gradient, lines.clean * factor)
        return (images + delta).clamp(0, 1)

    def _next(
        self, images: Tensor, ramp: Ramp, mixed: Lines, beyond: Tensor, x: Tensor, lines: Lines, found: Tensor
    ) -> Tensor:
        """The clean images projected, or, where that has led nowhere (it may go round in circles), the images x."""
        goal = self._project(images, ramp, mixed, 1 + beyond)
        stuck = (~found & (beyond >= 1)).nonzero()[:, 0]
        if len(stuck):
            here, gradient = x[stuck], lines.gradient[stuck]
            moved = (ramp(here).double() - ramp(images[stuck]).double()) / ramp.slope
            margin = lines.clean[stuck] + (moved * gradient.double()).flatten(1).sum(1)
            goal[stuck] = self._project(
                here, ramp, Lines(gradient, margin), torch.full_like(margin, 1 + self.overshoot)
            )
        return goal

    def _starts(self, runs: Problem, ramp: Ramp, images: int) -> Tensor:
        """Of every run, as many for each of the ``images``: the clean image, or one with noise in its response and all
        pixels on the ramp."""
        x = runs.images.clone()
        which = torch.arange(len(runs), device=x.device) % (len(runs) // images)  # of an image's runs
        rows = (which % (1 + self.restarts) > 0).nonzero().squeeze(1)
        if len(rows):
            noise = torch.cat(
                [draw_normal(generators(runs.seeds[[row]], int(which[row])), x[:1]) for row in rows.tolist()]
            )
            x[rows] = ramp.inverse((ramp(x[rows]) + self.noise * noise).clamp(0, 1))
        return x

    def _runs(self, problem: Problem, ramp: Ramp) -> tuple[Tensor, Tensor]:
        """The image (R,) and the rival class (R,) of every run; with a target the rival is found anew at each step."""
        device = problem.images.device
        images = torch.arange(len(problem), device=device)
        if problem.goal.toward:
            owner = images.repeat_interleave(1 + self.restarts)
            return owner, problem.goal.classes[owner]
        logits, ranked = problem.ranked_rivals(problem.images, self.candidates)
        classes = torch.cat([problem.goal.classes.unsqueeze(1), ranked], dim=1)  # (B,1+k)
        _, jacobian = problem.logits_and_jacobian(problem.images, classes)
        picked = logits.gather(1, classes)
        margins = (picked[:, :1] - picked[:, 1:]).flatten()  # (B,k) -> (B*k,)
        gradients = (jacobian[:, :1] - jacobian[:, 1:]).flatten(0, 1)  # (B,k,C,H,W) -> (B*k,C,H,W)
        clean = problem.images.repeat_interleave(ranked.shape[1], dim=0)
        delta, reached = onto_halfspace(self.norm, ramp, clean, gradients, margins)
        length = torch.where(reached, self.norm.size(delta), torch.inf).view_as(ranked)
        targets = min(self.targets, ranked.shape[1])
        rivals = ranked.gather(1, length.topk(targets, dim=1, largest=False).indices)  # (B,targets)
        runs = targets * (1 + self.restarts)
        return images.repeat_interleave(runs), rivals.repeat_interleave(1 + self.restarts, dim=1).flatten()

    def _linearize(self, problem: Problem, ramp: Ramp, x: Tensor, rivals: Tensor) -> tuple[Lines, Tensor]:
        """The margins to the rivals (n,), linearized at x, and whether the goal is met there (n,)."""
        x = x.detach().requires_grad_()
        logits = problem.classifier(x)
        own = logits.gather(1, problem.goal.classes.unsqueeze(1)).squeeze(1)
        if problem.goal.toward:
            margin = problem.goal.margin(logits)
        else:
            margin = own - logits.gather(1, rivals.unsqueeze(1)).squeeze(1)
        margin = margin + problem.goal.slack
        (gradient,) = torch.autograd.grad(margin.sum(), x)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        moved = (ramp(x.detach()).double() - ramp(problem.images).double()) / ramp.slope
        clean = margin.detach().double() - (moved * gradient.double()).flatten(1).sum(1)
        return Lines(gradient, clean), problem.goal.met(logits.detach())


@dataclass(frozen=True)
class RampGreedy(Attack):
    """Pixel by pixel, the one that gains most by going to an end of the ramp, with a fresh gradient for each; then
    every pixel that can be reset is reset."""

    steps: int = 80
    norm: Norm = field(default=L0, repr=False)

    family = "ramp-greedy"
    kind = "minimum"
    knowledge = "gradient"
    source = "absynth; after Papernot et al. 2016, arXiv 1511.07528"
    deterministic = True
    queries = "as many gradients as pixels, 50 predictions"
    in_small_steps = False  # what follows misses the nearest
    for_ramps = True
    for_thresholds = True

    def search(self, problem: Problem) -> Proposals:
        aware, ramp = through(problem)
        best = Best(problem)
        todo = torch.arange(len(problem), device=problem.images.device)
        x = problem.images.clone()
        for _ in range(self.steps + 1):
            margin, gradient = aware.rows(todo).margin_and_gradient(x[todo])
            best.update(todo, x[todo], margin <= 0)
            todo, gradient = todo[margin > 0], gradient[margin > 0]
            if not len(todo):
                break
            clean, current = problem.images[todo], x[todo]
            seen = (gradient < 0).to(x.dtype)  # white where that lowers the margin, else black
            gains = (gradient * (seen - ramp(clean))).abs() * (current == clean)
            pixel = gains.flatten(1).argmax(1, keepdim=True)
            moved = current.flatten(1).scatter(1, pixel, ramp.nearest(clean, seen).flatten(1).gather(1, pixel))
            x[todo] = moved.view_as(current)
        return take_back(problem, best.proposals())
