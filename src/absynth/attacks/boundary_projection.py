"""The project's strongest attack on smooth models: project the clean image onto the linearized decision boundary,
repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Problem, Proposals, per_image
from absynth.attacks.confirming import what_holds
from absynth.attacks.following import confirmed, or_else
from absynth.attacks.greedy import greedy_flips
from absynth.attacks.projection import onto_halfspace
from absynth.attacks.queries import Following, can_follow
from absynth.attacks.resetting import take_back
from absynth.attacks.search import Best, clean_to, first_on_path, toward_clean
from absynth.norms import L0, Norm
from absynth.responses import threshold_of

#: Shares of the way to an adversarial that was followed to, at which the classifier is asked cold.
EARLIER = (0.75, 0.92)


@dataclass(frozen=True)
class BoundaryProjection(Attack):
    """The nearest point of the linearized boundary to the clean image, within the box, iterated to a fixed point.

    At the current image the margin to one rival class is linearized; the *clean* image is projected onto the half-space
    where it is negative, exactly and within [0,1]; the next image is that point, a little past the boundary, and
    farther past it with each step that finds nothing; where that does not help either, the steps go on from the image
    they have led to, as DeepFool's do. At a fixed point the image is a stationary point of the
    smallest-perturbation problem. A step that does not improve on the best adversarial of its run goes back to it and
    halves the way. Of the ``candidates`` likeliest rivals, the ``targets`` whose linearized boundaries are nearest have
    a run each; a run that is ``behind`` times as far as the image's best after ``head_start`` steps, or that has not
    improved for ``patience`` steps, is ended. A classifier that searches starts from what it found for a run's last
    image; about the nearest run it is asked again, cold, at its end and on the way there (behind a threshold: about all
    runs), and an image of which nothing came is searched cold. Needs no step size. Works for L0 too, where the
    projection uses up pixels in the order of their gain; images on which it finds nothing get greedy flips.

    Source: this project; close to FAB (Croce & Hein 2020, arXiv 1907.02044), which mixes in a projection of the current
    image.
    """

    norm: Norm
    steps: int = 40
    targets: int = 4
    candidates: int = 9
    overshoot: float = 0.02
    head_start: int = 5
    behind: float = 1.15
    patience: int = 8
    bisections: int = 10

    family = "boundary-projection"
    kind = "minimum"
    knowledge = "gradient"
    source = "absynth; after Croce & Hein 2020, arXiv 1907.02044"
    deterministic = True
    queries = "about 60 gradients, 15 predictions"
    in_small_steps = False  # its runs are followed, several an image

    def search(self, problem: Problem) -> Proposals:
        if not can_follow(problem.classifier):
            return self._cold(problem)
        return or_else(problem, self._followed(problem), self._cold)

    def _cold(self, problem: Problem) -> Proposals:
        owner, rivals = self._runs(problem)
        best = self._approach(problem.rows(owner), rivals, owner)
        run = _nearest_runs(best, len(problem))
        return self._finished(problem, Proposals(best.images[run], best.distance[run].isfinite()))

    def _followed(self, problem: Problem) -> Proposals:
        """The same on a classifier that starts from its last answers; what it says of the nearest runs is asked again,
        cold."""
        following = Following(problem.classifier, len(problem))
        owner, rivals = self._runs(replace(problem, classifier=following))
        runs = replace(problem.rows(owner), classifier=following.several(owner))
        said, held = self._approach(runs, rivals, owner), Best(problem)
        if threshold_of(problem.classifier) is not None:
            # Pixels jump across a threshold: answers that follow say little of cold ones near the boundary.
            return self._finished(problem, _nearest_held(problem, said, owner))
        for _ in range(self.targets):
            # First the nearest run of each image, then one that is nearer than what held, which is rare.
            said.distance[said.distance >= held.distance[owner]] = torch.inf
            run = _nearest_runs(said, len(problem))
            todo = said.distance[run].isfinite().nonzero()[:, 0]
            if not len(todo):
                break
            run = run[todo]
            finished = self._finished(runs.rows(run), Proposals(said.images[run], torch.ones_like(todo).bool()))
            part = problem.rows(todo)
            found = what_holds(part, finished)
            held.update(todo, found.images, found.found)
            if self.norm != L0:
                nearer = _nearer(part, found)
                held.update(todo, nearer.images, nearer.found)
            said.distance[run] = torch.inf
        return held.proposals()

    def _finished(self, problem: Problem, nearest: Proposals) -> Proposals:
        """What the projections led to, moved to the very boundary; L0: with the pixels reset that can be."""
        if self.norm == L0:
            return take_back(problem, or_else(problem, nearest, greedy_flips))
        return toward_clean(problem, nearest, self.bisections)

    def _approach(self, runs: Problem, rivals: Tensor, owner: Tensor) -> Best:
        """The projections, iterated, for R runs: each toward a rival (R,), with the image ``owner`` (R,)."""
        best = Best(runs)
        x = runs.images.clone()
        # The share of the way from the best adversarial to the projection: 1, halved where a step did not improve.
        share = torch.ones(len(runs), dtype=torch.float64, device=x.device)
        # How far past the linearized boundary: doubled while nothing is found, where the boundary curves away.
        beyond = torch.full_like(share, self.overshoot / 2)
        stale = torch.zeros(len(runs), dtype=torch.int64, device=x.device)
        todo = torch.arange(len(runs), device=x.device)
        for step in range(self.steps):
            part = runs.rows(todo)
            margin, gradient, met = self._linearize(part, x[todo], rivals[todo])
            improved = best.update(todo, x[todo], met)
            stale[todo] = torch.where(improved, 0, stale[todo] + 1)
            share[todo] = torch.where(improved, (2 * share[todo]).clamp(max=1), share[todo])
            # Linearized at x, the margin at the clean image is margin − gradient·(x − clean).
            moved = ((x[todo] - part.images).double() * gradient.double()).flatten(1).sum(1)
            delta, _ = onto_halfspace(self.norm, part.images, gradient, margin.double() - moved)
            beyond[todo] = torch.where(best.distance[todo].isinf(), (2 * beyond[todo]).clamp(max=1), self.overshoot)
            goal = (part.images + (1 + per_image(beyond[todo], delta)) * delta).clamp(0, 1)
            # From the clean image such a run may go round in circles: go on from where it is.
            stuck = (best.distance[todo].isinf() & (beyond[todo] >= 1)).nonzero()[:, 0]
            if len(stuck):
                here = x[todo[stuck]]
                delta, _ = onto_halfspace(self.norm, here, gradient[stuck], margin[stuck].double())
                goal[stuck] = (here + (1 + self.overshoot) * delta).clamp(0, 1)
            lost = best.distance[todo].isfinite() & ~improved
            share[todo] = torch.where(lost, (share[todo] / 2).clamp(min=1 / 64), share[todo])
            base = torch.where(per_image(best.distance[todo].isfinite(), x) > 0, best.images[todo], x[todo])
            x[todo] = goal if self.norm == L0 else base + per_image(share[todo], x) * (goal - base)
            todo = todo[self._going(best, owner, stale, step)[todo]]
            if not len(todo):
                break
        if len(todo):
            best.update(todo, x[todo], runs.rows(todo).met(x[todo]))
        return best

    def _runs(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The image (R,) and the rival class (R,) of every run; with a target the rival is found anew at each step."""
        count = len(problem)
        if problem.goal.toward:
            return torch.arange(count, device=problem.images.device), problem.goal.classes
        logits, ranked = problem.ranked_rivals(problem.images, self.candidates)
        classes = torch.cat([problem.goal.classes.unsqueeze(1), ranked], dim=1)  # (B,1+k)
        _, jacobian = problem.logits_and_jacobian(problem.images, classes)
        picked = logits.gather(1, classes)
        margins = (picked[:, :1] - picked[:, 1:]).flatten()  # (B,k) -> (B*k,)
        gradients = (jacobian[:, :1] - jacobian[:, 1:]).flatten(0, 1)  # (B,k,C,H,W) -> (B*k,C,H,W)
        delta, reached = onto_halfspace(
            self.norm, problem.images.repeat_interleave(ranked.shape[1], dim=0), gradients, margins
        )
        length = torch.where(reached, self.norm.size(delta), torch.inf).view_as(ranked)
        targets = min(self.targets, ranked.shape[1])
        rivals = ranked.gather(1, length.topk(targets, dim=1, largest=False).indices)  # (B,targets)
        return torch.arange(count, device=rivals.device).repeat_interleave(targets), rivals.flatten()

    def _linearize(self, problem: Problem, x: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Margin (n,) to the rival and its gradient (n,C,H,W) at x, and whether the goal is met there (n,)."""
        x = x.detach().requires_grad_()
        logits = problem.classifier(x)
        own = logits.gather(1, problem.goal.classes.unsqueeze(1)).squeeze(1)
        if problem.goal.toward:
            margin = problem.goal.margin(logits)
        else:
            margin = own - logits.gather(1, rivals.unsqueeze(1)).squeeze(1)
        margin = margin + problem.goal.slack
        (gradient,) = torch.autograd.grad(margin.sum(), x)
        return (
            margin.detach(),
            torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0),
            problem.goal.met(logits.detach()),
        )

    def _going(self, best: Best, owner: Tensor, stale: Tensor, step: int) -> Tensor:
        """Which runs (R,) go on."""
        nearest = torch.full_like(best.distance, torch.inf).scatter_reduce(0, owner, best.distance, "amin")[owner]
        lagging = (best.distance > self.behind * nearest) & (step >= self.head_start)
        return ~lagging & ((stale < self.patience) | best.distance.isinf())


def _nearest_held(problem: Problem, said: Best, owner: Tensor) -> Proposals:
    """The nearest run of each image, of what holds when every run, of image ``owner`` (R,), is asked again, cold."""
    runs = problem.rows(owner)
    asked, held = confirmed(runs, said.proposals()), Best(runs)
    held.update(torch.arange(len(owner), device=owner.device), asked.images, asked.found)
    run = _nearest_runs(held, len(problem))
    return Proposals(held.images[run], held.distance[run].isfinite())


def _nearer(problem: Problem, found: Proposals) -> Proposals:
    """Adversarials on the way to what was ``found`` by following: a cold search can fail where one that follows does
    not."""
    path = clean_to(problem, found.images)
    position = first_on_path(problem, path, EARLIER, bisections=6, limit=torch.where(found.found, 1.0, 0.0).double())
    hit = position.isfinite().nonzero()[:, 0]
    images = problem.images.clone()
    images[hit] = path(hit, position[hit])
    return Proposals(images, position.isfinite())


def _nearest_runs(best: Best, count: int) -> Tensor:
    """The run of each image (B,) that came nearest; all images have as many, one after the other."""
    distance = best.distance.view(count, -1)  # (B*T,) -> (B,T)
    first = torch.arange(count, device=distance.device) * distance.shape[1]
    return first + distance.argmin(1)
