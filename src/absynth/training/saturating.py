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

from absynth import weight_files, zoo
from absynth.certificates import certified_radii
from absynth.classifiers import ABS
from absynth.norms import L0, L2, LINF
from absynth.prototypes import PrototypeABS, SaturatingPrototypeABS
from absynth.responses import Ramp
from absynth.training import recipes
from absynth.training.candidates import choose_all_candidates
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.contrast import ContrastConfig
from absynth.training.prototypes import PrototypeConfig, train_prototypes
from absynth.training.run import Run
from absynth.training.sharpening import sharpen
from absynth.vae import Decoder, VAEConfig

Trained = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and header of a weight file

RAMPS = (0.25, 0.3, 0.35)  # among these
BALLS = {L2: 1.5, LINF: 0.3, L0: 12.0}  # a model is to survive the union of the paper's three
JUDGED = 100  # held-out images a ramp is judged by
# From decoders that have been sharpened on plain images: close pairs once more, on what the ramp makes of them.
CONTRAST = ContrastConfig(rounds=4, weight=4.0)
# From prototypes trained on plain images. Behind a ramp the shortest way in L2, too, is to send a few pixels all the
# way, so the loss asks for L0 as well.
PROTOTYPES = PrototypeConfig(
    epochs=2, margin=1.0, balls=((str(L0), BALLS[L0], 1.0),), latent_rate=0.01, learning_rate=3e-4,
    augmentation=recipes.MOVES,
)  # fmt: skip


def train_saturating_prototype_abs(run: Run, effort: float) -> Trained:
    """Choose the ramp with the prototypes of prototype-abs, then train these on the responses."""
    path = run.out / "prototype-abs.safetensors"
    _train_first("prototype-abs", run, effort)
    plain = zoo.load(path)
    assert isinstance(plain, PrototypeABS)
    source = weight_files.read(path)
    decoders = zoo.decoders_of(source)
    latents = torch.stack(list(plain.latents.split(plain.class_counts)))  # (K*M,D) -> (K,M,D)
    ramp, proved = choose_ramp(run, decoders, latents, plain.beta, source.digest, effort)
    smallest = recipes.shortened(PROTOTYPES, run, effort, 100 * run.seed + 50)
    stage = replace(smallest, count=latents.shape[1], beta=plain.beta)
    channels, size = plain.image_shape
    trained, found = train_prototypes(
        decoders, latents, *run.placed(run.train), VAEConfig(size, channels, latents.shape[2]), stage, response=ramp,
        checkpoint=run.checkpoints / "prototypes.safetensors", progress=run.progress,
    )  # fmt: skip
    found = found.half().float()  # as they are stored
    model = SaturatingPrototypeABS(trained, found, response=ramp, beta=stage.beta)
    tensors = {f"{number}.latents": one.half() for number, one in enumerate(found)}
    return tensors | recipes.decoder_tensors(trained), recipes._calibrated(
        run, model, found.shape[2], stage.beta, response={"a": ramp.a}, ramps=proved,
        decoders_digest=source.digest, training=asdict(stage),
    )  # fmt: skip


def choose_ramp(
    run: Run, decoders: list[Decoder], latents: Tensor, beta: float, source: str, effort: float
) -> tuple[Ramp, dict[str, float]]:
    """The ramp behind which prototypes (K,M,D) prove most: the union of ``BALLS`` for the largest share of held-out
    images; and that share by a. ``source`` is the digest of their weights."""
    count = max(4, round(JUDGED * min(1.0, effort)))
    file = run.checkpoints / "ramps.safetensors"
    identity = {"model": "ramps", "a": list(RAMPS), "count": count, "weights": source, "data": run.data_digest}
    if (saved := load_checkpoint(file, expect=identity)) is not None:
        shares = saved[0]["shares"].tolist()
    else:
        shares = []
        for number, a in enumerate(RAMPS):
            model = SaturatingPrototypeABS(decoders, list(latents), response=Ramp(a), beta=beta)
            shares.append(proved_share(model, run.held_out[0][:count], run.held_out[1][:count]))
            if run.progress is not None:
                run.progress(number + 1, len(RAMPS), f"a = {a:g}: the union is proved for {shares[-1]:.1%} of {count}")
        save_checkpoint(file, {"shares": torch.tensor(shares, dtype=torch.float64)}, identity)
    best = max(range(len(RAMPS)), key=lambda number: shares[number])
    return Ramp(RAMPS[best]), {f"{a:g}": share for a, share in zip(RAMPS, shares, strict=True)}


def proved_share(model: SaturatingPrototypeABS, images: Tensor, labels: Tensor) -> float:
    """The share of images whose certified radii exceed those of all ``BALLS``."""
    radii = certified_radii(model, images, labels, tuple(str(norm) for norm in BALLS))
    held = torch.stack([radii[str(norm)] > radius for norm, radius in BALLS.items()])
    return float(held.all(0).double().mean())


def train_saturating_abs(run: Run, effort: float) -> Trained:
    """Take the ramp of the saturating prototypes, then go on with the contrast of the plain decoders on responses."""
    _train_first("saturating-prototype-abs", run, effort)
    judge = zoo.load(run.out / "saturating-prototype-abs.safetensors")
    assert isinstance(judge, SaturatingPrototypeABS)
    ramp = judge.response
    plain, source = recipes._plain_abs(run, effort)
    cycle = replace(CONTRAST, seed=100 * run.seed + 50, rounds=max(1, round(CONTRAST.rounds * min(1.0, effort))))
    channels, size = plain.image_shape
    sizes = VAEConfig(size, channels, plain.candidates.shape[2])
    decoders: list[Decoder] = list(plain.decoders)  # type: ignore[arg-type]
    decoders, own, rival = sharpen(
        decoders, plain.candidates, *run.placed(run.train), sizes, cycle, beta=plain.beta, response=ramp,
        checkpoint=run.checkpoints / "contrast.safetensors", progress=run.progress,
    )  # fmt: skip
    recipes.check_finite(run, decoders, own + rival)
    starts = choose_all_candidates(own, rival, run.seed)
    starts = recipes.widened(run, decoders, starts, sizes, plain.beta, effort, ramp)
    candidates = starts.half().float()  # as they are stored
    model = ABS(decoders, candidates, response=ramp, beta=plain.beta)
    tensors = {"candidates": candidates.half(), **recipes.decoder_tensors(decoders)}
    return tensors, recipes._calibrated(
        run, model, candidates.shape[2], plain.beta, response={"a": ramp.a}, decoders_digest=source,
        contrast=[asdict(cycle)],
    )  # fmt: skip


def _train_first(name: str, run: Run, effort: float) -> None:
    """Train the model ``name`` into the run's folder unless its weights are there."""
    path = run.out / f"{name}.safetensors"
    if not path.exists():
        recipes.train(
            name, run.dataset, out=run.out, seed=run.seed, effort=effort, progress=run.progress, device=run.device
        )
    run.check_same_data(path)


RECIPES: dict[str, Callable[[Run, float], Trained]] = {
    "saturating-abs": train_saturating_abs,
    "saturating-prototype-abs": train_saturating_prototype_abs,
}
