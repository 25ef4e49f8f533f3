"""The contrast of ``absynth.training.contrast`` on a GPU: all classes in one process, their decoders as one module.

The rounds are those of the CPU, and so are the loss and the search. Three things differ: a step takes a batch of every
class at once, Adam goes on from round to round, and from the second round on searches start at latents that the round
before has found, drawn at random, because decoders move far from their first candidates in many rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.data import digest
from absynth.decoding import FoldedDecoder, to_blocks, whole_precision
from absynth.training.candidates import FOR_RIVALS
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.contrast import (
    STAGES,
    ContrastConfig,
    Pairs,
    Starts,
    choose_rivals,
    derivatives,
    exchange,
    gaps_between,
    moved,
    of_round,
    rate_at,
    scan,
    settle,
)
from absynth.training.stacked import StackedDecoders, restore_stacked, stacked_tensors
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]


def sharpen_together(
    decoders: Sequence[Decoder],
    candidates: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    config: ContrastConfig,
    *,
    beta: float = 1.0,
    response: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], list[Tensor], list[Tensor]]:
    """As ``absynth.training.sharpening.sharpen``, on the device of the images (N,C,S,S)."""
    classes, device = len(decoders), images.device
    identity = {
        "model": "contrast, together", "config": asdict(config), "response": repr(response),
        "data_digest": digest(images, labels, candidates, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    stacked = StackedDecoders(decoders, sizes).to(device)
    optimizer = torch.optim.Adam(stacked.parameters(), betas=(0.9, 0.99))
    starts, latents = candidates.to(device), list[tuple[Tensor, Tensor]]()
    first = 0
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, expect=identity)) is not None:
        restore_stacked(stacked, optimizer, saved[0])
        first, starts = int(saved[1]["round"]), saved[0]["starts"].to(device)
        latents = [(saved[0][f"{number}.own"], saved[0][f"{number}.rival"]) for number in range(classes)]
    for round_number in range(first, config.rounds):
        rows = of_round(labels, config, round_number).to(device)
        seen = moved(images[rows], config, round_number, response)
        pairs = explained(stacked, starts, seen, labels[rows], config, beta)
        loss = _train_round(stacked, optimizer, pairs, seen, config, round_number, beta)
        latents = [(one.latents[one.own].cpu(), one.latents[~one.own].cpu()) for one in pairs]
        starts = _drawn(latents, starts.shape[1], config.seed * 1000 + round_number).to(device)
        if progress is not None:
            text = f"contrast, round {round_number + 1} of {config.rounds}: loss {loss:.2f}"
            progress((round_number + 1) * STAGES * classes, config.rounds * STAGES * classes, text)  # as on a CPU
        if checkpoint is not None:
            found = {
                f"{n}.{name}": one
                for n, pair in enumerate(latents)
                for name, one in zip(("own", "rival"), pair, strict=True)
            }
            tensors = {**stacked_tensors(stacked, optimizer), "starts": starts, **found}
            save_checkpoint(checkpoint, tensors, {**identity, "round": round_number + 1})
    return stacked.decoders(), [own for own, _ in latents], [rival for _, rival in latents]


@torch.no_grad()
def explained(
    stacked: StackedDecoders, starts: Tensor, images: Tensor, labels: Tensor, config: ContrastConfig, beta: float
) -> list[Pairs]:
    """For every class the pairs it is asked to explain: images (N,C,S,S), searched from the starts (K,M,D)."""
    folded = [FoldedDecoder(decoder).to(images.device) for decoder in stacked.decoders()]
    with whole_precision(images):
        known = [Starts.of(decoder, some, beta) for decoder, some in zip(folded, starts, strict=True)]
        scans = [scan(one, images) for one in known]
        promises = torch.stack([one.promised for one in scans], dim=1)  # (N,K)
        wanted = choose_rivals(promises, labels, config)
        true = promises.gather(1, labels[:, None])[:, 0]
        pairs = []
        for number, (decoder, one) in enumerate(zip(folded, known, strict=True)):
            pairs.append(Pairs.begun(wanted[:, number], labels == number, starts.shape[2], true))
            found = scans[number].rows(pairs[-1].images)
            settle(decoder, one.candidates.latents, one.inverses, found, pairs[-1], images, config, beta)
    exchange(pairs, len(images))
    return pairs


def _train_round(
    stacked: StackedDecoders,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pairs],
    images: Tensor,
    config: ContrastConfig,
    round_number: int,
    beta: float,
) -> float:
    """One pass of every class over its own images and its hard rivals; the mean loss, as far as it has a gradient."""
    blocks = to_blocks(images)
    order = _order(pairs, config, round_number)  # (K, steps * b)

    def gathered(name: str) -> Tensor:
        together = [getattr(one, name)[rows] for one, rows in zip(pairs, order, strict=True)]
        by_step: Tensor = torch.stack(together).unflatten(1, (-1, config.batch_size))
        return by_step  # (K,steps,b,...)

    chosen, latents, own, others = (gathered(name) for name in ("images", "latents", "own", "others"))
    steps, total = chosen.shape[1], torch.zeros((), device=images.device)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at((round_number + step / steps) / config.rounds, config)
        some = latents[:, step]  # (K,b,D)
        squared = (blocks[chosen[:, step]] - stacked(some)).square().sum(2)  # (K,b)
        energies = squared + beta / 2 * some.square().sum(2)
        signs = derivatives(own[:, step], energies, others[:, step], config)
        optimizer.zero_grad()
        torch.autograd.backward((signs * energies).sum() / config.batch_size)
        optimizer.step()
        gaps = gaps_between(own[:, step], energies.detach(), others[:, step])
        missing = config.weight * config.temperature * F.softplus((config.margin - gaps) / config.temperature)
        total += (missing + energies.detach() * own[:, step]).mean()
    return float(total / steps)


def _order(pairs: Sequence[Pairs], config: ContrastConfig, round_number: int) -> list[Tensor]:
    """Which pairs of each class a round visits, in which order: as many of each, those of smaller classes again."""
    shuffled = []
    for number, one in enumerate(pairs):
        generator = torch.Generator().manual_seed((config.seed * 1000 + number) * 1000 + round_number)
        visited = (one.own | (one.gaps() < config.hard)).nonzero()[:, 0]
        shuffled.append(visited[torch.randperm(len(visited), generator=generator).to(visited.device)])
    longest = max(len(rows) for rows in shuffled)
    length = -(-longest // config.batch_size) * config.batch_size
    return [rows[torch.arange(length, device=rows.device) % len(rows)] for rows in shuffled]


def _drawn(latents: Sequence[tuple[Tensor, Tensor]], count: int, seed: int) -> Tensor:
    """Latents (K,count,D) drawn from those of every class's own images and of its rivals' images."""
    generator = torch.Generator().manual_seed(seed)

    def some(found: Tensor, wanted: int) -> Tensor:
        return found[torch.randint(len(found), (wanted,), generator=generator)]

    for_rivals = round(FOR_RIVALS * count)
    return torch.stack(
        [
            torch.cat([some(own, count - for_rivals), some(rival if len(rival) else own, for_rivals)])
            for own, rival in latents
        ]
    )
