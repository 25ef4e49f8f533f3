"""Training of the baselines beside the saturating models: networks trained against attacks in L2 or in several norms at
once, and a network trained under Gaussian noise, for majority votes.

Sources: Madry et al. 2018 (arXiv 1706.06083); Maini, Wong, Kolter 2020 (arXiv 1909.04068); Cohen, Rosenfeld, Kolter
2019 (arXiv 1902.02918).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.attacks.base import draw_normal
from absynth.baselines import CNN, MadryCNN
from absynth.errors import InputError
from absynth.norms import L1, NORMS, Norm
from absynth.training import recipes
from absynth.training.augment import Augmentation, augment
from absynth.training.classifiers import CNNConfig, FitConfig, HeldOut, Progress, _check_data, _fit, accuracy
from absynth.training.run import Run

L1_PIXELS = 10  # an L1 step changes the pixels of largest gradient, not one alone (Maini et al., section 4)


@dataclass(frozen=True, kw_only=True)
class BallsConfig(FitConfig):
    """Adversarial training within ``radii``, by norm; several norms: MSD, which at every step takes of the steepest
    steps in each norm, projected onto its ball, the one of largest loss.

    A step is ``reach`` radii / ``steps`` long. The radii rise linearly from 0 over ``warm_up_epochs``.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    averaging: float = 0.999
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(rotation=0, zoom=0, shear=0, shift=0))
    radii: tuple[tuple[str, float], ...] = (("l2", 2.0),)
    steps: int = 8
    reach: float = 2.0
    warm_up_epochs: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radii or self.steps < 1 or any(name not in NORMS or radius <= 0 for name, radius in self.radii):
            raise InputError(
                f"radii {self.radii}, steps {self.steps}: give at least one step and one norm of {', '.join(NORMS)} "
                "with a positive radius"
            )


def train_in_balls(
    images: Tensor,
    labels: Tensor,
    config: BallsConfig | None = None,
    *,
    held_out: HeldOut | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> MadryCNN:
    """Train on images (N,C,S,S) in [0,1] and labels (N,): a MadryCNN in eval mode; arguments and errors as for
    ``train_madry``."""
    config = config or BallsConfig()
    _check_data(images, labels, config)
    balls = {NORMS[name]: radius for name, radius in config.radii}

    def build() -> MadryCNN:
        return MadryCNN(config.classes, images.shape[1], images.shape[-1])

    def prepare(model: nn.Module, batch: Tensor, targets: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        batch = augment(batch, config.augmentation, generator)
        share = min(1.0, (epoch + 1e-3) / config.warm_up_epochs) if config.warm_up_epochs > 0 else 1.0
        within = {norm: share * radius for norm, radius in balls.items()}
        return steepest_of(model, batch, targets, within, config.steps, config.reach)

    def measure(model: nn.Module) -> str:
        if held_out is None:
            return ""
        some, truth = held_out[0][:300], held_out[1][:300]
        attacked = steepest_of(model, some, truth, balls, 20, config.reach)
        return f"held out {accuracy(model, *held_out):.2%}, attacked {accuracy(model, attacked, truth):.2%}"

    name = "-".join(name for name, _ in config.radii)
    return _fit(f"balls-{name}", build, images, labels, config, prepare, measure, checkpoint, progress)


def steepest_of(
    model: nn.Module, images: Tensor, labels: Tensor, balls: Mapping[Norm, float], steps: int, reach: float
) -> Tensor:
    """Images (B,C,S,S) -> perturbed, each inside one of the balls: ascent of the cross-entropy, at every step and for
    every image in the norm that raises it most."""
    delta = torch.zeros_like(images)
    for _ in range(steps):
        current = (images + delta).requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(current), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, current)
        best = torch.full((len(images),), -torch.inf, device=images.device)
        following = delta
        for norm, radius in balls.items():
            stepped = norm.project(delta + _step(norm, gradient, reach * radius / steps), radius)
            stepped = (images + stepped).clamp(0, 1) - images
            if len(balls) == 1:
                following = stepped
                break
            with torch.no_grad():
                losses = F.cross_entropy(model(images + stepped), labels, reduction="none")
            better = losses > best
            best = torch.where(better, losses, best)
            following = torch.where(better.view(-1, 1, 1, 1), stepped, following)
        delta = following
    return (images + delta).detach().clamp(0, 1)


def _step(norm: Norm, gradient: Tensor, size: float) -> Tensor:
    """The steepest step of a size; in L1 spread evenly over ``L1_PIXELS`` pixels."""
    if norm != L1:
        return norm.steepest(gradient, size)
    flat = gradient.flatten(1)
    count = min(L1_PIXELS, flat.shape[1])
    top = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() * size / count).view_as(gradient)


@dataclass(frozen=True, kw_only=True)
class NoisyConfig(CNNConfig):
    """The plain CNN under Gaussian noise of deviation ``sigma``; it will vote over ``samples`` noisy images."""

    epochs: int = 12
    sigma: float = 0.5
    samples: int = 100


def train_noisy(
    images: Tensor,
    labels: Tensor,
    config: NoisyConfig | None = None,
    *,
    held_out: HeldOut | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> CNN:
    """Train on images (N,C,S,S) in [0,1] with noise, cut to [0,1], and labels (N,): a CNN in eval mode; arguments and
    errors as for ``train_cnn``."""
    config = config or NoisyConfig()
    _check_data(images, labels, config)

    def build() -> CNN:
        return CNN(config.maps, config.classes, images.shape[1], images.shape[-1])

    def prepare(model: nn.Module, batch: Tensor, targets: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        batch = augment(batch, config.augmentation, generator)
        return (batch + config.sigma * draw_normal([generator] * len(batch), batch)).clamp(0, 1)

    def measure(model: nn.Module) -> str:
        return "" if held_out is None else f"held out, without noise, {accuracy(model, *held_out):.2%}"

    return _fit("noisy", build, images, labels, config, prepare, measure, checkpoint, progress)


def _balls_recipe(radii: tuple[tuple[str, float], ...], **settings: Any) -> Callable[[Run, float], Any]:
    def recipe(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        base = BallsConfig(classes=run.classes, seed=run.seed, radii=radii, **settings)
        config = replace(base, epochs=max(1, round(base.epochs * effort)))
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        model = train_in_balls(
            *run.placed(run.train), config, held_out=run.placed(run.held_out),
            checkpoint=run.checkpoints / "last.safetensors", progress=run.progress,
        )  # fmt: skip
        return recipes._network(run, model.cpu(), asdict(config), torch.float16)

    return recipe


def train_smoothed_cnn(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network under noise; the accuracy stated is that of the votes."""
    from absynth.smoothing import Smoothed  # here: weights are made without it

    base = NoisyConfig(classes=run.classes, seed=run.seed)
    config = replace(base, epochs=max(1, round(base.epochs * effort)))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    network = train_noisy(
        *run.placed(run.train), config, held_out=run.placed(run.held_out),
        checkpoint=run.checkpoints / "last.safetensors", progress=run.progress,
    )  # fmt: skip
    settings = {**asdict(config), "channels": run.train[0].shape[1], "image_size": run.train[0].shape[-1]}
    votes = Smoothed(network, config.sigma, config.samples)
    clean, held_out = (accuracy(votes, *run.placed(split)) for split in (run.test, run.held_out))
    return network.cpu().state_dict(), run.header(settings, clean, held_out_accuracy=held_out)


RECIPES: dict[str, Callable[[Run, float], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "l2-adversarial": _balls_recipe((("l2", 2.0),), batch_size=128, epochs=8),
    "msd": _balls_recipe((("linf", 0.3), ("l2", 2.0), ("l1", 10.0)), batch_size=256, epochs=8, learning_rate=2e-3),
    "smoothed-cnn": train_smoothed_cnn,
}
