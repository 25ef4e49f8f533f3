"""The candidates of ABS: the latents of a class from which every search starts.

Searches are as good as the nearest candidate, for the classes that lose as for the one that wins. So the candidates
cover the latents that explain a class's own images, those of its rivals' images, and those of *all* images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from absynth.candidates import prior_candidates
from absynth.training.explanations import explanations
from absynth.vae import Decoder, VAEConfig

CANDIDATES = 1000  # latents a class
FOR_RIVALS = 0.4  # share of them that cover the explanations of other classes' images
CLUSTERED = 12_000  # latents they are chosen from
EXPLAINED = 6000  # training images that every class explains
BLIND = 2000  # draws of the prior that those searches start from, besides the candidates


def choose_candidates(latents: Tensor, count: int, seed: int) -> Tensor:
    """``count`` latents (M,D) that cover those of the training images (N,D): the centers of a k-means clustering.

    With no more than ``count`` images, their own latents, filled up by draws around them.
    """
    if len(latents) <= count:
        generator = torch.Generator().manual_seed(seed)
        extra = torch.randint(len(latents), (count - len(latents),), generator=generator)
        noise = 0.3 * torch.randn(len(extra), latents.shape[1], generator=generator)
        return torch.cat([latents, latents[extra] + noise])
    from sklearn.cluster import MiniBatchKMeans  # here: slow to import, needed by this function only

    clusters = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096, max_iter=20)
    clusters.fit(latents.numpy().astype(np.float64))
    return torch.from_numpy(clusters.cluster_centers_).float()


def choose_all_candidates(own: list[Tensor], rival: list[Tensor], seed: int) -> Tensor:
    """The latents (K,M,D) from which searches start: most cover a class's own images, the rest those of its rivals."""
    for_rivals = round(FOR_RIVALS * CANDIDATES)
    generator = torch.Generator().manual_seed(seed)

    def covering(latents: Tensor, count: int) -> Tensor:
        some = latents[torch.randperm(len(latents), generator=generator)[:CLUSTERED]]
        return choose_candidates(some, count, seed)

    return torch.stack(
        [
            # a class that is no rival to any image searches for its own alone
            torch.cat([covering(a, CANDIDATES - for_rivals), covering(b if len(b) else a, for_rivals)])
            for a, b in zip(own, rival, strict=True)
        ]
    )


def widen(
    decoders: Sequence[Decoder],
    candidates: Tensor,
    images: Tensor,
    sizes: VAEConfig,
    *,
    beta: float,
    seed: int,
    count: int = EXPLAINED,
    progress: Callable[[int, int, str], None] | None = None,
) -> Tensor:
    """As many candidates as (K,M,D), moved to cover also the latents with which each class explains *any* image.

    ``images`` (N,C,S,S), of all classes, as the decoders shall see them; ``count`` of them are drawn.
    """
    classes, kept, size = candidates.shape
    generator = torch.Generator().manual_seed(seed)
    some = images[torch.randperm(len(images), generator=generator)[:count]]
    blind = prior_candidates(BLIND, size, seed).expand(classes, -1, -1)
    found = explanations(
        decoders, torch.cat([candidates, blind], dim=1), some.repeat(classes, 1, 1, 1),
        torch.arange(classes).repeat_interleave(len(some)), sizes, beta=beta, progress=progress,
    )  # fmt: skip
    return torch.stack(
        [choose_candidates(torch.cat([a, b]), kept, seed) for a, b in zip(candidates, found, strict=True)]
    )
