"""The latents with which each class explains its own training images: what prototypes are made of.

The same cheap search as in the rounds of the contrast (``absynth.training.contrast.settle``), one process a class.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from absynth.candidates import Candidates
from absynth.decoding import FoldedDecoder
from absynth.training.contrast import ContrastConfig, Pairs, Starts, best_candidates, scan, settle
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import Decoder, VAEConfig

SETTLING = ContrastConfig(settling=3)


def explanations(
    decoders: Sequence[Decoder],
    candidates: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    *,
    beta: float = 1.0,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Tensor]:
    """For every class the latents (N_c,D) that explain its own images among (N,C,S,S), labels (N,), in their order.

    ``candidates`` (K,M,D) are where the searches start. The result does not depend on ``workers``.
    """
    classes = len(decoders)
    workers = workers or min(os.cpu_count() or 1, classes)
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        with children_ignore_interrupts():
            jobs = [
                executor.submit(
                    _explain,
                    {name: value.detach().numpy() for name, value in decoder.state_dict().items()},
                    candidates[number].numpy(),
                    images[labels == number].numpy(),
                    sizes,
                    beta,
                )
                for number, decoder in enumerate(decoders)
            ]
        found = []
        for number, job in enumerate(jobs):
            found.append(torch.from_numpy(job.result()))
            if progress is not None:
                progress(number + 1, classes, f"explaining the images of class {number}")
        return found
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _explain(weights: dict[str, Any], candidates: Any, pixels: Any, sizes: VAEConfig, beta: float) -> Any:
    """One class, in a worker; tensors travel as NumPy arrays."""
    decoder = Decoder(sizes)
    decoder.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    decoder.eval().requires_grad_(False)
    images, folded = torch.from_numpy(pixels), FoldedDecoder(decoder)
    # Jacobians of those candidates alone that are the best one of an image
    latents = torch.from_numpy(candidates)
    latents = latents[best_candidates(Candidates(folded, latents, beta), images).unique()]
    starts = Starts.of(folded, latents, beta)
    everything = torch.ones(len(images), dtype=torch.bool)
    pairs = Pairs.begun(everything, everything, latents.shape[1])
    settle(
        folded, starts.candidates.latents, starts.inverses, scan(starts, images), pairs, images, SETTLING, beta
    )  # fmt: skip
    return pairs.latents.numpy()
