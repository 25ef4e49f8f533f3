"""The energies of many images close to a few that were analyzed: one second-order step each.

Attacks that know only answers ask about hundreds of images around one. Around one explanation the curvature is the
same, so its Jacobian is computed once, and an image of its neighborhood costs one decode a class instead of a search.

Shapes: n images, U analyzed ones, K classes, D latents, N values of an image in block order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from absynth.analysis import FOLLOWING, Found, Schedule, in_the_running, into_ball
from absynth.candidates import REFINE_CHUNK, chunk_size, curvature, matrix_vector
from absynth.decoding import FoldedDecoder


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

    Those of latents really decoded, so never below the minimum: for classes in the running one Gauss-Newton step from
    the owner's explanation, or that explanation where it is better; for the others the owner's explanation.
    """
    energies = torch.stack([_energy(blocks, found, owner, c, beta) for c in range(len(decoders))], dim=1)
    running = in_the_running(found.energies * scales, schedule, 0)  # (U,K)
    for number, decoder in enumerate(decoders):
        held = running[:, number].nonzero()[:, 0]  # (U',): the owners that follow this class
        rows = running[owner, number].nonzero()[:, 0]  # (n',): their images
        if not len(rows):
            continue
        place = torch.searchsorted(held, owner[rows])
        latents = found.latents[held, number]  # (U',D)
        jacobian = decoder.tangents(decoder.activations(latents))  # (U',D,N)
        inverse = torch.linalg.inv(curvature(jacobian, beta))
        for part in torch.arange(len(rows), device=rows.device).split(chunk_size(REFINE_CHUNK, rows)):
            images, here = rows[part], place[part]
            targets, start = blocks[images], latents[here]
            residual = targets - found.blocks[held[here], number]
            descent = matrix_vector(jacobian[here], residual) - beta / 2 * start
            moved = into_ball(start + matrix_vector(inverse[here], descent), schedule.max_norm)
            energy = (targets - decoder(moved)).square().sum(1) + beta / 2 * moved.square().sum(1)
            energies[images, number] = torch.minimum(energies[images, number], energy)
    return energies


def _energy(blocks: Tensor, found: Found, owner: Tensor, number: int, beta: float) -> Tensor:
    """The energies (n,) of one class at the owners' explanations."""
    prior = beta / 2 * found.latents[owner, number].square().sum(1)
    return (blocks - found.blocks[owner, number]).square().sum(1) + prior
