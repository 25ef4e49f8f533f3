"""The third phase of training: each decoder learns not to explain the images of other classes.

The first two phases make a decoder explain its own class. What decides a classification, and how far an adversarial has
to go, is the gap to the energy that the *best rival* reaches; nothing in those phases asks for one. Here, for image x
of class y and rival c, the loss

    E_y(x) + weight * temperature * softplus((E_y(x) + margin - E_c(x)) / temperature)

is descended in the decoders' weights. By the envelope theorem its gradient needs no derivative of the minimizing
latents.

Every round moves every training image afresh, at random: latents kept for an image, or for a few copies of it, let a
decoder learn its training images by heart (LOG.md). So a round begins with a search for the latents: the best of the
candidates, then a few Newton steps with the curvature of that candidate, for the true class and for the rivals that
come close. The first step needs no decode, for the decoder's Jacobian at each candidate is known. No adversarial image
is used. Within a round a class needs of the others only the energies of this search, so classes work side by side.
Batch norm stays in eval mode: the decoder is the one the analysis will use.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from absynth.candidates import Candidates, chunk_size, matrix_vector
from absynth.data import digest
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """``rounds`` passes over all images; ``margin`` and ``temperature`` in units of un-normalized energy."""

    rounds: int = 8
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=8, zoom=0.08, shear=6, shift=0.5, elastic=0.3, bicubic=True)
    )
    rivals: int = 2  # classes an image is contrasted with: those with the best candidates
    margin: float = 8.0
    temperature: float = 3.0
    weight: float = 3.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    settling: int = 2  # Newton steps of the search, the one from the candidate included
    seed: int = 0

    @property
    def hard(self) -> float:
        """The gap below which a pair is hard."""
        return self.margin + 2 * self.temperature


STAGES = 3  # of a round: compare with the candidates, settle the latents, train
# What a Newton step promises is not the minimum: rivals are searched for up to this much beyond a hard gap.
UNSETTLED = 10.0


@dataclass
class Pairs:
    """The images that one class is asked to explain: its own, and those it is a rival for."""

    images: Tensor  # (P,) indices into the training set
    own: Tensor  # (P,) bool
    latents: Tensor  # (P,D)
    energies: Tensor  # (P,) of this class
    others: Tensor  # (P,) of the class to be compared with: the true class for a rival, the best rival for its own

    @classmethod
    def begun(cls, wanted: Tensor, own: Tensor, size: int) -> Pairs:
        """Those that a class looks at, ``wanted`` (N,) of all images; ``own`` (N,) are its own. Latents, of ``size``
        numbers, and energies are yet to be found."""
        rows = wanted.nonzero()[:, 0]
        nothing = torch.full((len(rows),), torch.nan, device=rows.device)
        return cls(rows, own[rows], nothing[:, None].repeat(1, size), nothing.clone(), nothing)

    def gaps(self) -> Tensor:
        """The rival's energy minus the true class's (P,)."""
        return gaps_between(self.own, self.energies, self.others)


def gaps_between(own: Tensor, energies: Tensor, others: Tensor) -> Tensor:
    """The rival's energy minus the true class's, for pairs of any shape."""
    return torch.where(own, others - energies, energies - others)


def derivatives(own: Tensor, energies: Tensor, others: Tensor, config: ContrastConfig) -> Tensor:
    """The derivative of the loss by the energies of pairs, for pairs of any shape."""
    gaps = gaps_between(own, energies.detach(), others)
    push = config.weight * torch.sigmoid((config.margin - gaps) / config.temperature)
    return torch.where(own, 1.0 + push, -push)


def rate_at(done: float, config: ContrastConfig) -> float:
    """The learning rate when this share of the training is done: up in a line, down as a cosine."""
    return config.learning_rate * min(1.0, done / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def moved(
    images: Tensor, config: ContrastConfig, round_number: int, response: nn.Module | None, chunk: int = 1000
) -> Tensor:
    """The images (N,C,S,S) of one round: each moved at random, then seen through the response."""
    generator = torch.Generator().manual_seed(config.seed * 1000 + round_number)
    parts = [augment(part, config.augmentation, generator) for part in images.split(chunk)]
    return torch.cat([part if response is None else response(part) for part in parts])


@dataclass(frozen=True)
class Starts:
    """The candidates of one class, with all that a Newton step from each of them takes."""

    candidates: Candidates
    jacobians: Tensor  # (M,D,N)
    inverses: Tensor  # (M,D,D): (J'J + beta/2 I)^-1
    beta: float

    @classmethod
    @torch.no_grad()
    def of(cls, folded: FoldedDecoder, latents: Tensor, beta: float) -> Starts:
        chunks = latents.split(2000 if latents.is_cuda else 32)
        jacobians = torch.cat([folded.tangents(folded.activations(chunk)) for chunk in chunks])
        damping = beta / 2 * torch.eye(latents.shape[1], device=latents.device)
        inverses = torch.linalg.inv(jacobians @ jacobians.mT + damping)
        return cls(Candidates(folded, latents, beta), jacobians, inverses, beta)

    def step(self, blocks: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the ``chosen`` candidates (B,) of images (B,N), or from the one (1,) of all: their energies (B,), the
        Newton step (B,D), and the energy (B,) that it promises."""
        residual, latents = blocks - self.candidates.points[chosen], self.candidates.latents[chosen]
        energies = residual.square().sum(1) + self.beta / 2 * latents.square().sum(1)
        jacobians, inverses = self.jacobians[chosen], self.inverses[chosen]
        if len(chosen) == 1:
            descent = residual @ jacobians[0].T - self.beta / 2 * latents  # minus half the gradient
            newton = descent @ inverses[0].T
        else:
            descent = matrix_vector(jacobians, residual) - self.beta / 2 * latents
            newton = matrix_vector(inverses, descent)
        return energies, newton, energies - (newton * descent).sum(1)


@dataclass(frozen=True)
class Scan:
    """What a class's candidates tell about images: the best one of each, and the Newton step from there."""

    chosen: Tensor  # (N,) candidates
    energies: Tensor  # (N,) there
    newton: Tensor  # (N,D)
    promised: Tensor  # (N,): the energies that the step promises

    def rows(self, index: Tensor) -> Scan:
        """Those of the images ``index``."""
        return Scan(self.chosen[index], self.energies[index], self.newton[index], self.promised[index])


@torch.no_grad()
def scan(starts: Starts, images: Tensor) -> Scan:
    """Compare images (N,C,S,S) with the candidates of a class."""
    points, offsets = starts.candidates.points, starts.candidates.offsets
    parts = images.split(chunk_size(256, images))
    chosen = torch.cat([torch.addmm(offsets, to_blocks(part), points.T, alpha=-1).argmin(1) for part in parts])
    energies, promised = images.new_empty(len(images)), images.new_empty(len(images))
    newton = images.new_empty(len(images), starts.candidates.latents.shape[1])
    for rows, candidates in _alike(chosen):
        blocks = to_blocks(images[rows])
        energies[rows], newton[rows], promised[rows] = starts.step(blocks, candidates)
    return Scan(chosen, energies, newton, promised)


def _alike(chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Which images (n,) to treat at once, and their candidates: on a CPU those with the same one (1,), whose Jacobian
    is then read once; on a GPU as many as fit (n,)."""
    if chosen.is_cuda:
        for rows in torch.arange(len(chosen), device=chosen.device).split(chunk_size(1, chosen)):
            yield rows, chosen[rows]
        return
    order = chosen.argsort(stable=True)
    candidates, counts = torch.unique_consecutive(chosen[order], return_counts=True)
    for rows, candidate in zip(order.split(counts.tolist()), candidates, strict=True):
        yield rows, candidate[None]


def choose_rivals(energies: Tensor, labels: Tensor, config: ContrastConfig) -> Tensor:
    """Which classes look at which images: (N,K) bool, from the promised energies (N,K). The true class always, and the
    ``rivals`` best others where they come close."""
    classes = energies.shape[1]
    own = torch.nn.functional.one_hot(labels, classes).bool()
    true = energies[own][:, None]  # (N,1)
    others = energies.masked_fill(own, torch.inf)
    near = others.topk(min(config.rivals, classes - 1), largest=False)
    close = near.values - true < config.hard + UNSETTLED
    return own.scatter(1, near.indices, close)


@torch.no_grad()
def settle(
    folded: FoldedDecoder,
    latents: Tensor,
    inverses: Tensor,
    found: Scan,
    pairs: Pairs,
    images: Tensor,
    config: ContrastConfig,
    beta: float,
) -> None:
    """Newton steps of the latents of ``pairs``, in place, from candidates ``latents`` (M,D) with their ``inverses``
    (M,D,D); ``found`` is the scan of their images. A step that raises the energy is taken back, and the next one is
    shorter."""
    device = images.device
    for rows in torch.arange(len(pairs.images), device=device).split(chunk_size(64, images)):
        targets, chosen = to_blocks(images[pairs.images[rows]]), found.chosen[rows]
        best, rate = latents[chosen], torch.ones(len(rows), device=device)
        lowest, newton = found.energies[rows], found.newton[rows]
        for step in range(config.settling):
            trial = best + rate[:, None] * newton
            activations = folded.activations(trial)
            residual = targets - activations.images
            energies = residual.square().sum(1) + beta / 2 * trial.square().sum(1)
            better = energies < lowest
            best = torch.where(better[:, None], trial, best)
            lowest = torch.where(better, energies, lowest)
            if step + 1 < config.settling:
                descent = folded.pullback(activations, residual) - beta / 2 * trial
                newton = torch.where(better[:, None], matrix_vector(inverses[chosen], descent), newton)
                rate = torch.where(better, rate, rate * 0.3)
        pairs.latents[rows], pairs.energies[rows] = best, lowest


def _energies(decoder: Decoder, latents: Tensor, targets: Tensor, beta: float) -> Tensor:
    squared_error = (targets - decoder(latents)).square().flatten(1).sum(1)  # (b,)
    energies: Tensor = squared_error + beta / 2 * latents.square().sum(1)
    return energies


def exchange(pairs: Sequence[Pairs], count: int) -> None:
    """Tell every pair what it is compared with: a rival the true class, a true class the best rival."""
    device = pairs[0].energies.device
    true = torch.full((count,), torch.nan, device=device)
    rival = torch.full((count,), torch.inf, device=device)
    for one in pairs:
        true[one.images[one.own]] = one.energies[one.own]
        rows = one.images[~one.own]
        rival[rows] = torch.minimum(rival[rows], one.energies[~one.own])
    for one in pairs:
        one.others = torch.where(one.own, rival[one.images], true[one.images])


def train_round(
    decoder: Decoder, pairs: Pairs, images: Tensor, config: ContrastConfig, round_number: int, number: int, beta: float
) -> None:
    """One pass of one class over its own images and its hard rivals, in place."""
    decoder.eval().requires_grad_(True)
    optimizer = torch.optim.Adam(decoder.parameters(), betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed((config.seed * 1000 + number) * 1000 + round_number)
    visited = pairs.own | (pairs.gaps() < config.hard)
    shuffled = torch.randperm(len(visited), generator=generator)
    order = shuffled[visited[shuffled]].split(config.batch_size)
    for step, rows in enumerate(order):
        rate = rate_at((round_number + step / len(order)) / config.rounds, config)
        # Adam's moments begin anew with each round: its first steps are small
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        energies = _energies(decoder, pairs.latents[rows], images[pairs.images[rows]], beta)
        signs = derivatives(pairs.own[rows], energies, pairs.others[rows], config)
        optimizer.zero_grad()
        torch.autograd.backward((signs * energies).sum() / len(rows))
        optimizer.step()
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
    response: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], list[Tensor], list[Tensor]]:
    """Run all rounds: the new decoders and, for every class, the latents (P,D) of its own images and of its rivals',
    as the last round found them.

    ``candidates`` (K,M,D) are where searches start; ``response`` is what the classifier will do to pixels.
    Images on a GPU are trained on there (``absynth.training.together``), all others by ``workers`` processes.
    ``checkpoint`` names a file written after each round and continued from; resumed and uninterrupted runs end in the
    same weights. Raises InputError for a checkpoint of another configuration, of other decoders or of other data.
    """
    config = config or ContrastConfig()
    if images.is_cuda:
        from absynth.training.together import sharpen_together  # here: it builds on this module

        return sharpen_together(
            decoders, candidates, images, labels, sizes, config,
            beta=beta, response=response, checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
    classes = len(decoders)
    identity = {
        "model": "contrast", "config": asdict(config), "response": repr(response),
        "data_digest": digest(images, labels, candidates, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    weights: list[dict[str, Any]] = [_arrays(decoder.state_dict()) for decoder in decoders]
    latents: list[tuple[Tensor, Tensor]] = []
    first = 0
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, expect=identity)) is not None:
        first, (weights, latents) = int(saved[1]["round"]), _from_tensors(saved[0], classes)
    workers = workers or min(os.cpu_count() or 1, classes)
    context = multiprocessing.get_context("spawn")
    settings = {"images": images.numpy(), "sizes": sizes, "config": config, "beta": beta, "response": response}
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(settings,))
    with children_ignore_interrupts():  # the workers start with the first job
        executor.submit(int).result()

    def each_class(work: Callable[..., Any], round_number: int, stage: int, *arguments: Sequence[Any]) -> list[Any]:
        """``work`` for every class side by side; ``arguments`` hold one entry a class."""
        with children_ignore_interrupts():
            jobs = [
                executor.submit(work, round_number, number, *given)
                for number, given in enumerate(zip(*arguments, strict=True))
            ]
        results = []
        for number, job in enumerate(jobs):
            results.append(job.result())
            if progress is not None:
                done = (round_number * STAGES + stage) * classes + number + 1
                progress(
                    done, STAGES * config.rounds * classes, f"contrast, round {round_number + 1} of {config.rounds}"
                )
        return results

    try:
        for round_number in range(first, config.rounds):
            starts = [one.numpy() for one in candidates]
            scanned = each_class(_scan, round_number, 0, weights, starts)
            scans = [Scan(**_tensors(found)) for found, _ in scanned]
            wanted = choose_rivals(torch.stack([one.promised for one in scans], dim=1), labels, config)  # (N,K)
            pairs = [Pairs.begun(wanted[:, c], labels == c, candidates.shape[2]) for c in range(classes)]
            found = [_arrays(vars(one.rows(pair.images))) for one, pair in zip(scans, pairs, strict=True)]
            begun = [_arrays(vars(one)) for one in pairs]
            inverses = [one for _, one in scanned]
            settled = each_class(_settle, round_number, 1, weights, starts, inverses, found, begun)
            pairs = [Pairs(**_tensors(one)) for one in settled]
            exchange(pairs, len(images))
            weights = each_class(_train, round_number, 2, weights, [_arrays(vars(one)) for one in pairs])
            latents = [(one.latents[one.own], one.latents[~one.own]) for one in pairs]
            if checkpoint is not None:
                save_checkpoint(checkpoint, _to_tensors(weights, latents), {**identity, "round": round_number + 1})
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()  # after Ctrl-C: the checkpoint holds all finished rounds
        executor.shutdown(wait=True, cancel_futures=True)
    sharpened = [_decoder(one, sizes).requires_grad_(False) for one in weights]
    return sharpened, [own for own, _ in latents], [rival for _, rival in latents]


_worker: dict[str, Any] = {}  # what a worker process is given once, at its start, and the images of its round


def _start_worker(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    end_with_parent()
    _worker.update(settings, images=torch.from_numpy(settings["images"]), round=None)


def _round_images(round_number: int) -> Tensor:
    """The images of a round, moved once in each process."""
    if _worker["round"] != round_number:
        _worker["moved"] = moved(_worker["images"], _worker["config"], round_number, _worker["response"])
        _worker["round"] = round_number
    images: Tensor = _worker["moved"]
    return images


# The three stages of a round for one class, in a worker; tensors travel as NumPy arrays.


def _scan(round_number: int, number: int, weights: dict[str, Any], latents: Any) -> tuple[dict[str, Any], Any]:
    folded = FoldedDecoder(_decoder(weights, _worker["sizes"]))
    starts = Starts.of(folded, torch.from_numpy(latents), _worker["beta"])
    return _arrays(vars(scan(starts, _round_images(round_number)))), starts.inverses.numpy()


def _settle(
    round_number: int,
    number: int,
    weights: dict[str, Any],
    latents: Any,
    inverses: Any,
    found: dict[str, Any],
    begun: dict[str, Any],
) -> dict[str, Any]:
    folded, pairs = FoldedDecoder(_decoder(weights, _worker["sizes"])), Pairs(**_tensors(begun))
    settle(
        folded, torch.from_numpy(latents), torch.from_numpy(inverses), Scan(**_tensors(found)), pairs,
        _round_images(round_number), _worker["config"], _worker["beta"],
    )  # fmt: skip
    return _arrays(vars(pairs))


def _train(round_number: int, number: int, weights: dict[str, Any], pairs: dict[str, Any]) -> dict[str, Any]:
    decoder = _decoder(weights, _worker["sizes"])
    images = _round_images(round_number)
    train_round(decoder, Pairs(**_tensors(pairs)), images, _worker["config"], round_number, number, _worker["beta"])
    return _arrays(decoder.state_dict())


def _decoder(weights: Mapping[str, Any], sizes: VAEConfig) -> Decoder:
    decoder = Decoder(sizes)
    decoder.load_state_dict({name: torch.as_tensor(np.array(value)) for name, value in weights.items()})
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    return decoder.eval()


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.array(value)) for name, value in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in tensors.items()}


def _to_tensors(weights: Sequence[Mapping[str, Any]], latents: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {
        f"{number}.decoder.{name}": torch.as_tensor(value)
        for number, one in enumerate(weights)
        for name, value in one.items()
    }
    for number, (own, rival) in enumerate(latents):
        tensors |= {f"{number}.own": own, f"{number}.rival": rival}
    return tensors


def _from_tensors(tensors: dict[str, Tensor], classes: int) -> tuple[list[dict[str, Any]], list[tuple[Tensor, Tensor]]]:
    def part(prefix: str) -> dict[str, Any]:
        return {name[len(prefix) :]: value.numpy() for name, value in tensors.items() if name.startswith(prefix)}

    return (
        [part(f"{number}.decoder.") for number in range(classes)],
        [(tensors[f"{number}.own"], tensors[f"{number}.rival"]) for number in range(classes)],
    )
