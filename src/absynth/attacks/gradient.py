"""Gradient attacks of the paper: the fast gradient step, its iterated forms with momentum and restarts, and
DeepFool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from absynth.attacks.base import (
    Attack,
    BudgetAttack,
    Problem,
    Proposals,
    draw_normal,
    draw_uniform,
    generators,
    per_image,
)
from absynth.attacks.projection import onto_halfspace
from absynth.attacks.search import Best, clean_to, first_on_path, toward_clean
from absynth.norms import L2, LINF, Norm


@dataclass(frozen=True)
class FastGradient(Attack):
    """One step along the steepest direction of the margin at the clean image, as short as it can be (FGM; FGSM in L∞).

    The length is the first of ``steps`` positions, spaced quadratically up to the largest that makes sense, that is
    adversarial, then bisected. The margin (true class against its best rival) takes the place of the cross-entropy,
    whose gradient vanishes where a model is certain.
    """

    norm: Norm
    steps: int = 100
    bisections: int = 10

    kind = "minimum"
    knowledge = "gradient"
    source = "Goodfellow et al. 2015, arXiv 1412.6572"
    deterministic = True
    queries = "1 gradient, up to 110 predictions"

    @property
    def family(self) -> str:
        """FGSM in L∞, where the step is the sign; FGM otherwise."""
        return "fgsm" if self.norm == LINF else "fgm"

    def search(self, problem: Problem) -> Proposals:
        _, gradient = problem.margin_and_gradient(problem.images)
        far = problem.images + self.norm.steepest(-gradient, self.norm.largest(problem.images))
        path = clean_to(problem, far)
        grid = [((step + 1) / self.steps) ** 2 for step in range(self.steps)]
        position = first_on_path(problem, path, grid, self.bisections)
        best = Best(problem)
        hit = position.isfinite().nonzero().squeeze(1)
        best.update(hit, path(hit, position[hit]), torch.ones_like(hit, dtype=torch.bool))
        return best.proposals()


@dataclass(frozen=True)
class ProjectedGradient(BudgetAttack):
    """Steps along the steepest direction of the margin, projected onto the ball and the box: BIM, MIM and PGD in one
    loop.

    ``relative_step`` is in units of the radius. ``momentum`` > 0 accumulates L1-normalized gradients (MIM).
    ``restarts`` > 0 adds runs from random points of the ball to the one from the clean image. An image is done at its
    first adversarial. Give a ``radius``, or wrap it in ``SmallestRadius``.
    """

    norm: Norm
    radius: float | None = None
    steps: int = 10
    relative_step: float = 0.2
    momentum: float = 0.0
    restarts: int = 0
    called: str = "pgd"

    knowledge = "gradient"

    @property
    def family(self) -> str:
        """What the literature calls this setting."""
        return self.called

    @property
    def deterministic(self) -> bool:
        """Random only in the restarts."""
        return self.restarts == 0

    @property
    def source(self) -> str:
        """BIM, MIM or PGD."""
        if self.momentum:
            return "Dong et al. 2018, arXiv 1710.06081"
        return "Madry et al. 2018, arXiv 1706.06083" if self.restarts else "Kurakin et al. 2017, arXiv 1607.02533"

    @property
    def queries(self) -> str:
        """Gradients in one attempt."""
        return f"up to {self.steps * (self.restarts + 1)} gradients"

    def attempt(self, problem: Problem, radius: Tensor) -> Proposals:
        best = Best(problem)
        for restart in range(self.restarts + 1):
            todo = best.distance.isinf().nonzero().squeeze(1)
            if not len(todo):
                break
            self._run(problem, radius.to(problem.images.device), todo, restart, best)
        return best.proposals()

    def _run(self, problem: Problem, radius: Tensor, todo: Tensor, restart: int, best: Best) -> None:
        x = problem.images[todo]
        if restart:
            x = (x + self._random_start(problem.rows(todo), radius[todo], restart)).clamp(0, 1)
        velocity = torch.zeros_like(x)
        for _ in range(self.steps):
            margin, gradient = problem.rows(todo).margin_and_gradient(x)
            best.update(todo, x, margin <= 0)
            going = margin > 0
            todo, x, gradient, velocity = todo[going], x[going], gradient[going], velocity[going]
            if not len(todo):
                return
            mean = gradient.abs().flatten(1).mean(1).clamp(min=1e-38)
            velocity = self.momentum * velocity - gradient / per_image(mean, gradient)
            clean, limit = problem.images[todo], radius[todo].to(x.dtype)
            # A pixel at an edge of the box that wants out would waste the step, in L1 all of it.
            stuck = ((x <= 0) & (velocity < 0)) | ((x >= 1) & (velocity > 0))
            x = x + self.norm.steepest(velocity.masked_fill(stuck, 0), self.relative_step * limit)
            x = (clean + self.norm.project(x - clean, limit)).clamp(0, 1)
        best.update(todo, x, problem.rows(todo).met(x))

    def _random_start(self, problem: Problem, radius: Tensor, restart: int) -> Tensor:
        sources = generators(problem.seeds, restart)
        if self.norm == LINF:
            return (2 * draw_uniform(sources, problem.images) - 1) * per_image(radius, problem.images)
        direction = draw_normal(sources, problem.images)
        share = torch.stack([torch.rand((), generator=source) for source in sources]).to(radius)
        return self.norm.project(direction * per_image(radius, direction), radius * share)


@dataclass(frozen=True)
class DeepFool(Attack):
    """Jump again and again to the nearest boundary of the linearized classifier, then bisect back to the clean image.

    Each step projects the current image onto the nearest of the linearized boundaries to the ``candidates`` likeliest
    other classes, and goes ``overshoot`` too far. With a target there is one boundary.
    """

    norm: Norm = L2
    steps: int = 50
    candidates: int = 9
    overshoot: float = 0.02
    bisections: int = 10

    family = "deepfool"
    kind = "minimum"
    knowledge = "gradient"
    source = "Moosavi-Dezfooli et al. 2016, arXiv 1511.04599"
    deterministic = True
    queries = "3 to 50 steps of 10 gradients, 10 predictions"

    def search(self, problem: Problem) -> Proposals:
        best = Best(problem)
        todo = torch.arange(len(problem), device=problem.images.device)
        x = problem.images.clone()
        own = problem.goal.classes
        _, rivals = problem.ranked_rivals(x, self.candidates)  # (B,k): those of the clean image, to the end
        for step in range(self.steps + 1):
            part = problem.rows(todo)
            if problem.goal.toward:  # away from whichever class is ahead of the target now
                margin, gradient = part.margin_and_gradient(x)
                margins, gradients = margin.unsqueeze(1), gradient.unsqueeze(1)
                met = margin <= 0
            else:
                classes = torch.cat([own[todo].unsqueeze(1), rivals[todo]], dim=1)  # (n,1+k)
                logits, jacobian = part.logits_and_jacobian(x, classes)
                picked = logits.gather(1, classes)
                margins = picked[:, :1] - picked[:, 1:] + problem.goal.slack  # (n,k)
                gradients = jacobian[:, :1] - jacobian[:, 1:]  # (n,k,C,H,W)
                met = part.goal.met(logits)
            best.update(todo, x, met)
            todo, x, margins, gradients = todo[~met], x[~met], margins[~met], gradients[~met]
            if not len(todo) or step == self.steps:
                break
            x = self._nearest_step(x, margins, gradients)
        return toward_clean(problem, best.proposals(), self.bisections)

    def _nearest_step(self, x: Tensor, margins: Tensor, gradients: Tensor) -> Tensor:
        """Project each image onto the nearest of its k linearized boundaries, within the box."""
        count = margins.shape[1]
        start = x.repeat_interleave(count, dim=0)  # (n,C,H,W) -> (n*k,C,H,W)
        moves, reached = onto_halfspace(self.norm, start, gradients.flatten(0, 1), margins.flatten())
        length = torch.where(reached, self.norm.size(moves), torch.inf).view(-1, count)
        moves = moves.view(-1, count, *x.shape[1:])[torch.arange(len(x), device=x.device), length.argmin(1)]
        return (x + (1 + self.overshoot) * moves).clamp(0, 1)
