"""Gradients from predictions alone: a classifier whose backward pass asks for coordinate-wise differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.queries import Following, can_follow, rows_of
from absynth.attacks.wrapping import Wrapping
from absynth.candidates import chunk_size

PLAIN_CHUNK = 256  # images a network is asked about at once: its activations stay in a CPU's cache then


@dataclass(frozen=True)
class EstimatedGradient:
    """``classifier`` with its gradient replaced by central differences, so that every gradient attack runs on it
    unchanged.

    Each coordinate is moved by the smallest of ``step_sizes`` both ways; at the edges of [0,1] the step is cut short
    and the difference divided by the way really gone (one-sided in the limit). A coordinate that changes no logit is
    tried with the next larger step, since a threshold in the model hides small ones. One gradient costs 2 predictions
    per coordinate and step size, 1 at the edges, asked in chunks of ``chunk`` images (larger ones on a GPU), and serves
    every class. Source: Schott et al. 2019, section 4.
    """

    classifier: Callable[[Tensor], Tensor]
    step_sizes: tuple[float, ...] = (0.02, 0.1, 0.5)
    chunk: int = 1024

    def select(self, rows: Tensor) -> EstimatedGradient:
        """The same classifier for the images ``rows`` (n,) of the batch."""
        return EstimatedGradient(rows_of(self.classifier, rows), self.step_sizes, self.chunk)

    def __call__(self, images: Tensor) -> Tensor:
        """(B,C,H,W) -> logits (B,K); the gradient with respect to ``images`` is estimated when it is asked for."""
        logits: Tensor = _Differences.apply(images, self)  # type: ignore[no-untyped-call]
        return logits

    def jacobian(self, images: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,K,N): the estimated derivative of each logit by each of the N coordinates."""
        flat = images.flatten(1)  # (B,C,H,W) -> (B,N)
        count, size = flat.shape
        # Every coordinate of every image is open until a step shows a change.
        row = torch.arange(count, device=flat.device).repeat_interleave(size)  # (B*N,)
        column = torch.arange(size, device=flat.device).repeat(count)  # (B*N,)
        slopes: Tensor | None = None
        together = max(2, chunk_size(self.chunk, images))
        for step in sorted(self.step_sizes):
            undecided = []
            here = flat[row, column]
            above, below = (here + step).clamp(max=1), (here - step).clamp(min=0)
            # A coordinate's two questions are asked together, and at the edge of [0,1] one of them is not asked at all.
            questions = (above > here).long() + (below < here).long()
            part = (questions.cumsum(0) - 1) // together
            for rows, columns, upper_value, lower_value, value in zip(
                *(values.split(part.bincount().tolist()) for values in (row, column, above, below, here)), strict=True
            ):
                upper, lower = self._neighbors(images, rows, columns, (upper_value, lower_value, value))
                change = upper - lower
                if slopes is None:
                    slopes = change.new_zeros(count, size, change.shape[1])  # (B,N,K)
                slopes[rows, columns] = change / (upper_value - lower_value).unsqueeze(1)
                rounding = 4 * torch.finfo(change.dtype).eps * upper.abs().amax(1)
                undecided.append(change.abs().amax(1) <= rounding)
            keep = torch.cat(undecided)
            row, column = row[keep], column[keep]
            if not len(row):
                break
        assert slopes is not None
        return slopes.transpose(1, 2)

    def _neighbors(
        self, images: Tensor, rows: Tensor, columns: Tensor, values: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The logits, 2 x (n,K), where coordinate ``columns`` (n,) of image ``rows`` (n,) has the first and the second
        of ``values`` instead of the third, which it has."""
        above, below, here = values
        up, down = (above > here).nonzero()[:, 0], (below < here).nonzero()[:, 0]
        moved, value = torch.cat([up, down]), torch.cat([above[up], below[down]])
        # One that does not move one way has the image's own answer there, asked in the same batch: a search may answer
        # a little differently in another.
        edge = ((above <= here) | (below >= here)).nonzero()[:, 0]
        still, center = rows[edge].unique(return_inverse=True)
        asked = images.flatten(1)[torch.cat([rows[moved], still])]  # (m,N)
        asked[torch.arange(len(moved), device=asked.device), columns[moved]] = value
        answers = self._ask(asked.view(-1, *images.shape[1:]), torch.cat([rows[moved], still]))  # (m,K)
        upper, lower = answers.new_empty(2, len(rows), answers.shape[1])
        upper[up], lower[down] = answers[: len(up)], answers[len(up) : len(moved)]
        own = answers[len(moved) + center]
        upper[edge] = torch.where((above > here)[edge].unsqueeze(1), upper[edge], own)
        lower[edge] = torch.where((below < here)[edge].unsqueeze(1), lower[edge], own)
        return upper, lower

    def _ask(self, images: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return rows_of(self.classifier, rows)(images).float()


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, estimator: EstimatedGradient) -> Tensor:
        ctx.images, ctx.estimator, ctx.jacobian = images.detach(), estimator, None
        with torch.no_grad():
            return estimator.classifier(images).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.jacobian is None:  # the gradients of further classes come from the same predictions
            ctx.jacobian = ctx.estimator.jacobian(ctx.images)
        return torch.einsum("bk,bkn->bn", gradient, ctx.jacobian).view_as(ctx.images), None


@dataclass(frozen=True)
class Estimated(Wrapping):
    """A gradient attack run on estimated gradients: needs predictions only, at 2 per coordinate and step size."""

    step_sizes: tuple[float, ...] = (0.02, 0.1, 0.5)
    chunk: int = 1024

    mark = "ge"
    knowledge = "score"
    queries = "as the inner attack, with some 790 to 1,570 predictions, or more, for a gradient of 784 pixels"

    def search(self, problem: Problem) -> Proposals:
        classifier, chunk = problem.classifier, self.chunk
        if can_follow(classifier):  # following has found nothing: asked cold at every step, and followed around it
            classifier = Following(classifier, len(problem), anew=True)
        elif not isinstance(classifier, Following):
            chunk = min(chunk, PLAIN_CHUNK)
        estimated = EstimatedGradient(classifier, self.step_sizes, chunk)
        return self.attack.search(Problem(estimated, problem.images, problem.goal, problem.seeds, problem.norm))
