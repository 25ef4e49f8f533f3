"""The generative models of all classes, trained side by side: on a CPU one process and one thread for each core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absynth.training.generative import GenerativeConfig, Progress, TrainedClass, shared_start, train_class
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import VAE, VAEConfig


def train_classes(
    images: Tensor,
    labels: Tensor,
    config: GenerativeConfig | None = None,
    *,
    checkpoints: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[TrainedClass]:
    """Train one model a class on images (N,C,S,S) in [0,1] and labels (N,), numbered from 0.

    ``checkpoints`` names a folder with one file a class and one for what they share. ``workers``: how many classes are
    trained at once, each in a process with one thread; None takes one for each core on a CPU and 1 on CUDA. The result
    does not depend on it.
    """
    config = config or GenerativeConfig()
    classes = int(labels.max()) + 1
    files = [Path(checkpoints) / f"class-{number}.safetensors" if checkpoints else None for number in range(classes)]
    workers = workers or (min(os.cpu_count() or 1, classes) if images.device.type == "cpu" else 1)
    done = [0] * (classes + 1)  # the last: what all share
    total = classes * config.steps + config.shared_steps

    def report(number: int, step: int, text: str) -> None:
        done[number] = step
        if progress is not None:
            progress(sum(done), total, text)

    start = None
    if config.shared_steps:
        start = shared_start(
            images,
            config,
            checkpoint=Path(checkpoints) / "shared.safetensors" if checkpoints else None,
            progress=lambda step, _total, text: report(classes, step, text),
        )
        done[classes] = config.shared_steps
    if workers == 1:
        return [
            train_class(
                images[labels == number],
                number,
                config,
                start=start,
                checkpoint=files[number],
                progress=lambda step, _total, text, number=number: report(number, step, text),  # type: ignore[misc]
            )
            for number in range(classes)
        ]
    begun = None if start is None else {name: value.numpy() for name, value in start.state_dict().items()}
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    with children_ignore_interrupts():
        manager.start(end_with_parent)
    with manager:
        messages = manager.Queue()
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
        try:
            with children_ignore_interrupts():
                jobs = [
                    executor.submit(
                        _train_in_process,
                        images[labels == number].numpy(),
                        number,
                        config,
                        begun,
                        files[number],
                        messages,
                    )
                    for number in range(classes)
                ]
            while not all(job.done() for job in jobs):
                with contextlib.suppress(queue.Empty):
                    report(*messages.get(timeout=0.5))
            while not messages.empty():
                report(*messages.get())
            return [_trained(images, config, *job.result()) for job in jobs]
        finally:
            for process in list((executor._processes or {}).values()) if not all(job.done() for job in jobs) else ():
                process.terminate()  # Ctrl-C: the checkpoints hold all but the last steps
            executor.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _train_in_process(
    images: Any,
    number: int,
    config: GenerativeConfig,
    begun: dict[str, Any] | None,
    checkpoint: Path | None,
    messages: Any,
) -> tuple[dict[str, Any], Any]:
    """``train_class`` in a worker: weights and latents come back as NumPy arrays."""

    def report(step: int, _total: int, text: str) -> None:
        if step % 20 == 0 or step == config.steps:
            messages.put((number, step, text))

    pixels = torch.from_numpy(images)
    start = None if begun is None else _with_weights(pixels, config, begun)
    trained = train_class(pixels, number, config, start=start, checkpoint=checkpoint, progress=report)
    return {name: value.numpy() for name, value in trained.vae.state_dict().items()}, trained.latents.numpy()


def _trained(images: Tensor, config: GenerativeConfig, weights: dict[str, Any], latents: Any) -> TrainedClass:
    vae = _with_weights(images, config, weights)
    return TrainedClass(vae.eval().requires_grad_(False), torch.from_numpy(latents))


def _with_weights(images: Tensor, config: GenerativeConfig, weights: dict[str, Any]) -> VAE:
    """The autoencoder for such images with these weights, as NumPy arrays."""
    vae = VAE(VAEConfig(images.shape[-1], images.shape[1], config.latent_size))
    vae.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return vae
