"""The energies of many images close to a few that were analyzed: one second-order step each.

Attacks that know only answers ask about hundreds of images around one. Around one explanation the curvature is the
same, so its Jacobian is computed once, and an image of its neighborhood costs one decode a class instead of a search;
or no decode, where the step is so small that the decoder is as good as linear along it.

Shapes: n images, U analyzed ones, K classes, D latents, N values of an image in block order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from absynth.analysis import FOLLOWING, Found, Schedule, in_the_running, into_ball
from absynth.candidates import REFINE_CHUNK, chunk_size, curvature
from absynth.decoding import FoldedDecoder

#: Images that gain no more than this (in un-normalized energy) by a step of their own, beside the one that the first of
#: their neighborhood takes, are not decoded: what such a step promises is what it holds, to third order in its length.
TRUSTED = 5e-4


@torch.no_grad()
def energies_around(
    decoders: Sequence[FoldedDecoder],
    blocks: Tensor,
    found: Found,
    owner: Tensor,
    *,
    beta: float,
    scales: Tensor,
    schedule: Schedule = FOLLOWING,
) -> Tensor:
    """Energies (n,K) of images ``blocks`` (n,N), each close to one of U images of which ``found`` is known: ``owner``
    (n,) says to which.

    For classes in the running those of one Gauss-Newton step from the owner's explanation, or of that explanation where
    it is better; for the others of the owner's explanation. They are energies of latents really decoded, never below
    the minimum, but for images so close to the first of their neighborhood that its decode serves (``TRUSTED``).
    """
    energies = blocks.new_empty(len(blocks), len(decoders))
    running = in_the_running(found.energies * scales, schedule, 0)  # (U,K)
    order = owner.argsort(stable=True)
    owners, counts = torch.unique_consecutive(owner[order], return_counts=True)
    decoded: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of each class: images, and latents to decode for them
    for one, rows in zip(owners.tolist(), order.split(counts.tolist()), strict=True):
        images = _Neighborhood(blocks, rows, found.blocks[one], found.latents[one], beta)
        energies[rows] = images.still()
        for number in running[one].nonzero()[:, 0].tolist():
            steps = images.steps(decoders[number], number, schedule)
            close = rows[steps.trusted]
            energies[close, number] = torch.minimum(energies[close, number], steps.energies[steps.trusted])
            decoded.setdefault(number, []).append((rows[~steps.trusted], steps.latents[~steps.trusted]))
    for number, several in decoded.items():
        rows, latents = (torch.cat(parts) for parts in zip(*several, strict=True))
        for part in torch.arange(len(rows), device=rows.device).split(chunk_size(REFINE_CHUNK, rows)):
            moved, here = latents[part], rows[part]
            squared = (blocks[here] - decoders[number](moved)).square().sum(1)
            energy = squared + beta / 2 * moved.square().sum(1)
            energies[here, number] = torch.minimum(energies[here, number], energy)
    return energies


class _Steps(NamedTuple):
    """One class's Gauss-Newton steps for m images: where they lead (m,D), and for those that may be ``trusted`` (m,)
    what they reach (m,)."""

    latents: Tensor
    trusted: Tensor
    energies: Tensor


class _Neighborhood:
    """The images ``rows`` (m,) of ``blocks`` (n,N) around one that its classes explain as ``explanations`` (K,N) of
    ``latents`` (K,D).

    All are taken as the first of them and a difference: what is linear in the image is a product with the differences.
    """

    def __init__(self, blocks: Tensor, rows: Tensor, explanations: Tensor, latents: Tensor, beta: float) -> None:
        self.latents, self.beta = latents, beta
        self.first = blocks[rows[0]]  # (N,)
        self.differences = blocks[rows] - self.first  # (m,N)
        self.squared = self.differences.square().sum(1)  # (m,)
        self.residuals = self.first - explanations  # (K,N)

    def still(self) -> Tensor:
        """Energies (m,K) at the explanations as they are."""
        first = self.residuals.square().sum(1) + self.beta / 2 * self.latents.square().sum(1)  # (K,)
        return torch.addmm(first + self.squared[:, None], self.differences, self.residuals.T, alpha=2)

    def steps(self, decoder: FoldedDecoder, number: int, schedule: Schedule) -> _Steps:
        """The steps of class ``number`` from its explanation."""
        start, residual = self.latents[number], self.residuals[number]
        _, inverse, descents, _ = self._at(decoder, start, residual)
        latents = into_ball(start + descents @ inverse.T, schedule.max_norm)
        # The first image takes its step, and the others are seen from there.
        residual = self.first - decoder(latents[:1])[0]
        first = residual.square().sum() + self.beta / 2 * latents[0].square().sum()
        energies = first + self.squared + 2 * self.differences @ residual
        own, inverse, descents, descent = self._at(decoder, latents[0], residual)
        alone = (own @ inverse * own).sum(1)  # what the difference to the first image gains by itself
        gained = alone + 2 * own @ inverse @ descent
        return _Steps(latents, alone <= TRUSTED, energies - gained)

    def _at(self, decoder: FoldedDecoder, latents: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Minus half the gradients of all energies at ``latents`` (D,), where the first image has this ``residual``
        (N,): the part (m,D) of each image's difference, the inverse (D,D) of the curvature, the whole (m,D), and that
        of the first image (D,)."""
        jacobian = decoder.tangents(decoder.activations(latents[None]))[0]  # (D,N)
        inverse = torch.linalg.inv(curvature(jacobian[None], self.beta))[0]
        own = self.differences @ jacobian.T
        first = jacobian @ residual - self.beta / 2 * latents
        return own, inverse, own + first, first
