"""From the name of a model and a data set to a weight file: what ``absynth train`` runs.

Every recipe holds a part of the training set out, makes every choice on it, reports the accuracy on the test split,
and writes tensors and provenance with ``weight_files.write``. Checkpoints live in a folder beside the weights until
those are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth import weight_files, zoo
from absynth.checks import usable_device
from absynth.classifiers import ABS, Calibrated
from absynth.errors import InputError, unknown_name
from absynth.prototypes import PrototypeABS
from absynth.responses import Threshold
from absynth.training.augment import Augmentation, augment
from absynth.training.calibration import calibrate, class_scales, refusal_threshold
from absynth.training.candidates import CANDIDATES, EXPLAINED, choose_all_candidates, choose_candidates, widen
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.classifiers import CNNConfig, MadryConfig, Progress, accuracy, train_cnn, train_madry
from absynth.training.contrast import STAGES, ContrastConfig
from absynth.training.explanations import explanations
from absynth.training.generative import GenerativeConfig
from absynth.training.prototypes import PrototypeConfig, train_prototypes, with_more_latents
from absynth.training.run import Run
from absynth.training.sharpening import sharpen
from absynth.training.side_by_side import train_classes
from absynth.vae import Decoder, VAEConfig

#: With as much effort, ABS is trained by the longer of its two plans.
THOROUGH = 2.0


COPIES = Augmentation(rotation=5, zoom=0.05, shear=5, shift=0.3, bicubic=True)  # of images that centers are made of
# Large moves, against learning the training images by heart.
MOVES = Augmentation(rotation=8, zoom=0.08, shear=6, shift=0.6, elastic=0.3, bicubic=True)
PROTOTYPES = PrototypeConfig(
    latent_size=16, epochs=80, batch_size=512, margin=1.0, learning_rate=1e-3, augmentation=MOVES
)


def train(
    name: str,
    dataset: str | Path = "mnist",
    *,
    out: str | Path = "weights",
    seed: int = 0,
    root: str | Path | None = None,
    effort: float = 1.0,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Train the model ``name`` of the zoo on a data set and write its weights to the folder ``out``; returns the file.

    A training that was stopped, by Ctrl-C or ``kill -9``, continues when called again with the same arguments.
    ``effort`` scales the number of steps: 1 is the shipped quality, of "abs" 3 (``plan_of_abs``). "binary-abs" and
    "prototype-abs" need the "abs" weights in ``out`` and train them first if they are missing. The first two phases of
    the generative models run in processes on the CPU, all else on ``device``. Raises InputError for unknown names, for
    checkpoints of another training, for weights of another training in ``out`` and for a device that is not there.
    """
    if name not in _RECIPES:
        raise unknown_name("model", name, _RECIPES)
    if effort <= 0:
        raise InputError(
            f"effort is {effort}; expected a positive factor on the training steps, 1 for the shipped quality"
        )
    run = Run(name, dataset, out, seed, root, progress, usable_device(device), effort)
    path = run.out / f"{name}.safetensors"
    run.check_replaces(path)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        tensors, header = _RECIPES[name](run, effort)
    weight_files.write(path, tensors, header)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return path


def plan_of_abs(effort: float, seed: int = 0) -> tuple[GenerativeConfig, list[ContrastConfig]]:
    """How ABS is trained: its autoencoders, then cycles of the contrast, each from fresh candidates.

    Below ``THOROUGH`` a short first phase, decoders on latents of every image's own, and eight rounds: a quarter of an
    hour on two cores at an effort of 1. From there on autoencoders with noise for all of their steps, and 46 rounds at
    an effort of 3, as the shipped weights were: about three times as long, as accurate, and farther from adversarials
    (LOG.md, 2026-11-28).
    """
    if effort < THOROUGH:
        generative, cycles, scale = GenerativeConfig(seed=seed), [ContrastConfig()], effort
    else:
        scale = effort / 3
        generative = GenerativeConfig(
            vae_steps=6000, decoder_steps=0, kl_first=2.0, kl_last=0.5, seed=seed,
            augmentation=Augmentation(rotation=5, zoom=0.05, shear=4, shift=0.3),
        )  # fmt: skip
        cycles = [ContrastConfig(rounds=6), ContrastConfig(rounds=16, learning_rate=1.5e-3), ContrastConfig(rounds=24)]
    steps = {name: getattr(generative, name) for name in ("shared_steps", "vae_steps", "decoder_steps")}
    generative = replace(generative, **{name: max(1, round(count * scale)) for name, count in steps.items() if count})
    return generative, [
        replace(cycle, seed=100 * seed + number, rounds=max(1, round(cycle.rounds * min(1.0, scale))))
        for number, cycle in enumerate(cycles)
    ]


def _train_abs(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, cycles = plan_of_abs(effort, run.seed)
    sizes = VAEConfig(run.train[0].shape[-1], run.train[0].shape[1], config.latent_size)
    rounds = sum(cycle.rounds for cycle in cycles) * run.classes * STAGES
    # a stage of the contrast takes about as long for a class as this many steps of its first two phases
    scale = 800
    whole = config.shared_steps + run.classes * config.steps + rounds * scale

    def progress(done: int, text: str) -> None:
        if run.progress is not None:
            run.progress(done, whole, text)

    trained = train_classes(
        *run.train, config, checkpoints=run.checkpoints, progress=lambda done, _total, text: progress(done, text)
    )
    decoders = [one.vae.decoder for one in trained]
    check_finite(run, decoders, [one.latents for one in trained])
    starts = torch.stack([choose_candidates(one.latents, CANDIDATES, run.seed) for one in trained])
    before = whole - rounds * scale  # steps of the phases and cycles that are over
    for number, cycle in enumerate(cycles):
        decoders, own, rival = sharpen(
            decoders, starts.half().float(), *run.placed(run.train), sizes, cycle,
            beta=config.beta, checkpoint=run.checkpoints / f"contrast-{number}.safetensors",
            progress=lambda done, _total, text, before=before: progress(before + done * scale, text),  # type: ignore[misc]
        )  # fmt: skip
        check_finite(run, decoders, own + rival)
        starts = choose_all_candidates(own, rival, run.seed)
        before += cycle.rounds * run.classes * STAGES * scale
    starts = widened(run, decoders, starts, sizes, config.beta, effort)
    return assemble_abs(run, decoders, starts, config, cycles)


def check_finite(run: Run, decoders: list[Decoder], latents: list[Tensor]) -> None:
    """Raise InputError where a training has left weights or latents that are no numbers."""
    weights = [value for decoder in decoders for value in decoder.state_dict().values()]
    if not all(bool(tensor.isfinite().all()) for tensor in [*weights, *latents]):
        raise InputError(
            f"the training of {run.name} diverged at effort {run.effort:g}, and its checkpoints are of no use: delete "
            f"{run.checkpoints} and train with more effort, or another seed"
        )


def widened(
    run: Run,
    decoders: list[Decoder],
    starts: Tensor,
    sizes: VAEConfig,
    beta: float,
    effort: float,
    response: nn.Module | None = None,
) -> Tensor:
    """The candidates (K,M,D), as they are stored, moved to cover the explanations of all training images."""
    images = run.train[0] if response is None else torch.cat([response(part) for part in run.train[0].split(1000)])
    count = max(1, round(EXPLAINED * min(1.0, effort)))
    return widen(decoders, starts.half().float(), images, sizes, beta=beta, seed=run.seed, count=count)  # fmt: skip


def assemble_abs(
    run: Run, decoders: list[Decoder], candidates: Tensor, config: GenerativeConfig, cycles: list[ContrastConfig]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Calibrate on the held-out images, measure on the test images, and name the tensors."""
    candidates = candidates.half().float()  # as they are stored
    model = ABS(decoders, candidates, beta=config.beta)
    tensors = {"candidates": candidates.half(), **decoder_tensors(decoders)}
    contrast = [asdict(cycle) for cycle in cycles]
    return tensors, _calibrated(run, model, config.latent_size, config.beta, training=asdict(config), contrast=contrast)


def _calibrated(run: Run, model: Calibrated, latent_size: int, beta: float, **settings: Any) -> dict[str, Any]:
    """Choose alpha, eta and the refusal of ``model`` on the held-out images; the header of its weight file."""
    images, labels = run.held_out
    logits = batched(model, images)
    calibration = calibrate(-logits, labels)
    model.alpha, model.eta = calibration.alpha, calibration.eta
    model.refusal = refusal_threshold(model.posterior(logits))
    channels, size = model.image_shape
    config = {
        "classes": run.classes, "image_size": size, "channels": channels, "latent_size": latent_size, "beta": beta,
        "alpha": model.alpha, "eta": model.eta, "refusal": model.refusal, **settings,
    }  # fmt: skip
    held_out = (logits.argmax(1) == labels).float().mean().item()
    return run.header(config, accuracy(model, *run.test), held_out_accuracy=held_out)


def decoder_tensors(decoders: list[Decoder]) -> dict[str, Tensor]:
    """The weights by the names of a weight file."""
    return {
        f"{number}.decoder.{name}": value
        for number, decoder in enumerate(decoders)
        for name, value in decoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _plain_abs(run: Run, effort: float) -> tuple[ABS, str]:
    """The ABS whose weights lie in the run's folder, trained if they do not; and their digest."""
    source = run.out / "abs.safetensors"
    if not source.exists():
        train("abs", run.dataset, out=run.out, seed=run.seed, effort=effort, progress=run.progress, device=run.device)
    run.check_same_data(source)
    plain = zoo.load(source)
    assert isinstance(plain, ABS)
    return plain, weight_files.read(source).digest


def _train_binary_abs(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    plain, source = _plain_abs(run, effort)
    images, labels = run.held_out
    response = Threshold()
    model = ABS(list(plain.decoders), plain.candidates, response=response, beta=plain.beta)
    # every class followed to the end: the factors may bring a class back that the search would have given up
    energies = torch.cat([model.analyze(chunk).energies for chunk in images.split(128)])
    model.scales = class_scales(energies, labels)
    calibration = calibrate(energies * model.scales, labels)
    model.alpha, model.eta = calibration.alpha, calibration.eta
    model.refusal = refusal_threshold(model.posterior(-energies * model.scales))
    settings = {
        "threshold": response.level, "alpha": model.alpha, "eta": model.eta, "refusal": model.refusal,
        "decoders_digest": source,
    }  # fmt: skip
    return {"scales": model.scales}, run.header(settings, accuracy(model, *run.test))


def _train_prototype_abs(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    plain, source = _plain_abs(run, effort)
    stage = shortened(PROTOTYPES, run, effort, run.seed * 100)
    channels, size = plain.image_shape
    found = _first_prototypes(run, plain, source, stage)
    decoders, found, sizes = with_more_latents(
        list(plain.decoders), found, VAEConfig(size, channels, found.shape[2]), stage.latent_size, stage.seed  # type: ignore[arg-type]
    )  # fmt: skip
    decoders, found = train_prototypes(
        decoders, found, *run.placed(run.train), sizes, stage,
        checkpoint=run.checkpoints / "prototypes.safetensors", progress=run.progress,
    )  # fmt: skip
    found = found.half().float()  # as they are stored
    model = PrototypeABS(decoders, found, beta=stage.beta)
    tensors = {f"{number}.latents": one.half() for number, one in enumerate(found)} | decoder_tensors(decoders)
    return tensors, _calibrated(
        run, model, found.shape[2], stage.beta, decoders_digest=source, training=asdict(stage)
    )  # fmt: skip


def shortened(stage: PrototypeConfig, run: Run, effort: float, seed: int) -> PrototypeConfig:
    """The stage for this run: fewer epochs with less ``effort``, no more prototypes than a class has images."""
    smallest = int(run.train[1].bincount().min())
    return replace(
        stage, epochs=max(1, round(stage.epochs * effort)), count=min(stage.count, smallest), seed=seed
    )  # fmt: skip


def _first_prototypes(run: Run, plain: ABS, source: str, config: PrototypeConfig) -> Tensor:
    """Centers (K,M,D) of the latents that explain the training images and a moved copy of each; kept in a checkpoint,
    because a resumed training must go on from the very same ones."""
    file = run.checkpoints / "centers.safetensors"
    identity = {
        "model": "prototype-abs centers", "count": config.count, "seed": run.seed, "abs": source,
        "augmentation": asdict(COPIES), "data": run.data_digest,
    }  # fmt: skip
    if (saved := load_checkpoint(file, expect=identity)) is not None:
        return saved[0]["centers"]
    generator = torch.Generator().manual_seed(run.seed)
    moved = torch.cat([augment(chunk, COPIES, generator) for chunk in run.train[0].split(1000)])
    decoders: list[Decoder] = list(plain.decoders)  # type: ignore[arg-type]
    sizes = VAEConfig(plain.image_shape[1], plain.image_shape[0], plain.candidates.shape[2])
    latents = explanations(
        decoders, plain.candidates, torch.cat([run.train[0], moved]), run.train[1].repeat(2), sizes,
        beta=plain.beta, progress=run.progress,
    )  # fmt: skip
    centers = torch.stack([choose_candidates(one, config.count, run.seed) for one in latents])
    save_checkpoint(file, {"centers": centers}, identity)
    return centers


def _train_cnn(run: Run, effort: float, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    base = CNNConfig(classes=run.classes, seed=run.seed, **options)
    config = replace(base, epochs=max(1, round(base.epochs * effort)))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    model = train_cnn(
        *run.placed(run.train),
        config,
        held_out=run.placed(run.held_out),
        checkpoint=run.checkpoints / "last.safetensors",
        progress=run.progress,
    )
    return _network(run, model.cpu(), asdict(config), torch.float32)


def _train_plain_cnn(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # longer, at a higher rate, with smaller moves than the others: 98.98 % instead of 98.88 % held out
    moves = Augmentation(rotation=8, zoom=0.08, shear=4, shift=1.0)
    return _train_cnn(run, effort, epochs=12, learning_rate=3e-3, augmentation=moves)


def _train_binary_cnn(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _train_cnn(run, effort, binarized=True)


def _train_transfer_cnn(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _train_cnn(run, effort, maps=(32, 32, 64))


def _train_madry(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    base = MadryConfig(classes=run.classes, seed=run.seed)
    config = replace(base, epochs=max(1, round(base.epochs * effort)))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    model = train_madry(
        *run.placed(run.train),
        config,
        held_out=run.placed(run.held_out),
        checkpoint=run.checkpoints / "last.safetensors",
        progress=run.progress,
    )
    # 3.3 million weights: half precision halves the file; the accuracy is that of the stored weights
    return _network(run, model.cpu(), asdict(config), torch.float16)


def _network(
    run: Run, model: nn.Module, config: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    )
    config = {**config, "channels": run.train[0].shape[1], "image_size": run.train[0].shape[-1]}
    return stored, run.header(config, accuracy(model, *run.test), held_out_accuracy=accuracy(model, *run.held_out))


def _train_nearest_neighbor(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nothing to learn: the training images themselves, all of them."""
    images, labels = torch.cat([run.train[0], run.held_out[0]]), torch.cat([run.train[1], run.held_out[1]])
    from absynth.baselines import NearestNeighbor

    clean = accuracy(NearestNeighbor(images, labels), *run.test)
    stored = {"images": (images * 255).round().to(torch.uint8), "labels": labels.to(torch.int32)}
    return stored, run.header({"classes": run.classes}, clean)


@torch.no_grad()
def batched(model: nn.Module, images: Tensor, size: int = 256) -> Tensor:
    """Logits (N,K) of images (N,C,S,S), ``size`` at a time."""
    return torch.cat([model(chunk) for chunk in images.split(size)])


_RECIPES: dict[str, Callable[[Run, float], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "abs": _train_abs,
    "binary-abs": _train_binary_abs,
    "cnn": _train_plain_cnn,
    "binary-cnn": _train_binary_cnn,
    "transfer-cnn": _train_transfer_cnn,
    "nearest-neighbor": _train_nearest_neighbor,
    "madry": _train_madry,
    "prototype-abs": _train_prototype_abs,
}


def _later(name: str, module: str) -> Callable[[Run, float], tuple[dict[str, Tensor], dict[str, Any]]]:
    """A recipe of a module that builds on this one, and so is imported when it is wanted."""

    def recipe(run: Run, effort: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        made: tuple[dict[str, Tensor], dict[str, Any]] = import_module(module).RECIPES[name](run, effort)
        return made

    return recipe


_RECIPES |= {
    name: _later(name, module)
    for module, names in {
        "absynth.training.saturating": ("saturating-abs", "saturating-prototype-abs"),
        "absynth.training.multinorm": ("l2-adversarial", "msd", "smoothed-cnn"),
    }.items()
    for name in names
}
