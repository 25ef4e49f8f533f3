"""Where the searches of a class start: its candidates, decoded once, and what is known of the energy around them.

Shapes: B images, M candidates, D latents, N values of an image in block order (see ``absynth.decoding``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from absynth.decoding import FoldedDecoder

ANCHORS = 16  # latents of a class where its curvature is known
CAUTION = 0.2  # share of its diagonal added to a curvature before it is inverted: a step is rather short than long

# Sizes that keep a chunk's activations in the cache (docs/performance.md).
DECODE_CHUNK = 64
REFINE_CHUNK = 48
CUDA_CHUNK = 10_000  # at once on a GPU, where a chunk's cost is that of launching its kernels


def chunk_size(on_a_cpu: int, like: Tensor) -> int:
    """How many latents to treat at once where ``like`` lies."""
    return CUDA_CHUNK if like.is_cuda else on_a_cpu


def prior_candidates(count: int = 8000, latent_size: int = 8, seed: int = 0, surplus: float = 1.111) -> Tensor:
    """``count`` draws from N(0, I), (count,D): the densest of ``surplus`` times as many, as in the released code."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(round(count * surplus), latent_size, generator=generator)
    return draws[draws.norm(dim=1).argsort()[:count]]


class Candidates(nn.Module):
    """A class's fixed starting points: latents (M,D), decoded once to points (M,N), with their offsets (M,).

    At A of them, the anchors, the curvature of the energy is known: latents (A,D), ``inverses`` (A,D,D).
    """

    DERIVED = ("points", "offsets", "anchors", "inverses")

    latents: Tensor
    points: Tensor
    offsets: Tensor
    anchors: Tensor
    inverses: Tensor

    @torch.no_grad()
    def __init__(
        self, decoder: FoldedDecoder, latents: Tensor, beta: float, derived: Mapping[str, Tensor] | None = None
    ) -> None:
        """``derived`` is what another one has ``derived`` from the same; None: derive it. Raises ValueError where it is
        of another shape."""
        super().__init__()
        anchors = latents[:: max(1, -(-len(latents) // ANCHORS))]
        if derived is None:
            points = torch.cat([decoder(chunk) for chunk in latents.split(chunk_size(DECODE_CHUNK, latents))])
            # half of what an energy has besides ||x||^2 - 2 x.p
            offsets = points.double().square().sum(1) / 2 + beta / 4 * latents.double().square().sum(1)
            inverses = inverse_curvature(decoder, anchors, beta)
            derived = {"points": points, "offsets": offsets.float(), "anchors": anchors, "inverses": inverses}
        count, size = latents.shape
        shapes = {"offsets": (count,), "anchors": anchors.shape, "inverses": (len(anchors), size, size)}
        fits = all(derived[name].shape == shape for name, shape in shapes.items())
        if not fits or len(derived["points"]) != count:
            raise ValueError(f"what was derived does not fit {len(latents)} latents")
        self.register_buffer("latents", latents, persistent=False)
        for name in self.DERIVED:
            self.register_buffer(name, derived[name], persistent=False)

    def derived(self) -> dict[str, Tensor]:
        """What follows from the decoder and the latents, by name."""
        return {name: getattr(self, name) for name in self.DERIVED}

    def best(self, blocks: Tensor, count: int | None) -> Tensor:
        """Images (B,N) -> the index (B,) of the best of the first ``count`` candidates of each."""
        points, offsets = self.points[:count], self.offsets[:count]
        scores = torch.addmm(offsets, blocks, points.T, alpha=-1)  # (B,M)
        if scores.shape[1] < 2:
            return torch.zeros(len(blocks), dtype=torch.int64, device=blocks.device)
        # The product's rounding differs with the batch: compare the two best again, in an order that never changes.
        pair = scores.topk(2, largest=False).indices.sort(dim=1).values  # (B,2)
        exact = (blocks[:, None] - points[pair]).square().sum(2) / 2 + offsets[pair]
        exact -= points[pair].square().sum(2) / 2
        return pair.gather(1, exact.argmin(1, keepdim=True))[:, 0]


@torch.no_grad()
def inverse_curvature(decoder: FoldedDecoder, latents: Tensor, beta: float) -> Tensor:
    """The inverse (P,D,D) of J'J + beta/2 I at latents (P,D), its diagonal enlarged by ``CAUTION``."""
    found = []
    for chunk in latents.split(chunk_size(REFINE_CHUNK, latents)):
        matrix = curvature(decoder.tangents(decoder.activations(chunk)), beta)
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + CAUTION).add_(1e-6)  # where no pixel answers and beta is 0
        found.append(torch.linalg.inv(matrix))
    return torch.cat(found)


def curvature(jacobian: Tensor, beta: float) -> Tensor:
    """The Gauss-Newton matrix J'J + beta/2 I (P,D,D) of half an energy, from the Jacobian (P,D,N)."""
    return jacobian @ jacobian.mT + beta / 2 * torch.eye(jacobian.shape[1], device=jacobian.device)


def matrix_vector(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(P,D,D), (P,D) -> (P,D)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]
