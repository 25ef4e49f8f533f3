"""The stored points that can be nearest to images close to a known one: many questions for the price of one.

Attacks that know only answers ask about hundreds of images around one. The root of ||x - p||^2 + K is the distance from
(x, 0) to (p, sqrt(K)), so it changes by no more than x moves. A point farther than the nearest of its class by more
than 2r cannot be the nearest of its class to any image within r: such points need not be compared, and nothing is lost.

Shapes: n images, U known ones, K classes, S listed points a class, N values a point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from absynth.nearest import KEPT, exactly_nearest, score_error

LISTED = 64  # points of each class
CHUNK = 64  # images listed at once: bounds the memory
ANSWERED = 16  # images whose float64 differences fit into the cache


@dataclass
class Known:
    """Images (U,N) that were asked about."""

    images: Tensor

    def rows(self, index: Tensor | slice) -> Known:
        """Those of the images ``index``."""
        return Known(self.images[index])

    def room(self, count: int) -> Known:
        """Room for ``count`` images, to be ``put`` there."""
        return Known(self.images.new_zeros(count, self.images.shape[1]))

    def put(self, index: Tensor, known: Known) -> None:
        """Replace, in place, the images ``index``."""
        self.images[index] = known.images


@dataclass(frozen=True)
class Shortlist:
    """For each of U images the ``indices`` (U,K,S) of the nearest points of every class, and its ``reach`` (U,): for
    images that close (L2) no other point can be the nearest of its class. A class with fewer points repeats its last,
    ``spare`` (K,S)."""

    indices: Tensor
    reach: Tensor
    spare: Tensor


@torch.no_grad()
def shortlist(images: Tensor, points: Tensor, offsets: Tensor, counts: Sequence[int]) -> Shortlist:
    """The lists of images (U,N), for points (M,N) sorted by class, ``counts`` (K,) of each."""
    parts = [_shortlist(chunk, points, offsets, counts) for chunk in images.split(CHUNK)]
    spare = torch.arange(LISTED, device=points.device) >= torch.tensor(counts, device=points.device)[:, None]
    return Shortlist(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), spare)


def _shortlist(images: Tensor, points: Tensor, offsets: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    scores = torch.addmm(offsets, images, points.T, alpha=-1)  # (U,M): half of what is minimized, up to ||x||^2 / 2
    squares = images.double().square().sum(1, keepdim=True)  # (U,1)
    error = 2 * score_error(points, offsets)  # of what is minimized, twice a score
    indices, reach, start = [], [], 0
    for class_scores in torch.split(scores, list(counts), dim=1):
        size = class_scores.shape[1]
        best = class_scores.topk(min(LISTED, size), largest=False)
        listed = best.indices + start
        indices.append(torch.cat([listed, listed[:, -1:].expand(-1, LISTED - listed.shape[1])], dim=1))
        least = (squares + 2 * best.values.double()[:, [0, -1]]).clamp(min=0)  # (U,2): the nearest, the last
        outside = (
            (least[:, 1] - error).clamp(min=0).sqrt() if size > LISTED else torch.full_like(least[:, 1], torch.inf)
        )
        reach.append((outside - (least[:, 0] + error).sqrt()) / 2)
        start += size
    return torch.stack(indices, dim=1), torch.stack(reach, dim=1).amin(1)


@torch.no_grad()
def nearest_around(images: Tensor, listed: Shortlist, owner: Tensor, points: Tensor, offsets: Tensor) -> Tensor:
    """Images (n,N), each within reach of the known one that ``owner`` (n,) names -> the indices (n,K) of the nearest
    point of each class, as ``nearest.nearest_of_each_class`` finds them."""
    classes = len(listed.spare)
    found = torch.empty(len(images), classes, dtype=torch.int64, device=images.device)
    for known in owner.unique().tolist():
        rows = (owner == known).nonzero()[:, 0]
        indices = listed.indices[known]  # (K,S)
        near = points[indices.flatten()]  # (K,S,N) -> (K*S,N)
        scores = (offsets[indices].flatten() - images[rows] @ near.T).unflatten(1, indices.shape)  # (n',K,S)
        best = scores.masked_fill(listed.spare, torch.inf).topk(KEPT, largest=False)
        chosen = indices.expand(len(rows), -1, -1).gather(2, best.indices)  # (n',K,KEPT)
        flat = exactly_nearest(
            images[rows].repeat_interleave(classes, dim=0), points, offsets,
            best.values.flatten(0, 1), chosen.flatten(0, 1),
        )  # fmt: skip
        found[rows] = flat.view(-1, classes)  # (n'*K,) -> (n',K)
    return found


class ComparesAll(nn.Module, ABC):
    """A classifier that compares an image with all that it has stored, and can answer about many images around one.

    Its answers around one are exactly those of ``forward``; it offers the questions that ``ABS`` offers to attacks.
    """

    @abstractmethod
    def _stored(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Points (M,N) sorted by class, their offsets (M,), and the number of each class (K,)."""

    @abstractmethod
    def _flat(self, images: Tensor) -> Tensor:
        """Images (B,C,S,S) -> what is compared with the points, (B,N). Raises InputError for other images."""

    @abstractmethod
    def _answers(self, flat: Tensor, nearest: Tensor) -> Tensor:
        """What is compared (B,N) and the nearest point of each class (B,K) -> logits (B,K)."""

    def follow(self, images: Tensor, before: Known | None = None) -> tuple[Tensor, Known]:
        """Images (B,C,S,S) -> logits (B,K), those of ``forward`` whatever was asked ``before``, and what ``around``
        needs to know."""
        return self(images), Known(self._flat(images.detach()))

    @torch.no_grad()
    def around(self, images: Tensor, before: Known, owner: Tensor) -> Tensor:
        """Images (n,C,S,S) -> logits (n,K), those of ``forward``, without gradient. Each lies close to one of those
        ``before``, which ``owner`` (n,) says; the closer, the cheaper."""
        points, offsets, counts = self._stored()
        flat = self._flat(images)
        listed = shortlist(before.images, points, offsets, counts)
        moved = (flat - before.images[owner]).double().norm(dim=1)
        within = moved < listed.reach[owner]
        near, far = within.nonzero()[:, 0], (~within).nonzero()[:, 0]
        logits = flat.new_empty(len(flat), len(counts))
        if len(near):
            nearest = nearest_around(flat[near], listed, owner[near], points, offsets)
            for part in torch.arange(len(near), device=near.device).split(ANSWERED):
                logits[near[part]] = self._answers(flat[near[part]], nearest[part])
        if len(far):
            logits[far] = self(images[far])
        return logits
