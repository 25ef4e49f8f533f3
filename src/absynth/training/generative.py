"""Training of the generative models: one variational autoencoder a class, then its decoder alone.

*First phase*: encoder and decoder together, by the negative ELBO (paper, section 3). It lays out the latent space. Most
of it is done once, for all classes together: each class's autoencoder begins as a copy of one that has seen all images.
*Second phase*: the decoder alone, on what the analysis will ask of it: every training image keeps latents of its own
and both descend the energy ||x - G(z)||^2 + beta/2 ||z||^2 together. An image's step is scaled by the variance the
encoder gave it, the inverse of the energy's curvature there, and ends in the ball that the analysis searches. At half
the cost a step of the first phase, it lowers the energy of unseen images far faster than more of the first phase does
(LOG.md, 2026-11-23).

Without a second phase (``decoder_steps`` 0) a longer first one, on moved images, takes its place. Its noise on the
latents is what keeps adversarials away, in L-infinity above all (LOG.md, 2026-11-27); energies that are as low take
several times as long.

Classes are independent of one another: ``absynth.training.side_by_side`` trains them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth.analysis import DEFAULT, into_ball
from absynth.data import digest
from absynth.errors import InputError
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.vae import VAE, VAEConfig, negative_elbo

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig:
    """How one class's model is trained. Steps, not epochs, so that a small data set gets as much training.

    In a class's first phase the KL divergence weighs ``kl_first`` times ``beta`` at the first step, ``kl_last`` times
    from ``kl_until``, a share of the steps, on.
    """

    latent_size: int = 8
    beta: float = 1.0
    shared_steps: int = 1500  # of the one autoencoder that all classes begin from; 0: each class begins by itself
    vae_steps: int = 300
    vae_batch_size: int = 32
    vae_learning_rate: float = 3e-3
    kl_first: float = 1.0
    kl_last: float = 1.0
    kl_until: float = 0.5
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(rotation=3, zoom=0.05, shear=3, shift=0))
    decoder_steps: int = 5000
    decoder_batch_size: int = 16
    decoder_learning_rate: float = 2e-3
    latent_rate: float = 0.5  # step of an image's own latents, relative to a Newton step
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.vae_steps, self.vae_batch_size, self.decoder_batch_size) < 1:
            raise InputError(f"{self}: steps and batch sizes must be at least 1")
        if min(self.shared_steps, self.decoder_steps) < 0:
            raise InputError(f"{self}: shared_steps and decoder_steps must be 0 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected a whole number from 0 to {2**32 - 1}")

    @property
    def steps(self) -> int:
        """Of one class, what all share left out."""
        return self.vae_steps + self.decoder_steps

    def kl_weight(self, done: float) -> float:
        """Of the KL divergence, after the share ``done`` of the first phase."""
        left = max(0.0, 1 - done / self.kl_until)
        return self.beta * (self.kl_last + (self.kl_first - self.kl_last) * left)


@dataclass(frozen=True)
class TrainedClass:
    """One class's model, in eval mode, and the latents (N,D) of its training images, in their order."""

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
    state = _State(vae, config, len(images))
    _advance(state, images, number, config.steps, identity, checkpoint, progress, f"class {number}")
    if not config.decoder_steps:
        state.infer(images)
    return TrainedClass(vae.eval().requires_grad_(False), state.latents)


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
    state = _State(vae, replace(config, vae_steps=config.shared_steps, kl_first=1.0, kl_last=1.0), len(images))
    _advance(state, images, _ALL_CLASSES, config.shared_steps, identity, checkpoint, progress, "all classes")
    return vae.eval().requires_grad_(False)


_ALL_CLASSES = 999  # in the place of a class's number, for random draws


def _begun(images: Tensor, config: GenerativeConfig, number: int) -> VAE:
    """A new autoencoder, channels-last: a third faster on a CPU."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.default_generator.manual_seed(config.seed * 1000 + number)
        vae = VAE(VAEConfig(images.shape[-1], images.shape[1], config.latent_size)).to(images.device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae


def _advance(
    state: _State,
    images: Tensor,
    number: int,
    last: int,
    identity: dict[str, Any],
    checkpoint: str | Path | None,
    progress: Progress | None,
    called: str,
) -> None:
    """Train to step ``last``, from the checkpoint if there is one."""
    config = state.config
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, expect=identity)) is not None:
        state.restore(*saved)
    while state.step < last:
        if state.step == config.vae_steps:
            state.begin_second_phase(images)
        batches = _Batches(len(images), config, number)
        for chosen, generator in batches.from_step(state.step):
            if state.step < config.vae_steps:
                loss = state.vae_step(images[chosen], generator)
            else:
                loss = state.decoder_step(images[chosen], chosen)
            if progress is not None:
                progress(state.step, last, f"{called}: loss {loss:.2f}")
            if checkpoint is not None and (state.step % CHECKPOINT_EVERY == 0 or state.step == last):
                save_checkpoint(checkpoint, state.tensors(), {**identity, "step": state.step})
            if state.step in (config.vae_steps, last):
                break


class _Batches:
    """Which images each step trains on: a fresh order each epoch, from a generator seeded by (seed, class, epoch)."""

    def __init__(self, count: int, config: GenerativeConfig, number: int) -> None:
        self.count, self.config, self.number = count, config, number

    def from_step(self, step: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """The batches from ``step`` to the end of its phase: indices (b,) and the step's generator."""
        config = self.config
        second = step >= config.vae_steps
        size = min(config.decoder_batch_size if second else config.vae_batch_size, self.count)
        first = config.vae_steps if second else 0
        epoch_steps = self.count // size
        while True:
            epoch, place = divmod(step - first, epoch_steps)
            order = torch.randperm(self.count, generator=self._generator(epoch, 2 + second))
            # one generator a step: a resumed training draws what the uninterrupted one would have drawn
            yield order[place * size : (place + 1) * size], self._generator(step, 1)
            step += 1

    def _generator(self, position: int, purpose: int) -> torch.Generator:
        seed = ((self.config.seed * 1000 + self.number) * 4 + purpose) * 2**20 + position
        return torch.Generator().manual_seed(seed % 2**63)


class _State:
    """All that changes during a training."""

    def __init__(self, vae: VAE, config: GenerativeConfig, count: int) -> None:
        self.vae, self.config, self.step = vae, config, 0
        device = next(vae.parameters()).device
        self.latents = torch.zeros(count, config.latent_size, device=device)
        self.variances = torch.ones(count, config.latent_size, device=device)
        self._begin(vae)

    def _begin(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99), fused=not self.latents.is_cuda)
        self.vae.train()

    def vae_step(self, batch: Tensor, generator: torch.Generator) -> float:
        config = self.config
        batch = augment(batch, config.augmentation, generator)
        mean, log_variance = self.vae.encoder(batch)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        reconstructions = self.vae.decoder(mean + noise * torch.exp(0.5 * log_variance))
        done = self.step / config.vae_steps
        loss = negative_elbo(batch, reconstructions, mean, log_variance, config.kl_weight(done))
        self._descend(loss, config.vae_learning_rate, done)
        return float(loss.detach())

    def begin_second_phase(self, images: Tensor) -> None:
        self.infer(images)
        self._begin(self.vae.decoder)

    def infer(self, images: Tensor) -> None:
        """Give every image the latents and the variance its encoder infers."""
        self.vae.eval()
        with torch.no_grad():
            moments = [self.vae.encoder(chunk) for chunk in images.split(256)]
        self.latents = torch.cat([mean for mean, _ in moments])
        self.variances = torch.cat([log_variance.exp() for _, log_variance in moments])

    def decoder_step(self, batch: Tensor, chosen: Tensor) -> float:
        config = self.config
        latents = self.latents[chosen].requires_grad_(True)
        squared_error = (batch - self.vae.decoder(latents)).square().flatten(1).sum(1)  # (b,)
        loss = (squared_error + config.beta / 2 * latents.square().sum(1)).mean()
        self._descend(loss, config.decoder_learning_rate, (self.step - config.vae_steps) / config.decoder_steps)
        assert latents.grad is not None
        # the gradient of an image's own energy is len(batch) times that of the mean
        moved = latents.detach() - config.latent_rate * len(batch) * self.variances[chosen] * latents.grad
        # After too few steps of the first phase the variances are far too large, and steps of this one diverge.
        self.latents[chosen] = into_ball(moved, DEFAULT.max_norm)
        return float(loss.detach())

    def _descend(self, loss: Tensor, learning_rate: float, done: float) -> None:
        """One Adam step; the rate rises over the first 2 % of the phase, then falls as a cosine to 1 %."""
        self.optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1.0, (done + 1e-4) / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"vae.{name}": value for name, value in self.vae.state_dict().items()}
        tensors |= {"latents": self.latents, "variances": self.variances}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.step = int(meta["step"])
        device = self.latents.device
        self.vae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("vae.")})
        self.latents, self.variances = tensors["latents"].to(device), tensors["variances"].to(device)
        self._begin(self.vae.decoder if self.step > self.config.vae_steps else self.vae)
        for name, parameter in self.module.named_parameters():
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                # as the parameter lies in memory, which a fused step takes for granted; its step count is on the CPU
                key[len(prefix) :]: torch.empty_like(parameter).copy_(value) if value.ndim else value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
