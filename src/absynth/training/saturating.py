"""Training of the saturating models: ABS, and its form with finitely many prototypes, behind a ramp.

Images are moved first and put through the ramp after, as they would be if the camera had moved. Every choice, that of
the ramp above all, is made on held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from absynth import zoo
from absynth.attacks.base import Goal
from absynth.attacks.ramp_projection import RampProjection
from absynth.classifiers import ABS
from absynth.errors import InputError
from absynth.norms import L0, L2, LINF
from absynth.prototypes import SaturatingPrototypeABS
from absynth.responses import Ramp
from absynth.training import recipes
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.contrast import ContrastConfig, sharpen
from absynth.training.explanations import explanations
from absynth.training.prototypes import PrototypeConfig, train_prototypes
from absynth.vae import Decoder, VAEConfig

Trained = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and header of a weight file

RAMPS = (0.2, 0.25, 0.3)  # among these
BALLS = {L2: 1.5, LINF: 0.3, L0: 12.0}  # a model is to survive the union of the paper's three
JUDGED = 200  # held-out images a ramp is judged by
STILL = Augmentation(rotation=0, zoom=0, shear=0, shift=0)
# From decoders that have been sharpened on plain images: close pairs once more, on what the ramp makes of them.
CONTRAST = ContrastConfig(rounds=4, weight=4.0)


def train_saturating_abs(run: recipes.Run, effort: float) -> Trained:
    """Choose the ramp with the plain decoders, then go on with their contrast on the responses."""
    plain, source = recipes._plain_abs(run, effort)
    ramp, judged = choose_ramp(run, plain, source, effort)
    cycle = replace(CONTRAST, seed=100 * run.seed + 50, rounds=max(1, round(CONTRAST.rounds * min(1.0, effort))))
    channels, size = plain.image_shape
    sizes = VAEConfig(size, channels, plain.candidates.shape[2])
    decoders: list[Decoder] = list(plain.decoders)  # type: ignore[arg-type]
    decoders, own, rival = sharpen(
        decoders, plain.candidates, *run.train, sizes, cycle, beta=plain.beta, response=ramp,
        checkpoint=run.checkpoints / "contrast.safetensors", progress=run.progress,
    )  # fmt: skip
    starts = recipes.choose_all_candidates(own, rival, run.seed)
    candidates = starts.half().float()  # as they are stored
    model = ABS(decoders, candidates, response=ramp, beta=plain.beta)
    tensors = {"candidates": candidates.half(), **recipes.decoder_tensors(decoders)}
    return tensors, recipes._calibrated(
        run, model, candidates.shape[2], plain.beta, response={"a": ramp.a}, decoders_digest=source, ramps=judged,
        contrast=[asdict(cycle)],
    )  # fmt: skip


def choose_ramp(run: recipes.Run, plain: ABS, source: str, effort: float) -> tuple[Ramp, dict[str, float]]:
    """The ramp behind which the plain decoders survive most, and the share that survives, by a; ``source``
    is the digest of their weights."""
    count = max(4, round(JUDGED * min(1.0, effort)))
    file = run.checkpoints / "ramps.safetensors"
    identity = {"model": "ramps", "a": list(RAMPS), "count": count, "abs": source, "data": run.data_digest}
    if (saved := load_checkpoint(file, expect=identity)) is not None:
        shares = saved[0]["shares"].tolist()
    else:
        shares = []
        for number, a in enumerate(RAMPS):
            model = ABS(list(plain.decoders), plain.candidates, response=Ramp(a), beta=plain.beta)
            shares.append(survivors(model, run.held_out[0][:count], run.held_out[1][:count]))
            if run.progress is not None:
                run.progress(number + 1, len(RAMPS), f"a = {a:g}: {shares[-1]:.1%} of {count} survive")
        save_checkpoint(file, {"shares": torch.tensor(shares, dtype=torch.float64)}, identity)
    best = max(range(len(RAMPS)), key=lambda number: shares[number])
    return Ramp(RAMPS[best]), {f"{a:g}": share for a, share in zip(RAMPS, shares, strict=True)}


def survivors(model: ABS | SaturatingPrototypeABS, images: Tensor, labels: Tensor, steps: int = 12) -> float:
    """The share of images that a short attack that knows the ramp breaks in none of the ``BALLS``."""
    alive = torch.ones(len(images), dtype=torch.bool)
    for norm, radius in BALLS.items():
        attack = RampProjection(norm, steps=steps, targets=1, bisections=6)
        rows = alive.nonzero().squeeze(1)
        if not len(rows):
            break
        result = attack(model, images[rows], Goal.untargeted(labels[rows]), rows)
        alive[rows] = ~(result.found & (norm.distance(result.images, images[rows]) <= radius))
    return float(alive.double().mean())


def train_saturating_prototype_abs(run: recipes.Run, effort: float) -> Trained:
    """Prototypes of the responses, from the decoders and with the ramp of the saturating ABS in the same folder."""
    source = run.out / "saturating-abs.safetensors"
    if not source.exists():
        recipes.train("saturating-abs", run.dataset, out=run.out, seed=run.seed, effort=effort, progress=run.progress)
    base = zoo.load(source)
    assert isinstance(base, ABS)
    if not isinstance(base.response, Ramp):
        raise InputError(f"{source} has no ramp: train it again with 'absynth train saturating-abs --out {run.out}'")
    digest = zoo.read(source).digest
    smallest = int(run.train[1].bincount().min())
    stages = [
        replace(
            stage, epochs=max(1, round(stage.epochs * effort)), count=min(stage.count, smallest),
            seed=100 * run.seed + 50 + number,
        )
        for number, stage in enumerate(recipes.PROTOTYPES)
    ]  # fmt: skip
    found = _centers(run, base, base.response, digest, stages[0])
    channels, size = base.image_shape
    sizes = VAEConfig(size, channels, found.shape[2])
    decoders: list[Decoder] = list(base.decoders)  # type: ignore[arg-type]
    for number, stage in enumerate(stages):
        # an epoch on each of ``epochs`` moved copies, put through the ramp after they have been moved
        images = torch.cat([base.response(moved) for moved in _moved(run, stage, stage.epochs)])
        decoders, found = train_prototypes(
            decoders, found, images, run.train[1].repeat(stage.epochs), sizes,
            replace(stage, epochs=1, augmentation=STILL),
            checkpoint=run.checkpoints / f"prototypes-{number}.safetensors", progress=run.progress,
        )  # fmt: skip
        found = found.half().float()  # as they are stored
    model = SaturatingPrototypeABS(decoders, found, response=base.response, beta=stages[0].beta)
    tensors = {f"{number}.latents": one.half() for number, one in enumerate(found)} | recipes.decoder_tensors(decoders)
    return tensors, recipes._calibrated(
        run, model, found.shape[2], stages[0].beta, response={"a": base.response.a}, decoders_digest=digest,
        training=[asdict(stage) for stage in stages],
    )  # fmt: skip


def _moved(run: recipes.Run, stage: PrototypeConfig, copies: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(stage.seed)
    return [
        torch.cat([augment(chunk, stage.augmentation, generator) for chunk in run.train[0].split(1000)])
        for _ in range(copies)
    ]


def _centers(run: recipes.Run, base: ABS, ramp: Ramp, source: str, stage: PrototypeConfig) -> Tensor:
    """Centers (K,M,D) of the latents that explain the responses of the training images and of a moved copy of each."""
    file = run.checkpoints / "centers.safetensors"
    identity = {
        "model": "saturating-prototype-abs centers", "config": asdict(stage), "abs": source, "data": run.data_digest
    }  # fmt: skip
    if (saved := load_checkpoint(file, expect=identity)) is not None:
        return saved[0]["centers"]
    images = torch.cat([ramp(run.train[0]), ramp(_moved(run, stage, 1)[0])])
    channels, size = base.image_shape
    latents = explanations(
        list(base.decoders), base.candidates, images, run.train[1].repeat(2),  # type: ignore[arg-type]
        VAEConfig(size, channels, base.candidates.shape[2]), beta=base.beta, progress=run.progress,
    )  # fmt: skip
    centers = torch.stack([recipes.choose_candidates(one, stage.count, run.seed) for one in latents])
    save_checkpoint(file, {"centers": centers}, identity)
    return centers


RECIPES: dict[str, Callable[[recipes.Run, float], Trained]] = {
    "saturating-abs": train_saturating_abs,
    "saturating-prototype-abs": train_saturating_prototype_abs,
}
