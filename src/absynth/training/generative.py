"""Training of the generative models: one variational autoencoder a class (paper, section 3).

Most of the latent space is laid out once, for all classes together: each class's autoencoder begins as a copy of one
that has seen all images. Then it descends the negative ELBO on its own images, moved afresh each time. The weight of
the KL divergence begins high, which keeps to the few latents that say most, and falls. For the last part of the steps
the encoder stands still, at half the cost a step.

The noise on the latents is what makes the classifier robust: decoders trained without it, on latents of every image's
own, explain images as well, but let a smaller change bring an image near to another class (LOG.md, 2026-11-27).

Classes are independent: on a CPU they are trained side by side, one process and one thread for each core.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absynth.data import digest
from absynth.errors import InputError
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.processes import children_ignore_interrupts, end_with_parent
from absynth.vae import VAE, VAEConfig, negative_elbo

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig:
    """How one class's model is trained. Steps, not epochs, so that a small data set gets as much training.

    The KL divergence weighs ``kl_first`` times ``beta`` at the first step, ``kl_last`` times from ``kl_until``, a share
    of the steps, on; after the share ``encoded`` the encoder is trained no more.
    """

    latent_size: int = 8
    beta: float = 1.0  # of the analysis that the decoder is for
    shared_steps: int = 1500  # of the one autoencoder that all classes begin from; 0: each class begins by itself
    steps: int = 6000
    batch_size: int = 32
    learning_rate: float = 3e-3
    kl_first: float = 4.0
    kl_last: float = 0.6
    kl_until: float = 0.5
    encoded: float = 1.0
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(rotation=5, zoom=0.05, shear=4, shift=0.3))
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise InputError(f"{self}: steps and batch size must be at least 1")
        if self.shared_steps < 0:
            raise InputError(f"shared_steps is {self.shared_steps}; expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected a whole number from 0 to {2**32 - 1}")

    def kl_weight(self, done: float) -> float:
        """Of the KL divergence, after the share ``done`` of the steps."""
        left = max(0.0, 1 - done / self.kl_until)
        return self.beta * (self.kl_last + (self.kl_first - self.kl_last) * left)


@dataclass(frozen=True)
class TrainedClass:
    """One class's model, in eval mode, and the latents (N,D) its encoder infers for its training images."""

    vae: VAE
    latents: Tensor


CHECKPOINT_EVERY = 500  # steps


def train_class(
    images: Tensor,
    number: int,
    config: GenerativeConfig | None = None,
    *,
    start: VAE | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainedClass:
    """Train the model of class ``number`` on its images (N,C,S,S) in [0,1], from ``start`` or from random weights.

    ``checkpoint`` names a file written every 500 steps and continued from if it exists; a resumed training ends in the
    same weights, bit for bit, as one that ran through (same machine and thread count). Raises InputError for a
    checkpoint of another configuration or other data.
    """
    config = config or GenerativeConfig()
    if len(images) < 2:
        raise InputError(f"class {number} has {len(images)} training images; at least 2 are needed: add images")
    vae = _begun(images, config, number)
    identity = {"model": "vae", "class": number, "config": asdict(config), "data_digest": digest(images), "start": None}
    if start is not None:
        vae.load_state_dict(start.state_dict())
        identity["start"] = digest(*start.state_dict().values())
    _advance(_State(vae, config), images, number, identity, checkpoint, progress, f"class {number}")
    vae.eval().requires_grad_(False)
    return TrainedClass(vae, torch.cat([vae.encoder(chunk)[0] for chunk in images.split(256)]))


def shared_start(
    images: Tensor,
    config: GenerativeConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> VAE:
    """The autoencoder that those of all classes begin from, trained for ``shared_steps`` on images (N,C,S,S) of all of
    them; ``checkpoint`` as in ``train_class``."""
    config = config or GenerativeConfig()
    vae = _begun(images, config, _ALL_CLASSES)
    identity = {"model": "shared vae", "config": asdict(config), "data_digest": digest(images)}
    # the KL divergence keeps its last weight: a high one would have to be unlearned in every class
    shared = replace(config, steps=config.shared_steps, kl_first=config.kl_last, encoded=1.0)
    _advance(_State(vae, shared), images, _ALL_CLASSES, identity, checkpoint, progress, "all classes")
    return vae.eval().requires_grad_(False)


_ALL_CLASSES = 999  # in the place of a class's number, for random draws


def _begun(images: Tensor, config: GenerativeConfig, number: int) -> VAE:
    """A new autoencoder, channels-last: a third faster on a CPU."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(config.seed * 1000 + number)
        vae = VAE(VAEConfig(images.shape[-1], images.shape[1], config.latent_size)).to(images.device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae


def _advance(
    state: _State,
    images: Tensor,
    number: int,
    identity: dict[str, Any],
    checkpoint: str | Path | None,
    progress: Progress | None,
    called: str,
) -> None:
    """Train to the last step, from the checkpoint if there is one."""
    config = state.config
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, expect=identity)) is not None:
        state.restore(*saved)
    while state.step < config.steps:
        chosen, generator = _batch(len(images), config, number, state.step)
        loss = state.descend(images[chosen], generator)
        if progress is not None:
            progress(state.step, config.steps, f"{called}: loss {loss:.2f}")
        if checkpoint is not None and (state.step % CHECKPOINT_EVERY == 0 or state.step == config.steps):
            save_checkpoint(checkpoint, state.tensors(), {**identity, "step": state.step})


def _batch(count: int, config: GenerativeConfig, number: int, step: int) -> tuple[Tensor, torch.Generator]:
    """Which of ``count`` images a step trains on, indices (b,), in a fresh order each epoch; and the step's generator.
    A resumed training draws what the uninterrupted one would have drawn."""

    def generator(position: int, purpose: int) -> torch.Generator:
        seed = ((config.seed * 1000 + number) * 4 + purpose) * 2**20 + position
        return torch.Generator().manual_seed(seed % 2**63)

    size = min(config.batch_size, count)
    epoch, place = divmod(step, count // size)
    order = torch.randperm(count, generator=generator(epoch, 2))
    return order[place * size : (place + 1) * size], generator(step, 1)


class _State:
    """All that changes during a training."""

    def __init__(self, vae: VAE, config: GenerativeConfig) -> None:
        self.vae, self.config, self.step = vae.train(), config, 0
        self.cuda = next(vae.parameters()).is_cuda
        self.optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99), fused=not self.cuda)

    def descend(self, batch: Tensor, generator: torch.Generator) -> float:
        """One Adam step; the rate rises over the first 2 % of the steps, then falls as a cosine to 1 %."""
        config, vae = self.config, self.vae
        done = self.step / config.steps
        encoding = done < config.encoded
        vae.encoder.train(encoding).requires_grad_(encoding)
        batch = augment(batch, config.augmentation, generator)
        mean, log_variance = vae.encoder(batch)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        reconstructions = vae.decoder(mean + noise * torch.exp(0.5 * log_variance))
        loss = negative_elbo(batch, reconstructions, mean, log_variance, config.kl_weight(done))
        self.optimizer.param_groups[0]["lr"] = (
            config.learning_rate * min(1.0, (done + 1e-4) / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"vae.{name}": value for name, value in self.vae.state_dict().items()}
        for name, parameter in self.vae.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.step = int(meta["step"])
        self.vae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("vae.")})
        for name, parameter in self.vae.named_parameters():
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                # as the parameter lies in memory, which a fused step takes for granted; its step count is on the CPU
                key[len(prefix) :]: torch.empty_like(parameter).copy_(value) if value.ndim else value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


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
