"""Training of prototype-abs: which latents to decode, and the decoders, so that every image keeps its distance.

The prototypes begin as the centers of a clustering of the latents that explain training images. Then latents and
decoders descend, over images moved a little at random, the loss

    temperature * softplus((margin - r) / temperature),       r = (f_c - f_y) / (2 ||p_c - p_y||)

where p_y and p_c are the nearest prototypes of the true class and of all others, and the norm counts only pixels that
have room in the box: r is the certified L2 radius when no other pair is tighter (``absynth.certificates``). This is
learning vector quantization for its certified margin (compare Saralajew, Holdijk and Villmann, NeurIPS 2020).

With ``few_weight`` the same is asked in L0, of q = (f_c - f_y) / 2g where g is what an attacker gains at most with
``few`` pixels, whole: the image is certified there when q exceeds 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from absynth.data import digest
from absynth.decoding import FoldedDecoder, from_blocks
from absynth.errors import InputError
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    """``count`` prototypes a class; ``margin`` and ``temperature`` in units of L2 distance."""

    count: int = 4000
    epochs: int = 4
    batch_size: int = 128
    margin: float = 0.8
    temperature: float = 0.3
    beta: float = 0.5  # weight of the prior's cost
    latent_rate: float = 0.03
    learning_rate: float = 7e-4  # of the decoders
    refreshed: int = 160  # steps after which all prototypes are decoded anew, not only those just used
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=5, zoom=0.05, shear=5, shift=0.3, bicubic=True)
    )
    few: int = 12  # pixels
    few_weight: float = 0.0  # of the loss in L0 beside that in L2
    few_margin: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.epochs, self.batch_size, self.refreshed) < 1:
            raise InputError(f"{self}: count, epochs, batch_size and refreshed must be at least 1")
        if self.few < 1 or self.few_weight < 0:
            raise InputError(f"{self}: few must be at least 1, few_weight not negative")


@dataclass
class _State:
    decoders: list[Decoder]
    latents: Tensor  # (K*M,D), class by class
    first: Tensor  # (K*M,D): Adam's moments of the latents, and how often each was updated (K*M,1)
    second: Tensor
    updates: Tensor
    optimizer: torch.optim.Adam
    points: Tensor  # (K*M,N): decoded, some a few steps old
    squares: Tensor  # (K*M,): their squared lengths


def train_prototypes(
    decoders: Sequence[Decoder],
    latents: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    config: PrototypeConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], Tensor]:
    """Train prototypes that begin at ``latents`` (K,M,D): the new decoders and latents.

    On images (N,C,S,S) in [0,1] with labels (N,). ``checkpoint`` names a file written after each epoch and continued
    from; a resumed training ends in the same weights, up to the rounding of sums over several threads. Raises
    InputError for a checkpoint of another training.
    """
    config = config or PrototypeConfig()
    classes, count, size = latents.shape
    identity = {
        "model": "prototype-abs", "config": asdict(config),
        "data_digest": digest(images, labels, latents, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    state = _begin(decoders, latents, sizes, config)
    first = 0
    saved = load_checkpoint(checkpoint, expect=identity) if checkpoint is not None else None
    if saved is not None:
        _restore(state, saved[0])
        first = int(saved[1]["epoch"])
    batch_size = min(config.batch_size, len(images))
    steps = len(images) // batch_size
    own = torch.arange(classes).repeat_interleave(count)
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        _decode_all(state, count)
        order = torch.randperm(len(images), generator=generator)
        for step, rows in enumerate(order[: steps * batch_size].split(batch_size)):
            if step % config.refreshed == config.refreshed - 1:
                _decode_all(state, count)
            batch = augment(images[rows], config.augmentation, generator).flatten(1)
            loss = _step(state, batch, labels[rows], own, (epoch * steps + step) / (config.epochs * steps), config)
            if progress is not None:
                progress(epoch * steps + step + 1, config.epochs * steps, f"prototypes: loss {loss:.4f}")
        if checkpoint is not None:
            save_checkpoint(checkpoint, _tensors(state), {**identity, "epoch": epoch + 1})
    for decoder in state.decoders:
        decoder.requires_grad_(False)
    return state.decoders, state.latents.view(classes, count, size)


def _begin(decoders: Sequence[Decoder], latents: Tensor, sizes: VAEConfig, config: PrototypeConfig) -> _State:
    copies = []
    for decoder in decoders:
        copy = Decoder(sizes)
        copy.load_state_dict(decoder.state_dict())
        copies.append(copy.eval().requires_grad_(True))  # batch norm as it will be used
    flat = latents.flatten(0, 1).clone()  # (K,M,D) -> (K*M,D)
    parameters = [parameter for copy in copies for parameter in copy.parameters()]
    return _State(
        copies, flat, torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros(len(flat), 1),
        torch.optim.Adam(parameters, betas=(0.9, 0.99)), torch.empty(0), torch.empty(0),
    )  # fmt: skip


@torch.no_grad()
def _decode_all(state: _State, count: int) -> None:
    """Decode all prototypes anew."""
    decoded = []
    for decoder, latents in zip(state.decoders, state.latents.split(count), strict=True):
        folded = FoldedDecoder(decoder)
        decoded += [from_blocks(folded(chunk), folded.channels).flatten(1) for chunk in latents.split(64)]
    state.points = torch.cat(decoded)
    state.squares = state.points.square().sum(1)


def _step(state: _State, batch: Tensor, labels: Tensor, own: Tensor, done: float, config: PrototypeConfig) -> float:
    """One step of Adam on the prototypes nearest to a batch (B,N) with labels (B,); returns the loss before it."""
    count = len(own) // len(state.decoders)
    costs = config.beta / 2 * state.latents.square().sum(1)
    energies = torch.addmm(state.squares + costs, batch, state.points.T, alpha=-2)  # (B,K*M)
    energies = energies.view(len(batch), -1, count)
    mine = F.one_hot(labels, energies.shape[1]).bool()
    nearest = energies[mine].argmin(1) + labels * count  # (B,)
    rival = energies.masked_fill_(mine[:, :, None], math.inf).flatten(1).argmin(1)  # (B,)
    used, places = torch.cat([nearest, rival]).unique(return_inverse=True)
    latents = state.latents[used].requires_grad_(True)
    decoded = torch.cat(
        [
            decoder(latents[own[used] == number]).flatten(1)
            for number, decoder in enumerate(state.decoders)
            if bool((own[used] == number).any())
        ]
    )  # (U,N): `used` ascends, class by class
    explained = (batch.repeat(2, 1) - decoded[places]).square().sum(1)
    explained = explained + config.beta / 2 * latents[places].square().sum(1)  # (2B,)
    true, other = explained.chunk(2)
    apart = decoded[places[len(batch) :]] - decoded[places[: len(batch)]]
    apart = apart.clamp(min=0) * (batch < 1) + apart.clamp(max=0) * (batch > 0)  # where there is room in the box
    radius = (other - true) / (2 * (apart.square().sum(1) + 1e-6).sqrt())
    loss = (config.temperature * F.softplus((config.margin - radius) / config.temperature)).mean()
    if config.few_weight:
        gains = apart.clamp(min=0) * (1 - batch) - apart.clamp(max=0) * batch  # of a pixel that goes to its end
        few = (other - true) / (2 * gains.topk(config.few, dim=1).values.sum(1) + 1e-6)
        missing = F.softplus((config.few_margin - few) / config.temperature)
        loss = loss + config.few_weight * config.temperature * missing.mean()
    rate = min(1.0, (done + 1e-3) / 0.05) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    state.optimizer.param_groups[0]["lr"] = config.learning_rate * rate
    state.optimizer.zero_grad()
    torch.autograd.backward(loss)
    state.optimizer.step()
    assert latents.grad is not None
    with torch.no_grad():  # Adam, but a latent that was not used keeps its moments
        gradient = latents.grad * len(batch)
        state.updates[used] += 1
        state.first[used] = 0.9 * state.first[used] + 0.1 * gradient
        state.second[used] = 0.99 * state.second[used] + 0.01 * gradient.square()
        mean = state.first[used] / (1 - 0.9 ** state.updates[used])
        spread = (state.second[used] / (1 - 0.99 ** state.updates[used])).sqrt()
        state.latents[used] -= config.latent_rate * rate * mean / (spread + 1e-6)
        state.points[used] = decoded.detach()
        state.squares[used] = decoded.detach().square().sum(1)
    return float(loss.detach())


def _tensors(state: _State) -> dict[str, Tensor]:
    tensors = {"latents": state.latents, "first": state.first, "second": state.second, "updates": state.updates}
    for number, decoder in enumerate(state.decoders):
        tensors |= {f"{number}.decoder.{name}": value for name, value in decoder.state_dict().items()}
        for name, parameter in decoder.named_parameters():
            for key, value in state.optimizer.state[parameter].items():
                tensors[f"{number}.optimizer.{name}.{key}"] = value
    return tensors


def _restore(state: _State, tensors: dict[str, Tensor]) -> None:
    state.latents, state.updates = tensors["latents"], tensors["updates"]
    state.first, state.second = tensors["first"], tensors["second"]
    for number, decoder in enumerate(state.decoders):
        prefix = f"{number}.decoder."
        decoder.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
        for name, parameter in decoder.named_parameters():
            prefix = f"{number}.optimizer.{name}."
            state.optimizer.state[parameter] = {
                key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)
            }
