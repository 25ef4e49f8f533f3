"""The third phase of training: each decoder learns not to explain the images of other classes.

The first two phases make a decoder explain its own class. What decides a classification, and how far an adversarial has
to go, is the gap to the energy that the *best rival* reaches; nothing in those phases asks for one. Here, for image x
of class y and rival c, the loss

    E_y(x) + weight * temperature * softplus((E_y(x) + margin - E_c(x)) / temperature)

is descended in the decoders' weights. By the envelope theorem its gradient needs no derivative of the minimizing
latents: these are kept for every pair of image and class, and follow the decoders by preconditioned gradient steps.

Latents kept per image would let a decoder learn its training images by heart (LOG.md): so each image comes with
slightly moved copies, which count as images of their own.

No adversarial image is used. Within a round a class needs of the others only the energies of the round before, so
classes train side by side. Batch norm stays in eval mode: the decoder is the one the analysis will use.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from absynth.analysis import Candidates
from absynth.data import digest
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """``rounds`` passes over all pairs; ``margin`` and ``temperature`` in units of un-normalized energy."""

    rounds: int = 5
    copies: int = 2  # of every image, beside the image itself
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=8, zoom=0.08, shear=6, shift=0.5, bicubic=True)
    )
    rivals: int = 2  # classes an image is contrasted with: those with the best candidates
    margin: float = 10.0
    temperature: float = 4.0
    weight: float = 2.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    latent_rate: float = 0.5
    easy_share: float = 0.25  # share of the rivals that are not hard which a round visits; own images it visits all
    seed: int = 0

    @property
    def hard(self) -> float:
        """The gap below which a pair is hard."""
        return self.margin + 2 * self.temperature


@dataclass
class Pairs:
    """The images that one class is asked to explain: its own, and those it is a rival for."""

    images: Tensor  # (P,) indices into the training set
    own: Tensor  # (P,) bool
    latents: Tensor  # (P,D)
    curvature: Tensor  # (P,D,D): inverse Gauss-Newton matrices of the candidates they started from
    energies: Tensor  # (P,) of this class, at the last visit
    others: Tensor  # (P,) of the class to be compared with: the true class for a rival, the best rival for its own


def with_copies(images: Tensor, labels: Tensor, config: ContrastConfig) -> tuple[Tensor, Tensor]:
    """Images (N,C,S,S) and labels (N,), followed by ``copies`` moved copies of all of them."""
    generator = torch.Generator().manual_seed(config.seed)
    moved = [
        augment(chunk, config.augmentation, generator) for _ in range(config.copies) for chunk in images.split(1000)
    ]
    return torch.cat([images, *moved]), labels.repeat(1 + config.copies)


@torch.no_grad()
def find_pairs(
    decoders: Sequence[Decoder], candidates: Tensor, images: Tensor, labels: Tensor, config: ContrastConfig, beta: float
) -> list[Pairs]:
    """Every training image with its own class and its ``rivals`` best others, each at its best candidate."""
    classes = len(decoders)
    energies = torch.empty(len(images), classes)
    chosen = torch.empty(len(images), classes, dtype=torch.int64)
    curvatures = []
    for number, decoder in enumerate(decoders):
        folded = FoldedDecoder(decoder)
        starts = Candidates(folded, candidates[number], beta)
        curvatures.append(_inverse_curvatures(folded, candidates[number], beta))
        for rows in torch.arange(len(images)).split(512):
            blocks = to_blocks(images[rows])
            scores = torch.addmm(starts.offsets, blocks, starts.points.T, alpha=-1)
            best = scores.min(1)
            energies[rows, number] = 2 * best.values + blocks.square().sum(1)
            chosen[rows, number] = best.indices
    own = torch.nn.functional.one_hot(labels, classes).bool()
    rivals = energies.masked_fill(own, torch.inf).topk(min(config.rivals, classes - 1), largest=False).indices
    wanted = own.scatter(1, rivals, True)
    pairs = []
    for number in range(classes):
        rows = wanted[:, number].nonzero()[:, 0]
        start = chosen[rows, number]
        pairs.append(
            Pairs(
                images=rows,
                own=labels[rows] == number,
                latents=candidates[number][start].clone(),
                curvature=curvatures[number][start],
                energies=energies[rows, number].clone(),
                others=torch.full((len(rows),), torch.nan),
            )
        )
    return pairs


@torch.no_grad()
def _inverse_curvatures(folded: FoldedDecoder, latents: Tensor, beta: float) -> Tensor:
    """(J'J + beta/2 I)^-1 at latents (M,D): (M,D,D)."""
    found = []
    for chunk in latents.split(32):
        jacobian = folded.tangents(folded.activations(chunk))  # (M,D,N)
        found.append(torch.linalg.inv(jacobian @ jacobian.mT + beta / 2 * torch.eye(latents.shape[1])))
    return torch.cat(found)


def exchange(pairs: Sequence[Pairs], count: int) -> None:
    """Tell every pair what it is compared with: a rival the true class, a true class the best rival."""
    true = torch.full((count,), torch.nan)
    rival = torch.full((count,), torch.inf)
    for one in pairs:
        true[one.images[one.own]] = one.energies[one.own]
        rows = one.images[~one.own]
        rival[rows] = torch.minimum(rival[rows], one.energies[~one.own])
    for one in pairs:
        one.others = torch.where(one.own, rival[one.images], true[one.images])


def train_round(
    decoder: Decoder, pairs: Pairs, images: Tensor, config: ContrastConfig, round_number: int, number: int, beta: float
) -> None:
    """One pass of one class over its pairs, in place: the decoder's weights, the latents, the energies."""
    decoder.eval().requires_grad_(True)
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    optimizer = torch.optim.Adam(decoder.parameters(), betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed((config.seed * 1000 + number) * 1000 + round_number)
    hard = torch.where(pairs.own, pairs.others - pairs.energies, pairs.energies - pairs.others) < config.hard
    visited = pairs.own | hard | (torch.rand(len(hard), generator=generator) < config.easy_share)
    shuffled = torch.randperm(len(hard), generator=generator)
    order = shuffled[visited[shuffled]].split(config.batch_size)
    for step, rows in enumerate(order):
        done = (round_number + step / len(order)) / config.rounds
        # the first tenth moves hardly anything but the latents, which are still those of the candidates
        rate = config.learning_rate * min(1.0, done / 0.1 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = rate
        latents = pairs.latents[rows].requires_grad_(True)
        squared_error = (images[pairs.images[rows]] - decoder(latents)).square().flatten(1).sum(1)  # (b,)
        energies = squared_error + beta / 2 * latents.square().sum(1)
        own, others = pairs.own[rows], pairs.others[rows]
        gaps = torch.where(own, others - energies.detach(), energies.detach() - others)  # rival minus true
        push = config.weight * torch.sigmoid((config.margin - gaps) / config.temperature).clamp(min=1e-6)
        signs = torch.where(own, 1.0 + push, -push)  # the loss's derivative by this energy
        optimizer.zero_grad()
        torch.autograd.backward((signs * energies).sum() / len(rows))
        optimizer.step()
        assert latents.grad is not None
        gradient = latents.grad * (len(rows) / signs[:, None])  # of the energy alone: one backward pass does for both
        # half the gradient, times the inverse of half the Hessian: a Newton step at latent_rate 1
        newton = (pairs.curvature[rows] @ (gradient / 2)[:, :, None])[:, :, 0]
        pairs.latents[rows] = latents.detach() - config.latent_rate * newton
        pairs.energies[rows] = energies.detach()
    decoder.requires_grad_(False)


def sharpen(
    decoders: Sequence[Decoder],
    candidates: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    config: ContrastConfig | None = None,
    *,
    beta: float = 1.0,
    checkpoint: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], list[Tensor], list[Tensor]]:
    """Run all rounds: the new decoders and, for every class, the latents (P,D) of its own images and of its rivals',
    copies included.

    ``checkpoint`` names a file written after each round and continued from; resumed and uninterrupted runs end in the
    same weights. Raises InputError for a checkpoint of another configuration, of other decoders or of other data.
    """
    config = config or ContrastConfig()
    classes = len(decoders)
    identity = {
        "model": "contrast", "config": asdict(config),
        "data_digest": digest(images, labels, candidates, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    images, labels = with_copies(images, labels, config)
    weights = [decoder.state_dict() for decoder in decoders]
    saved = load_checkpoint(checkpoint, expect=identity) if checkpoint is not None else None
    if saved is None:
        first, pairs = 0, find_pairs(decoders, candidates, images, labels, config, beta)
    else:
        first, (weights, pairs) = int(saved[1]["round"]), _from_tensors(saved[0], classes)
    pixels = images.numpy()
    workers = workers or min(os.cpu_count() or 1, classes)
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(pixels, sizes))
    try:
        for round_number in range(first, config.rounds):
            exchange(pairs, len(images))
            with children_ignore_interrupts():
                jobs = [
                    executor.submit(
                        _round_in_process,
                        _arrays(weights[number]),
                        _arrays(vars(pairs[number])),
                        config,
                        round_number,
                        number,
                        beta,
                    )
                    for number in range(classes)
                ]
            for number, job in enumerate(jobs):
                new_weights, new_pairs = job.result()
                weights[number] = {name: torch.as_tensor(value) for name, value in new_weights.items()}
                pairs[number] = Pairs(**{name: torch.as_tensor(value) for name, value in new_pairs.items()})
                if progress is not None:
                    done = round_number * classes + number + 1
                    progress(done, config.rounds * classes, f"contrast, round {round_number + 1} of {config.rounds}")
            if checkpoint is not None:
                save_checkpoint(checkpoint, _to_tensors(weights, pairs), {**identity, "round": round_number + 1})
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()  # after Ctrl-C: the checkpoint holds all finished rounds
        executor.shutdown(wait=True, cancel_futures=True)
    sharpened = []
    for number in range(classes):
        decoder = Decoder(sizes)
        decoder.load_state_dict(weights[number])
        sharpened.append(decoder.eval().requires_grad_(False))
    return sharpened, [one.latents[one.own] for one in pairs], [one.latents[~one.own] for one in pairs]


_worker_data: dict[str, Any] = {}  # what a worker process is given once, at its start


def _start_worker(pixels: Any, sizes: VAEConfig) -> None:
    torch.set_num_threads(1)
    end_with_parent()
    _worker_data.update(images=torch.from_numpy(pixels), sizes=sizes)


def _round_in_process(
    weights: dict[str, Any], pairs: dict[str, Any], config: ContrastConfig, round_number: int, number: int, beta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``train_round`` in a worker; tensors travel as NumPy arrays."""
    decoder = Decoder(_worker_data["sizes"])
    decoder.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    own_pairs = Pairs(**{name: torch.as_tensor(np.array(value)) for name, value in pairs.items()})
    train_round(decoder, own_pairs, _worker_data["images"], config, round_number, number, beta)
    return _arrays(decoder.state_dict()), _arrays(vars(own_pairs))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in tensors.items()}


def _to_tensors(weights: Sequence[Mapping[str, Tensor]], pairs: Sequence[Pairs]) -> dict[str, Tensor]:
    tensors = {f"{number}.decoder.{name}": value for number, one in enumerate(weights) for name, value in one.items()}
    return tensors | {
        f"{number}.pairs.{name}": value for number, one in enumerate(pairs) for name, value in vars(one).items()
    }


def _from_tensors(tensors: dict[str, Tensor], classes: int) -> tuple[list[dict[str, Tensor]], list[Pairs]]:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    return (
        [part(f"{number}.decoder.") for number in range(classes)],
        [Pairs(**part(f"{number}.pairs.")) for number in range(classes)],
    )
