"""ABS and Binary ABS: images -> logits, with the exact gradient and the analysis behind them.

Source: Schott et al. 2019 (arXiv 1805.09190), sections 3 and 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth.analysis import DEFAULT, FOLLOWING, Found, Schedule, analyze, join
from absynth.candidates import chunk_size
from absynth.checks import check_images
from absynth.decoding import FoldedDecoder, from_blocks, to_blocks, whole_precision
from absynth.errors import InputError
from absynth.kept import candidates_of
from absynth.neighbors import energies_around
from absynth.responses import Identity, Threshold, different
from absynth.threads import side_by_side

IMAGE_CHUNK = 256  # images analyzed at once: bounds the memory, whatever the batch
THREAD_CHUNK = 4  # images a thread gets at least


@dataclass(frozen=True)
class Analysis:
    """How every class explains B images.

    ``energies`` (B,K): E_c(x) of the paper, normalized by the number of pixels (and scaled by gamma for Binary ABS);
    logits are minus this. ``latents`` (B,K,D) and ``reconstructions`` (B,K,C,S,S) in (0,1): where the energies are
    reached. ``probabilities`` (B,K): the calibrated posterior, rows sum to 1.
    """

    energies: Tensor
    latents: Tensor
    reconstructions: Tensor
    probabilities: Tensor

    @property
    def labels(self) -> Tensor:
        """The class (B,) that explains each image best."""
        return self.energies.argmin(1)


class Calibrated(nn.Module, ABC):
    """A classifier whose logits are minus energies, with the posterior of the paper.

        p(c|x) = (exp(-alpha E_c) + eta) / sum_k (exp(-alpha E_k) + eta)

    ``refusal``: below this probability of the likeliest class, nothing explains the image.
    """

    def __init__(self, alpha: float, eta: float, refusal: float) -> None:
        super().__init__()
        self.alpha, self.eta, self.refusal = alpha, eta, refusal

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """(C, S): channels and pixels a side."""

    @abstractmethod
    def analyze(self, images: Tensor) -> Analysis:
        """Images (B,C,S,S) -> how every class explains them."""

    def probabilities(self, images: Tensor) -> Tensor:
        """The calibrated posterior (B,K) of images (B,C,S,S); differentiable."""
        return self.posterior(self(images))

    def posterior(self, logits: Tensor) -> Tensor:
        """The calibrated posterior (B,K) that belongs to these logits (B,K)."""
        evidence = torch.exp(self.alpha * logits) + self.eta
        return evidence / evidence.sum(1, keepdim=True)

    def refuses(self, probabilities: Tensor) -> Tensor:
        """Where (B,) nothing explains the image: the likeliest class stays below ``refusal``."""
        return probabilities.amax(1) < self.refusal


class ABS(Calibrated):
    """Analysis by synthesis: an image belongs to the class whose generative model explains it best.

    float32 images (B,C,S,S) in [0,1] -> logits (B,K) = -E_c(x). Raises InputError for anything else. A pure function
    of each image: neither the rest of the batch, nor earlier calls, nor global random state enter (up to rounding,
    1e-5 in the logits of classes that compete; more where a search stands at a fork between two minima, to which few
    images but adversarials are close). The gradient is exact, by the envelope theorem: dE_c/dx is
    2 (t(x) - G_c(z*)) / N at the minimum z*, and no back-propagation through the search is needed.

    With the default schedule, ``forward`` stops at classes that are out of the running (``Schedule.slack``); their
    logits are those of the best explanation found so far. ``analyze`` goes on with them; for the classes that stayed in
    the running both agree.

    ``candidates`` (K,M,D) are the latents that a search starts from. ``response`` is applied to the pixels first,
    ``scales`` (K,) multiplies the energies (the gamma of Binary ABS), ``kept`` names a file in which decoded candidates
    are kept for the next time; the rest: ``Calibrated``.
    """

    candidates: Tensor
    scales: Tensor
    folded: Any  # K FoldedDecoders
    starts: Any  # K Candidates

    def __init__(
        self,
        decoders: Iterable[nn.Module],
        candidates: Tensor,
        *,
        response: nn.Module | None = None,
        scales: Tensor | None = None,
        alpha: float = 440.0,
        eta: float = 0.000039,
        beta: float = 1.0,
        refusal: float = 0.25,
        schedule: Schedule = DEFAULT,
        kept: Path | None = None,
    ) -> None:
        super().__init__(alpha, eta, refusal)
        self.decoders = nn.ModuleList(decoders)
        if len(self.decoders) < 2 or candidates.ndim != 3 or len(candidates) != len(self.decoders):
            raise InputError(
                f"{len(self.decoders)} decoders and candidates of shape {tuple(candidates.shape)}: "
                "expected at least 2 decoders and candidates (K,M,D), one row a decoder"
            )
        self.response = response or Identity()
        self.beta, self.schedule = beta, schedule
        self.register_buffer("candidates", candidates)
        self.register_buffer("scales", torch.ones(len(self.decoders)) if scales is None else scales)
        self._prepare(kept)
        self.register_load_state_dict_post_hook(lambda model, _keys: model._prepare())  # type: ignore[no-untyped-call]
        self.eval().requires_grad_(False)

    def _prepare(self, kept: Path | None = None) -> None:
        """Derive the fast forms of the decoders and the decoded candidates from the weights."""
        self.folded = nn.ModuleList(FoldedDecoder(decoder) for decoder in self.decoders)  # type: ignore[arg-type]
        self.starts = nn.ModuleList(candidates_of(self.folded, self.candidates, self.beta, kept))

    @property
    def image_shape(self) -> tuple[int, int]:
        """(C, S): channels and pixels a side."""
        return self.folded[0].channels, 4 * self.folded[0].side + 12

    def train(self, mode: bool = True) -> ABS:
        """Stays in eval mode: batch norm is folded into the decoders."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        seen = self.response(images)
        parts = [to_blocks(chunk) for chunk in seen.split(chunk_size(IMAGE_CHUNK, seen))]
        return torch.cat([self._negative_energies(part, self._find(part.detach(), True)) for part in parts])

    def follow(self, images: Tensor, before: Found | None = None) -> tuple[Tensor, Found]:
        """Images (B,C,S,S) -> logits (B,K) and what was found, starting from what was found ``before`` for images
        close to these; cheaper than ``forward``, and with the same gradient at the minimum.

        For searches that move an image in small steps. Not a function of the image alone: a class whose best
        explanation lies elsewhere by now is not noticed, so what counts has to be asked of ``forward``.
        """
        self.check(images)
        logits, found = [], []
        size = chunk_size(IMAGE_CHUNK, images)
        for number, chunk in enumerate(self.response(images).split(size)):
            blocks = to_blocks(chunk)
            rows = slice(number * size, number * size + len(blocks))
            found.append(self._find(blocks.detach(), True, starts=None if before is None else before.rows(rows)))
            logits.append(self._negative_energies(blocks, found[-1]))
        return torch.cat(logits), join(found)

    @torch.no_grad()
    def around(self, images: Tensor, before: Found, owner: Tensor) -> Tensor:
        """Images (n,C,S,S) -> logits (n,K), without gradient, each close to one of the images that ``before`` was found
        for: ``owner`` (n,) says to which. Cheaper than ``follow`` where many are close to one, and no more final."""
        self.check(images)
        seen = self.response(images)
        if not isinstance(self.response, Threshold):
            return self._around(seen, before, owner)
        # Behind a threshold most images around one are the same.
        first, which = different(seen, owner)
        return self._around(seen[first], before, owner[first])[which]

    def _around(self, seen: Tensor, before: Found, owner: Tensor) -> Tensor:
        """``around`` for what is behind the response."""
        blocks = to_blocks(seen)

        def energies(rows: slice) -> Tensor:
            return energies_around(self.folded, blocks[rows], before, owner[rows], beta=self.beta, scales=self.scales)

        with whole_precision(blocks):
            found = torch.cat(side_by_side(energies, self._shares(blocks)))
        return -found * (self.scales / blocks.shape[1])

    @torch.no_grad()
    def analyze(self, images: Tensor, *, schedule: Schedule | None = None) -> Analysis:
        """Images (B,C,S,S) -> how every class explains them; ``schedule`` overrides the classifier's own."""
        self.check(images)
        chunks = self.response(images).split(chunk_size(IMAGE_CHUNK, images))
        parts = [self._find(to_blocks(chunk), False, schedule) for chunk in chunks]
        energies = torch.cat([self._normalized(part) for part in parts])
        return Analysis(
            energies=energies,
            latents=torch.cat([part.latents for part in parts]),
            reconstructions=from_blocks(torch.cat([part.blocks for part in parts]), self.image_shape[0]),
            probabilities=self.posterior(-energies),
        )

    def check(self, images: Tensor) -> None:
        """Raise InputError for images that are none for this model."""
        channels, size = self.image_shape
        check_images(images, channels=channels, size=size)

    def _find(
        self, blocks: Tensor, label_only: bool, schedule: Schedule | None = None, starts: Found | None = None
    ) -> Found:
        """The search, its images shared among the threads of a CPU."""

        def find(rows: slice) -> Found:
            return analyze(
                self.folded,
                self.starts,
                blocks[rows],
                schedule or (self.schedule if starts is None else FOLLOWING),
                beta=self.beta,
                scales=self.scales,
                label_only=label_only,
                starts=None if starts is None else starts.rows(rows),
            )

        with whole_precision(blocks):
            return join(side_by_side(find, self._shares(blocks)))

    def _shares(self, blocks: Tensor) -> list[slice]:
        """The parts of a batch that threads take."""
        count = len(blocks)
        size = count if blocks.is_cuda else max(THREAD_CHUNK, -(-count // torch.get_num_threads()))
        return [slice(first, first + size) for first in range(0, count, size)]

    def _negative_energies(self, blocks: Tensor, found: Found) -> Tensor:
        logits: Tensor = _NegativeEnergies.apply(blocks, found.blocks, self._normalized(found), self.scales)  # type: ignore[no-untyped-call]
        return logits

    def _normalized(self, found: Found) -> Tensor:
        return found.energies * (self.scales / found.blocks.shape[-1])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, eta={self.eta}, beta={self.beta}, refusal={self.refusal}, schedule={self.schedule}"


class _NegativeEnergies(torch.autograd.Function):
    """Minus the energies (B,K) that blocks (B,N) have with these explanations (B,K,N), with the gradient of the
    envelope theorem."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, explanations: Tensor, energies: Tensor, scales: Tensor) -> Tensor:
        if blocks.requires_grad:
            ctx.save_for_backward(blocks, explanations, scales)
        return -energies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients  # (B,K), with respect to the logits
        blocks, explanations, scales = ctx.saved_tensors  # (B,N), (B,K,N), (K,)
        weights = gradient * scales * (-2 / blocks.shape[1])  # (B,K)
        # sum over c of w_c (x - G_c), without forming the differences
        return weights.sum(1, keepdim=True) * blocks - (weights[:, None] @ explanations)[:, 0], None, None, None
