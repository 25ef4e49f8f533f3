"""Training of the baseline networks: the CNNs by cross-entropy, madry by adversarial training.

Both run the same loop, ``_fit``: AdamW with a warm-up and a cosine decay, an exponential average of the weights, and a
checkpoint after each epoch. All randomness of an epoch comes from a generator seeded by (seed, epoch), so a training
that was stopped and resumed ends in the same weights, bit for bit, as one that was not (same machine and thread count).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.baselines import CNN, Binarized, MadryCNN
from absynth.checks import check_images
from absynth.data import digest
from absynth.errors import InputError
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)
Model = TypeVar("Model", bound=nn.Module)
HeldOut = tuple[Tensor, Tensor]  # images (N,C,S,S) and labels (N,) that are not trained on


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What every training of a network has; ``batch_size`` in images, ``learning_rate`` at its peak."""

    classes: int = 10
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 2e-3
    warm_up: float = 0.15  # share of the steps over which the learning rate rises; then it falls as a cosine to 0
    weight_decay: float = 1e-2
    averaging: float = 0.998  # decay a step of the averaged weights, which are the ones returned
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.classes < 2:
            raise InputError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, classes {self.classes}: "
                "need at least 1 epoch, 1 image a batch and 2 classes"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected a whole number from 0 to {2**32 - 1}")


@dataclass(frozen=True, kw_only=True)
class CNNConfig(FitConfig):
    """The plain CNN, its transfer variant (maps 32, 32, 64), and, with ``binarized``, the Binary CNN."""

    maps: tuple[int, int, int] = (20, 70, 256)
    binarized: bool = False


@dataclass(frozen=True, kw_only=True)
class MadryConfig(FitConfig):
    """Adversarial training under L-infinity ``epsilon`` with a few large steps (Madry et al. 2018, arXiv 1706.06083).

    ``steps`` steps of 1.25 epsilon / sqrt(steps) from a random start; in the last ``strong_epochs`` epochs,
    ``strong_steps`` of them. epsilon rises linearly from 0 over the first ``epsilon_warm_up`` epochs, with one step a
    batch, because nothing is learned from 0.3 at the start. One step throughout (Wong, Rice, Kolter 2020,
    arXiv 2001.03994) is cheaper still, but this network learns to defeat that one step alone: see LOG.md.
    """

    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    averaging: float = 0.999
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(rotation=0, zoom=0, shear=0, shift=0))
    epsilon: float = 0.3
    epsilon_warm_up: float = 1.0
    steps: int = 3
    strong_epochs: int = 1
    strong_steps: int = 7


def train_cnn(
    images: Tensor,
    labels: Tensor,
    config: CNNConfig | None = None,
    *,
    held_out: HeldOut | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> CNN | Binarized:
    """Train on images (N,C,S,S) in [0,1] and labels (N,): a CNN in eval mode, inside a Binarized if so configured.

    ``held_out`` is only measured, after each epoch, in the text given to ``progress``. ``checkpoint`` names a file that
    is written after each epoch and continued from if it exists. Raises InputError for images or labels that do not fit
    and for a checkpoint of another configuration or of other data.
    """
    config = config or CNNConfig()
    _check_data(images, labels, config)

    def build() -> CNN | Binarized:
        network = CNN(config.maps, config.classes, images.shape[1], images.shape[-1])
        return Binarized(network) if config.binarized else network

    def prepare(model: nn.Module, batch: Tensor, targets: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        return augment(batch, config.augmentation, generator)

    def measure(model: nn.Module) -> str:
        return "" if held_out is None else f"held out {accuracy(model, *held_out):.2%}"

    return _fit("cnn", build, images, labels, config, prepare, measure, checkpoint, progress)


def train_madry(
    images: Tensor,
    labels: Tensor,
    config: MadryConfig | None = None,
    *,
    held_out: HeldOut | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> MadryCNN:
    """Train adversarially on images (N,C,S,S) in [0,1] and labels (N,): a MadryCNN in eval mode.

    ``held_out``, ``checkpoint``, ``progress`` and errors as for ``train_cnn``; of the held-out part, the first 500
    images are also attacked, with 20 steps of epsilon / 15.
    """
    config = config or MadryConfig()
    _check_data(images, labels, config)

    def build() -> MadryCNN:
        return MadryCNN(config.classes, images.shape[1], images.shape[-1])

    def prepare(model: nn.Module, batch: Tensor, targets: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        batch = augment(batch, config.augmentation, generator)
        if epoch < config.epsilon_warm_up:
            epsilon, steps = config.epsilon * epoch / config.epsilon_warm_up, 1
        else:
            epsilon = config.epsilon
            steps = config.steps if epoch < config.epochs - config.strong_epochs else config.strong_steps
        step_size = 1.25 * epsilon / math.sqrt(steps)
        return perturb(model, batch, targets, epsilon, step_size, steps, generator)

    def measure(model: nn.Module) -> str:
        if held_out is None:
            return ""
        robust = robust_accuracy(
            model, held_out[0][:500], held_out[1][:500], config.epsilon, config.epsilon / 15, 20, config.seed
        )
        return f"held out {accuracy(model, *held_out):.2%}, attacked {robust:.2%}"

    return _fit("madry", build, images, labels, config, prepare, measure, checkpoint, progress)


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Projected gradient ascent of the cross-entropy under L-infinity ``epsilon`` within [0,1], from a random start.

    Images (B,C,S,S) -> perturbed images (B,C,S,S), the last iterate. Madry et al. 2018, section 2.1.
    """
    noise = torch.rand(images.shape, generator=generator).to(images.device).mul(2).sub(1) * epsilon
    current = (images + noise).clamp(0, 1)
    for _ in range(steps):
        current.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(current), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, current)
        stepped = current.detach() + step_size * gradient.sign()
        current = torch.min(torch.max(stepped, images - epsilon), images + epsilon).clamp(0, 1)
    return current.detach()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of images (N,C,S,S) that ``model`` gives their label (N,)."""
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(images)


def robust_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int, seed: int
) -> float:
    """Share of images (N,C,S,S) still given their label (N,) after ``perturb``; madry's figure is (0.3, 0.01, 40)."""
    generator = torch.Generator().manual_seed(seed)
    batches = zip(torch.split(images, 128), torch.split(labels, 128), strict=True)
    perturbed = [perturb(model, x, y, epsilon, step_size, steps, generator) for x, y in batches]
    return accuracy(model, torch.cat(perturbed), labels)


def _check_data(images: Tensor, labels: Tensor, config: FitConfig) -> None:
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise InputError(f"training images have shape {tuple(images.shape)}; expected (N,C,S,S): reshape them")
    check_images(images, channels=images.shape[1], size=images.shape[-1])
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise InputError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},)")
    if labels.min() < 0 or labels.max() >= config.classes:
        raise InputError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 to {config.classes - 1}: set classes to the number of classes"
        )


def _fit(
    name: str,
    build: Callable[[], Model],
    images: Tensor,
    labels: Tensor,
    config: FitConfig,
    prepare: Callable[[nn.Module, Tensor, Tensor, float, torch.Generator], Tensor],
    measure: Callable[[nn.Module], str],
    checkpoint: str | Path | None,
    progress: Progress | None,
) -> Model:
    """Minimize the cross-entropy on the batches that ``prepare`` makes; the model with averaged weights, in eval mode.

    ``prepare(model, images, labels, epoch, generator)`` is told how far the training is, in epochs.
    ``measure(model)`` is a text about the averaged model, shown after each epoch.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.default_generator.manual_seed(config.seed)
        model = build().to(images.device)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    batch_size = min(config.batch_size, len(images))
    steps = len(images) // batch_size  # an epoch; what is left over is another choice of images in each epoch
    total = steps * config.epochs

    identity = {"model": name, "config": asdict(config), "data_digest": digest(images, labels)}
    first_epoch, text = 0, ""
    saved = load_checkpoint(checkpoint, expect=identity) if checkpoint is not None else None
    if saved is not None:
        _restore(saved[0], model, average, optimizer)
        first_epoch, text = int(saved[1]["epochs_done"]), str(saved[1]["text"])
        if progress is not None:
            progress(first_epoch * steps, total, text)

    for epoch in range(first_epoch, config.epochs):
        # 2**31 epochs a seed: no epoch of one seed shares its generator with an epoch of another
        generator = torch.Generator().manual_seed(config.seed * 2**31 + epoch)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        model.train()
        for step in range(steps):
            done = epoch * steps + step
            chosen = order[step * batch_size : (step + 1) * batch_size]
            targets = labels[chosen]
            batch = prepare(model, images[chosen], targets, done / steps, generator)
            optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule((done + 1) / total, config.warm_up)
            loss = F.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            # Early on the average must forget the first weights: it spans at most a tenth of the steps done.
            _average(average, model, min(config.averaging, (done + 1) / (done + 10)))
            if progress is not None:
                progress(done + 1, total, text)
        text = measure(average)
        if checkpoint is not None:
            meta = {**identity, "epochs_done": epoch + 1, "text": text}
            save_checkpoint(checkpoint, _state(model, average, optimizer), meta)
        if progress is not None:
            progress((epoch + 1) * steps, total, text)
    return average


def _schedule(share: float, warm_up: float) -> float:
    """Factor on the learning rate when ``share`` of the steps are done: up linearly, then down as a cosine to 0."""
    if share < warm_up:
        return share / warm_up
    return 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, for weights and batch-norm statistics."""
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)  # batch norm's count of batches


def _state(model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that the next epoch depends on, by name."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _restore(
    tensors: dict[str, Tensor], model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the tensors of ``_state`` back."""

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    for name, parameter in model.named_parameters():
        for key, value in part(f"optimizer.{name}.").items():
            # AdamW keeps its step count on the CPU, and its moments laid out like the parameter
            place = value if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
            optimizer.state[parameter][key] = place.detach()
