"""Training of decoders whose explanations hold: the gap to the best rival shall exceed what an attacker can close.

The contrast (``absynth.training.contrast``) asks for a gap of so much energy. What a gap is worth depends on the pair:
how far the two explanations differ, and where, is what an attacker can use (``absynth.training.margins``). Here, for an
image of class y and each of its closest rivals c, the loss is

    own * E_y + sum over balls of  weight * temperature * softplus((margin - room) / temperature),

room being the gap E_c - E_y in units of the most that can be closed within the ball while both explanations stay where
they are. An attacked image is explained anew, so this is no certificate; but by the envelope theorem it is the slope of
the gap. No adversarial image is used.

Every batch is moved afresh, seen through the response, and explained: the best candidate of each class, then Newton
steps with that candidate's curvature for the true class and its rivals. One process, on the device of the images: meant
for a GPU, where a round over MNIST takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from absynth.candidates import matrix_vector
from absynth.data import digest
from absynth.decoding import FoldedDecoder, to_blocks
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

KINDS = ("own", "rival")  # of the latents found: those of a class's own images, and of its rivals'


@dataclass(frozen=True, kw_only=True)
class HoldingConfig:
    """``balls``: norm, radius and weight; ``margin`` in units of what can be closed, 1 just holds."""

    epochs: int = 20
    batch_size: int = 512
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=8, zoom=0.08, shear=6, shift=0.5, elastic=0.3, bicubic=True)
    )
    balls: tuple[tuple[str, float, float], ...] = (("l2", 1.5, 1.0), ("linf", 0.3, 1.0), ("l0", 12.0, 1.0))
    margin: float = 1.2
    temperature: float = 0.3
    own: float = 0.03  # weight of the true class's energy
    rivals: int = 2
    settling: int = 3  # Newton steps of a search
    refreshed: int = 50  # steps after which the candidates are decoded anew
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.rivals, self.settling, self.refreshed) < 1:
            raise InputError(f"{self}: epochs, batch_size, rivals, settling and refreshed must be at least 1")
        if any(radius <= 0 or weight < 0 for _, radius, weight in self.balls):
            raise InputError(f"{self}: a ball needs a positive radius and a weight that is not negative")


@dataclass(frozen=True)
class _Starts:
    """The candidates of one class and what a search from each of them needs; a few steps old."""

    latents: Tensor  # (M,D)
    points: Tensor  # (M,N)
    offsets: Tensor  # (M,)
    jacobians: Tensor  # (M,D,N)
    inverses: Tensor  # (M,D,D): (J'J + beta/2 I)^-1

    @classmethod
    @torch.no_grad()
    def of(cls, decoder: Decoder, latents: Tensor, beta: float) -> _Starts:
        folded = FoldedDecoder(decoder).to(latents.device)
        points, jacobians = [], []
        for chunk in latents.split(256 if latents.is_cuda else 32):
            activations = folded.activations(chunk)
            points.append(activations.images)
            jacobians.append(folded.tangents(activations))
        found, slopes = torch.cat(points), torch.cat(jacobians)
        damping = beta / 2 * torch.eye(latents.shape[1], device=latents.device)
        inverses = torch.linalg.inv(slopes @ slopes.mT + damping)
        offsets = found.square().sum(1) + beta / 2 * latents.square().sum(1)
        return cls(latents, found, offsets, slopes, inverses)

    def promised(self, seen: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Images (B,N) -> the energy (B,) that a Newton step from the best candidate promises, and its index (B,)."""
        chosen = torch.addmm(self.offsets, seen, self.points.T, alpha=-2).argmin(1)
        residual, latents = seen - self.points[chosen], self.latents[chosen]
        energies = residual.square().sum(1) + beta / 2 * latents.square().sum(1)
        descent = matrix_vector(self.jacobians[chosen], residual) - beta / 2 * latents
        return energies - (matrix_vector(self.inverses[chosen], descent) * descent).sum(1), chosen


def train_holding(
    decoders: Sequence[Decoder],
    candidates: Tensor,
    images: Tensor,
    labels: Tensor,
    sizes: VAEConfig,
    config: HoldingConfig | None = None,
    *,
    beta: float = 1.0,
    response: Ramp | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Decoder], list[Tensor], list[Tensor]]:
    """The new decoders and, for every class, the latents (P,D) of its own images and of its rivals', as the last epoch
    found them; on the CPU.

    ``candidates`` (K,M,D) are where searches start; images (N,C,S,S) in [0,1] with labels (N,) decide the device.
    ``checkpoint`` names a file written after each epoch and continued from. Raises InputError for a checkpoint of
    another training.
    """
    config = config or HoldingConfig()
    identity = {
        "model": "holding", "config": asdict(config), "response": repr(response), "beta": beta,
        "data_digest": digest(images, labels, candidates, *(t for d in decoders for t in d.state_dict().values())),
    }  # fmt: skip
    device = images.device
    trained = StackedDecoders(decoders, sizes).to(device)
    optimizer = torch.optim.Adam(trained.parameters(), betas=(0.9, 0.99))
    found: list[list[list[Tensor]]] = []
    first = 0
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, expect=identity)) is not None:
        first = int(saved[1]["epoch"])
        restore_stacked(trained, optimizer, saved[0])
        found = [[[saved[0][f"{n}.own"]], [saved[0][f"{n}.rival"]]] for n in range(trained.classes)]
    starts_from = candidates.to(device)
    ramp = response or Ramp(0.0)
    batch_size = min(config.batch_size, len(images))
    steps = len(images) // batch_size
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator).to(device)
        found = [[[], []] for _ in decoders]
        for step, rows in enumerate(order[: steps * batch_size].split(batch_size)):
            if step % config.refreshed == 0:
                pairs = zip(trained.decoders(), starts_from, strict=True)
                starts = [_Starts.of(one, latents, beta) for one, latents in pairs]
            done = (epoch * steps + step) / (config.epochs * steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * _rate(done)
            pixels = to_blocks(augment(images[rows], config.augmentation, generator))
            keep = found if epoch + 1 == config.epochs else None
            loss = _step(trained, starts, optimizer, pixels, labels[rows], ramp, beta, config, keep)
            if progress is not None and step % 10 == 9:
                text = f"explanations that hold: loss {float(loss):.4f}"
                progress(epoch * steps + step + 1, config.epochs * steps, text)
        if checkpoint is not None:
            nothing = starts_from[0, :0]
            kinds = {
                f"{n}.{kind}": torch.cat([nothing, *some])
                for n, one in enumerate(found)
                for kind, some in zip(KINDS, one, strict=True)
            }
            save_checkpoint(checkpoint, kinds | stacked_tensors(trained, optimizer), {**identity, "epoch": epoch + 1})
    own, rival = ([torch.cat(one[which]).cpu() for one in found] for which in (0, 1))
    return trained.decoders(), own, rival


def _rate(done: float) -> float:
    """Factor on the learning rate when the share ``done`` of the steps is over."""
    return min(1.0, (done + 1e-3) / 0.03) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _step(
    decoders: StackedDecoders,
    starts: Sequence[_Starts],
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    labels: Tensor,
    response: Ramp,
    beta: float,
    config: HoldingConfig,
    found: list[list[list[Tensor]]] | None,
) -> Tensor:
    """Explain a batch (B,N), and one step of Adam; the loss before it. ``found``, if given, takes the latents up."""
    seen, classes = response(pixels), decoders.classes
    promises = [start.promised(seen, beta) for start in starts]
    promised, chosen = (torch.stack([promise[i] for promise in promises], dim=1) for i in (0, 1))  # (B,K)
    own = F.one_hot(labels, classes).bool()  # (B,K)
    rivals = promised.masked_fill(own, math.inf).topk(min(config.rivals, classes - 1), largest=False).indices
    asked = torch.cat([labels[:, None], rivals], dim=1)  # (B,1+R): the true class first
    flat = asked.flatten()  # (E,)
    rows = rows_by_class(flat, classes)
    targets = seen.repeat_interleave(asked.shape[1], dim=0)  # (E,N)
    candidate = chosen.gather(1, asked).flatten()
    begin = torch.stack([start.latents for start in starts])[flat, candidate]
    inverse = torch.stack([start.inverses for start in starts])[flat, candidate]
    latents = _settled(decoders, rows, begin, inverse, targets, beta, config.settling)
    if found is not None:
        _keep(found, latents, flat, asked.shape[1])
    points = decode_mixed(decoders, latents, rows)
    energies = (targets - points).square().sum(1) + beta / 2 * latents.square().sum(1)
    energies, points = energies.view(asked.shape), points.view(*asked.shape, -1)
    loss = config.own * energies[:, 0].mean()
    for place in range(1, asked.shape[1]):
        gap, apart = energies[:, place] - energies[:, 0], points[:, place] - points[:, 0]
        for norm, radius, weight in config.balls:
            held = room(gap, apart, pixels, response, norm, radius)
            missing = config.temperature * F.softplus((config.margin - held) / config.temperature)
            loss = loss + weight * missing.mean()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def _keep(found: list[list[list[Tensor]]], latents: Tensor, classes: Tensor, asked: int) -> None:
    """Take up latents (E,D) of these classes (E,): of every ``asked`` the first is of the image's own class."""
    own = torch.arange(len(classes), device=classes.device) % asked == 0
    for number, kinds in enumerate(found):
        for kind, here in zip(kinds, (own, ~own), strict=True):
            kind.append(latents[here & (classes == number)])


def _settled(
    decoders: StackedDecoders, rows: Tensor, begin: Tensor, inverse: Tensor, seen: Tensor, beta: float, settling: int
) -> Tensor:
    """Latents (E,D) that explain images (E,N), from ``begin`` on: Newton steps, each kept where it is better."""

    def newton(latents: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """Energies (E,) at latents (E,D), and the step (E,D) from there; where it is the ``last``, none."""
        with torch.set_grad_enabled(not last):
            at = latents.detach().requires_grad_(not last)
            energies = (seen - decode_mixed(decoders, at, rows)).square().sum(1) + beta / 2 * at.square().sum(1)
        if last:
            return energies, latents
        (gradient,) = torch.autograd.grad(energies.sum(), at)
        return energies.detach(), matrix_vector(inverse, -gradient / 2)

    decoders.requires_grad_(False)
    best = begin
    lowest, move = newton(best)
    rate = torch.ones_like(lowest)
    for step in range(settling):
        trial = best + rate[:, None] * move
        energies, following = newton(trial, last=step + 1 == settling)
        better = energies < lowest
        best, lowest = torch.where(better[:, None], trial, best), torch.where(better, energies, lowest)
        move = torch.where(better[:, None], following, move)
        rate = torch.where(better, rate, rate * 0.3)
    decoders.requires_grad_(True)
    return best
