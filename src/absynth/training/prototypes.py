"""Training of prototype-abs: which latents to decode, and the decoders, so that every image keeps its distance.

The prototypes begin as the centers of a clustering of the latents that explain training images. Then latents and
decoders descend, over images moved a little at random, the loss

    temperature * softplus((margin - r) / temperature),       r = (f_c - f_y) / (2 ||p_c - p_y||)

where p_y and p_c are the nearest prototypes of the true class and of all others, and the norm counts only pixels that
have room in the box: r is the certified L2 radius when no other pair is tighter (``absynth.certificates``). This is
learning vector quantization for its certified margin (compare Saralajew, Holdijk and Villmann, NeurIPS 2020).

With ``balls`` the same is asked of the gap in units of what an attacker can close of it within each of these balls
(``absynth.training.margins``), through the response of the model where it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from absynth.data import digest
from absynth.decoding import to_blocks
from absynth.errors import InputError
from absynth.responses import Ramp
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.margins import room
from absynth.training.stacked import (
    StackedDecoders,
    decode_mixed,
    restore_stacked,
    rows_by_class,
    stacked_tensors,
)
from absynth.vae import Decoder, VAEConfig

Progress = Callable[[int, int, str], None]

DECODED = 16  # prototypes of each class decoded at once


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    """``count`` prototypes a class; ``margin`` and ``temperature`` in units of L2 distance."""

    count: int = 4000
    epochs: int = 4
    batch_size: int = 128
    margin: float = 0.8
    temperature: float = 0.3
    weight: float = 1.0  # of the loss above
    beta: float = 0.5  # weight of the prior's cost
    latent_rate: float = 0.03
    learning_rate: float = 7e-4  # of the decoders
    latent_size: int = 0  # of the prototypes; 0: as many latents as the decoders they begin with
    refreshed: int = 160  # steps after which all prototypes are decoded anew, not only those just used
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=5, zoom=0.05, shear=5, shift=0.3, bicubic=True)
    )
    balls: tuple[tuple[str, float, float], ...] = ()  # norm, radius, weight
    ball_margin: float = 1.2  # 1 just holds within the ball
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.epochs, self.batch_size, self.refreshed) < 1:
            raise InputError(f"{self}: count, epochs, batch_size and refreshed must be at least 1")
        if any(radius <= 0 or weight < 0 for _, radius, weight in self.balls):
            raise InputError(f"{self}: a ball needs a positive radius and a weight that is not negative")


def with_more_latents(
    decoders: Sequence[Decoder], latents: Tensor, sizes: VAEConfig, size: int, seed: int
) -> tuple[list[Decoder], Tensor, VAEConfig]:
    """Decoders that take ``size`` latents, and the latents (K,M,size) that decode to the same images: more to learn.

    The weights of what is added are drawn at random, half as large as the others; the latents added are 0.
    """
    added = size - latents.shape[2]
    if added <= 0:
        return list(decoders), latents, sizes
    wider = replace(sizes, latent_size=size)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for decoder in decoders:
        state = {name: value.clone() for name, value in decoder.state_dict().items()}
        first = state["conv_0.weight"]  # (D,32,n,n)
        drawn = torch.randn(added, *first.shape[1:], generator=generator)
        state["conv_0.weight"] = torch.cat([first, 0.5 * first.std() * drawn])
        one = Decoder(wider)
        one.load_state_dict(state)
        made.append(one.eval())
    return made, torch.cat([latents, latents.new_zeros(*latents.shape[:2], added)], dim=2), wider


@dataclass
class _State:
    decoders: StackedDecoders
    latents: Tensor  # (K*M,D), class by class
    first: Tensor  # (K*M,D): Adam's moments of the latents, and how often each was updated (K*M,1)
    second: Tensor
    updates: Tensor
    optimizer: torch.optim.Adam
    points: Tensor  # (K*M,N): decoded, in block order, some a few steps old
    squares: Tensor  # (K*M,): their squared lengths


def train_prototypes(
    decoders: Sequence[Decoder],
    latents: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    config: PrototypeConfig | None = None,
    *,
    response: Ramp | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], Tensor]:
    """Train prototypes that begin at ``latents`` (K,M,D): the new decoders and latents.

    On images (N,C,S,S) in [0,1] with labels (N,), moved at random and then put through ``response``, on the device
    where they are. ``checkpoint`` names a file written after each epoch and continued
    from; a resumed training ends in the same weights, up to the rounding of sums over several threads. Raises
    InputError for a checkpoint of another training.
    """
    config = config or PrototypeConfig()
    classes, count, size = latents.shape
    identity = {
        "model": "prototype-abs", "config": asdict(config), "response": repr(response),
        "data_digest": digest(images, labels, latents, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    state = _begin(decoders, latents.to(images.device), sizes, config)
    first = 0
    saved = load_checkpoint(checkpoint, expect=identity) if checkpoint is not None else None
    if saved is not None:
        _restore(state, saved[0])
        first = int(saved[1]["epoch"])
    batch_size = min(config.batch_size, len(images))
    steps = len(images) // batch_size
    seen_through = response or Ramp(0.0)
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        _decode_all(state, count)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for step, rows in enumerate(order[: steps * batch_size].split(batch_size)):
            if step % config.refreshed == config.refreshed - 1:
                _decode_all(state, count)
            batch = to_blocks(augment(images[rows], config.augmentation, generator))
            done = (epoch * steps + step) / (config.epochs * steps)
            loss = _step(state, batch, labels[rows], done, config, seen_through)
            if progress is not None and (not images.is_cuda or step % 10 == 9):  # there a look at the loss waits for it
                progress(epoch * steps + step + 1, config.epochs * steps, f"prototypes: loss {float(loss):.4f}")
        if checkpoint is not None:
            save_checkpoint(checkpoint, _tensors(state), {**identity, "epoch": epoch + 1})
    return state.decoders.decoders(), state.latents.view(classes, count, size).cpu()


def _begin(decoders: Sequence[Decoder], latents: Tensor, sizes: VAEConfig, config: PrototypeConfig) -> _State:
    stacked = StackedDecoders(decoders, sizes).to(latents.device)
    flat = latents.flatten(0, 1).clone()  # (K,M,D) -> (K*M,D)
    return _State(
        stacked, flat, torch.zeros_like(flat), torch.zeros_like(flat), flat.new_zeros(len(flat), 1),
        torch.optim.Adam(stacked.parameters(), betas=(0.9, 0.99)), torch.empty(0), torch.empty(0),
    )  # fmt: skip


@torch.no_grad()
def _decode_all(state: _State, count: int) -> None:
    """Decode all prototypes anew."""
    size = DECODED * (16 if state.latents.is_cuda else 1)
    chunks = state.latents.view(-1, count, state.latents.shape[1]).split(size, dim=1)
    state.points = torch.cat([state.decoders(chunk) for chunk in chunks], dim=1).flatten(0, 1)  # (K,M,N) -> (K*M,N)
    state.squares = state.points.square().sum(1)


def _step(
    state: _State, pixels: Tensor, labels: Tensor, done: float, config: PrototypeConfig, response: Ramp
) -> Tensor:
    """One step of Adam on the prototypes nearest to a batch (B,N) with labels (B,); the loss before it."""
    batch, classes = response(pixels), state.decoders.classes
    count = len(state.latents) // classes
    costs = config.beta / 2 * state.latents.square().sum(1)
    energies = torch.addmm(state.squares + costs, batch, state.points.T, alpha=-2)  # (B,K*M)
    energies = energies.view(len(batch), classes, count)
    best = energies.min(2)  # (B,K)
    mine = F.one_hot(labels, classes).bool()
    closest = best.values.masked_fill(mine, math.inf).argmin(1)  # (B,): the rival class
    chosen = torch.stack([labels, closest], dim=1)  # (B,2)
    used = (best.indices.gather(1, chosen) + chosen * count).flatten()  # (2B,): true class, rival, true class, ...
    latents = state.latents[used].requires_grad_(True)
    decoded = decode_mixed(state.decoders, latents, rows_by_class(chosen.flatten(), classes))  # (2B,N)
    explained = (batch.repeat_interleave(2, dim=0) - decoded).square().sum(1)
    true, other = (explained + config.beta / 2 * latents.square().sum(1)).view(-1, 2).unbind(1)
    points = decoded.view(len(batch), 2, -1)
    apart = points[:, 1] - points[:, 0]
    reachable = apart.clamp(min=0) * (batch < 1) + apart.clamp(max=0) * (batch > 0)  # where there is room in the box
    radius = (other - true) / (2 * (reachable.square().sum(1) + 1e-6).sqrt())
    loss = config.weight * _missing(radius, config.margin, config.temperature)
    for norm, size, weight in config.balls:
        held = room(other - true, apart, pixels, response, norm, size)
        loss = loss + weight * _missing(held, config.ball_margin, config.temperature)
    rate = min(1.0, (done + 1e-3) / 0.05) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    state.optimizer.param_groups[0]["lr"] = config.learning_rate * rate
    state.optimizer.zero_grad()
    torch.autograd.backward(loss)
    state.optimizer.step()
    assert latents.grad is not None
    with torch.no_grad():
        _move_latents(state, used, latents.grad * len(batch), config.latent_rate * rate)
        state.points[used] = decoded.detach()
        state.squares[used] = decoded.detach().square().sum(1)
    return loss.detach()


def _move_latents(state: _State, used: Tensor, gradient: Tensor, rate: float) -> None:
    """Adam on the latents ``used`` (E,), some more than once, by their gradients (E,D); others keep their moments."""
    total = torch.zeros_like(state.latents).index_add_(0, used, gradient)
    touched = torch.zeros_like(state.updates).index_fill_(0, used, 1.0)  # (K*M,1)
    state.updates += touched
    state.first.lerp_(total, 0.1 * touched)
    state.second.lerp_(total.square(), 0.01 * touched)
    mean = state.first / (1 - 0.9 ** state.updates.clamp(min=1))
    spread = (state.second / (1 - 0.99 ** state.updates.clamp(min=1))).sqrt()
    state.latents -= rate * touched * mean / (spread + 1e-6)


def _missing(reached: Tensor, wanted: float, temperature: float) -> Tensor:
    """By how much, softly, values (B,) stay below what is wanted: a scalar."""
    return temperature * F.softplus((wanted - reached) / temperature).mean()


def _tensors(state: _State) -> dict[str, Tensor]:
    kept = {"latents": state.latents, "first": state.first, "second": state.second, "updates": state.updates}
    return kept | stacked_tensors(state.decoders, state.optimizer)


def _restore(state: _State, tensors: dict[str, Tensor]) -> None:
    for name in ("latents", "updates", "first", "second"):
        getattr(state, name).copy_(tensors[name])
    restore_stacked(state.decoders, state.optimizer, tensors)
