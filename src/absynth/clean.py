"""How good a classifier is on clean images: accuracy, likelihood of the true labels, confidence, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth import data, zoo
from absynth.checks import logits_of, usable_device
from absynth.errors import InputError, unknown_name
from absynth.evaluation.doubts import PROBED, answer_doubts
from absynth.evaluation.judge import device_of
from absynth.evaluation.plan import image_indices, load_model
from absynth.evaluation.statistics import median, wilson_interval

BATCH = 128
GPU_BATCH = 5000  # there a batch costs the launching of its kernels
BINS = 10
SMALLEST = torch.finfo(torch.float64).tiny  # a probability that underflows to 0 counts as this


@dataclass(frozen=True)
class Clean:
    """What ``measure`` found on ``images`` images.

    ``interval``: 95 % interval of the accuracy (Wilson). ``log_likelihood``: mean of log p(true label | image), nats.
    ``median_confidence``: of the largest probability; ``confidence_histogram``: its counts in ten bins of equal width
    from 0 to 1. ``refused``: share of images that the model says nothing explains, ``right_and_accepted``: share that
    is classified rightly and not refused; None if it cannot say so. ``doubts``: what its answers give reason to
    mistrust (``absynth.evaluation.doubts``).
    """

    images: int
    clean_accuracy: float
    interval: tuple[float, float]
    log_likelihood: float
    median_confidence: float
    confidence_histogram: tuple[int, ...]
    refused: float | None
    right_and_accepted: float | None = None
    doubts: tuple[str, ...] = ()


@torch.no_grad()
def answers(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B,C,S,S) -> labels (B,) and p(class | image) (B,K), float64: the model's ``posterior``, or the softmax.

    The label is that of the largest logit: the posterior of an image that nothing explains may be uniform. Raises
    InputError for a model that fails, or whose answers are no logits.
    """
    logits = logits_of(model, images).double()
    posterior: Any = getattr(model, "posterior", None)
    return logits.argmax(1), logits.softmax(1) if posterior is None else posterior(logits)


def measure(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Clean:
    """Measure a classifier on images (N,C,S,S) in [0,1] and labels (N,). Raises InputError where they do not fit."""
    if not len(images) or labels.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images and labels {tuple(labels.shape)}: give a label an image")
    given, parts = list[Tensor](), list[Tensor]()
    device = device_of(model)
    for chunk in images.split(BATCH if device.type == "cpu" else GPU_BATCH):
        chosen, probabilities = answers(model, chunk.to(device))
        if not given and int(labels.max()) >= probabilities.shape[1]:
            raise InputError(
                f"a label is {int(labels.max())}, the model has {probabilities.shape[1]} classes: give the data set it "
                "was made for"
            )
        given.append(chosen.cpu())
        parts.append(probabilities.cpu())
        if progress is not None:
            progress(sum(len(part) for part in parts), len(images), "")
    found = torch.cat(parts)  # (N,K)
    is_right = torch.cat(given) == labels  # (N,)
    right = int(is_right.sum())
    confidence = found.amax(1)
    refuses: Any = getattr(model, "refuses", None)
    refused: Tensor | None = None if refuses is None else refuses(found)  # (N,)
    doubts = answer_doubts(model, images[:PROBED].to(device))
    return Clean(
        images=len(images),
        clean_accuracy=right / len(images),
        interval=wilson_interval(right, len(images)),
        log_likelihood=found.gather(1, labels[:, None]).clamp_min(SMALLEST).log().mean().item(),
        median_confidence=median(confidence.tolist()),
        confidence_histogram=tuple(int(count) for count in torch.histc(confidence, BINS, 0, 1).tolist()),
        refused=None if refused is None else refused.double().mean().item(),
        right_and_accepted=None if refused is None else (is_right & ~refused).double().mean().item(),
        doubts=tuple(message for _, message in doubts),
    )


def measure_models(
    models: Sequence[str],
    dataset: str | Path = "mnist",
    images: int | None = None,
    *,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Clean]:
    """Measure models on the first ``images`` test images of a data set (None: 1,000, or all where there are fewer).

    ``models``: names of the zoo, with weights from the folder ``weights``, paths of weight files, or
    ``package.module:factory``; on ``device``. Raises InputError for anything that is not there or does not fit.
    """
    place = usable_device(device)
    classifiers = {name: load_any(name, weights=weights, root=root).to(place) for name in models}
    pictures, labels = data.load(dataset, "test", root)
    chosen = list(image_indices(min(1000, len(pictures)) if images is None else images, len(pictures)))
    found: dict[str, Clean] = {}
    for number, (name, classifier) in enumerate(classifiers.items()):

        def report(done: int, total: int, _text: str, name: str = name, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(classifiers) * total, name)

        try:
            found[name] = measure(classifier, pictures[chosen], labels[chosen], progress=report)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return found


def load_any(name: str, *, weights: str | Path | None = None, root: str | Path | None = None) -> nn.Module:
    """A model of the zoo by name or weight file, or ``factory()`` for ``package.module:factory``."""
    if ":" in name:
        return load_model(name)
    if name not in zoo.names() and not name.endswith(".safetensors"):
        listed = f"{', '.join(zoo.names())}; a weight file by its path, a model of your own as package.module:factory"
        raise unknown_name("model", name, zoo.names(), listed)
    return zoo.load(name, folder=weights, root=root)
