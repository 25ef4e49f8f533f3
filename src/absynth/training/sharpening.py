"""The contrast of ``absynth.training.contrast`` on a CPU: one process and one thread for each core, class by class.

Within a round a class needs of the others only the energies of the search, so classes work side by side.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from absynth.data import digest
from absynth.decoding import FoldedDecoder
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.contrast import (
    STAGES,
    ContrastConfig,
    Pairs,
    Scan,
    Starts,
    choose_rivals,
    derivatives,
    exchange,
    moved,
    of_round,
    rate_at,
    scan,
    settle,
)
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]


def _energies(decoder: Decoder, latents: Tensor, targets: Tensor, beta: float) -> Tensor:
    squared_error = (targets - decoder(latents)).square().flatten(1).sum(1)  # (b,)
    energies: Tensor = squared_error + beta / 2 * latents.square().sum(1)
    return energies


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
    given = {"images": images.numpy(), "labels": labels.numpy()}
    settings = {**given, "sizes": sizes, "config": config, "beta": beta, "response": response}
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
            seen = labels[of_round(labels, config, round_number)]  # (n,)
            scanned = each_class(_scan, round_number, 0, weights, starts)
            scans = [Scan(**_tensors(found)) for found, _ in scanned]
            promises = torch.stack([one.promised for one in scans], dim=1)  # (N,K)
            wanted = choose_rivals(promises, seen, config)
            true = promises.gather(1, seen[:, None])[:, 0]
            pairs = [Pairs.begun(wanted[:, c], seen == c, candidates.shape[2], true) for c in range(classes)]
            found = [_arrays(vars(one.rows(pair.images))) for one, pair in zip(scans, pairs, strict=True)]
            begun = [_arrays(vars(one)) for one in pairs]
            inverses = [one for _, one in scanned]
            settled = each_class(_settle, round_number, 1, weights, starts, inverses, found, begun)
            pairs = [Pairs(**_tensors(one)) for one in settled]
            exchange(pairs, len(seen))
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
    _worker.update(settings, round=None)
    _worker.update({name: torch.from_numpy(settings[name]) for name in ("images", "labels")})


def _round_images(round_number: int) -> Tensor:
    """The images of a round, moved once in each process."""
    if _worker["round"] != round_number:
        images, config = _worker["images"], _worker["config"]
        rows = of_round(_worker["labels"], config, round_number)
        _worker["moved"] = moved(images[rows], config, round_number, _worker["response"])
        _worker["round"] = round_number
    found: Tensor = _worker["moved"]
    return found


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
