"""From picture files to labels, probabilities, energies, and figures that explain them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth import data, weight_files, zoo
from absynth.certificates import HasPrototypes, certified_radii
from absynth.checks import logits_of
from absynth.classifiers import Calibrated
from absynth.errors import InputError
from absynth.inventory import check_writable, label_names

FORMATS = (".png", ".svg", ".pdf", ".jpg")


@dataclass(frozen=True)
class Verdict:
    """What a model says about one picture.

    ``likeliest`` is the class of the largest logit, with its ``probability``; ``label`` is the same, or None where
    nothing explains the image. ``probabilities`` and ``energies`` by class name; ``energies`` is None for a model
    without an analysis. ``certified``: radii by norm within which no image gets another label than ``likeliest``; None
    for a model without certificates. ``explanation``: the figure's file, if one was asked for.
    """

    file: str
    label: str | None
    likeliest: str
    probability: float
    probabilities: dict[str, float]
    energies: dict[str, float] | None
    explanation: str | None
    certified: dict[str, float] | None = None


def classify_pictures(
    files: Sequence[str | Path],
    model: str | Path = "abs",
    *,
    weights: str | Path | None = None,
    explain: str | Path | None = None,
    unreadable: Callable[[InputError], None] | None = None,
) -> list[Verdict]:
    """Classify picture files with the model of this name, from the folder ``weights``, or of this weight file, or made
    by ``package.module:factory``.

    ``explain`` names the figure to draw (several images: numbered, out-1.png, out-2.png). Raises InputError for unknown
    models, damaged weights, files that are no pictures, and for ``explain`` with a model that has no analysis.
    ``unreadable`` is told of files that are no pictures instead, and the others are classified.
    """
    figures = _figure_files(Path(explain), len(files)) if explain is not None else [None] * len(files)
    classifier, header = _load(model, weights)
    if explain is not None and not isinstance(classifier, Calibrated):
        raise InputError(f"model {str(model)!r} has no analysis to draw: use abs, or leave out --explain")
    size = (
        classifier.image_shape[1] if isinstance(classifier, Calibrated) else int(header["config"].get("image_size", 28))
    )
    names: tuple[str, ...] = ()
    found = []
    for file, image, figure in _readable(files, figures, size, unreadable):
        energies = None
        if isinstance(classifier, Calibrated):
            analysis = classifier.analyze(image)
            posterior = analysis.probabilities
            refused = bool(classifier.refuses(posterior))
            energies = analysis.energies[0].tolist()
            best = int(analysis.labels)
        else:
            best, posterior, refused = _answer(classifier, image)
        certified = None
        if isinstance(classifier, HasPrototypes):
            radii = certified_radii(classifier, image, torch.tensor([best]))
            certified = {norm: float(radius) for norm, radius in radii.items()}
        names = names or label_names(str(header["data"]), posterior.shape[1])
        if figure is not None:
            from absynth.figures import explanation  # here: matplotlib takes a second to import

            explanation(image[0], analysis, names, figure, refused=refused)
        found.append(
            Verdict(
                file=str(file),
                label=None if refused else names[best],
                likeliest=names[best],
                probability=float(posterior[0, best]),
                probabilities=dict(zip(names, posterior[0].tolist(), strict=True)),
                energies=None if energies is None else dict(zip(names, energies, strict=True)),
                explanation=None if figure is None else str(figure),
                certified=certified,
            )
        )
    return found


def _load(model: str | Path, weights: str | Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the header of its weight file; one that stands for it where there is none: the digits of MNIST."""
    without: dict[str, Any] = {"data": "mnist", "config": {}}
    if ":" in str(model):
        from absynth.clean import load_any  # here: nothing else needs what it imports

        return load_any(str(model)), without
    classifier = zoo.load(model, folder=weights)
    path = zoo.path_of(model, weights)
    # nearest-neighbor needs no weight file: it is made from the MNIST training images
    return classifier, weight_files.read(path).header if path.exists() else without


@torch.no_grad()
def _answer(classifier: Any, image: Tensor) -> tuple[int, Tensor, bool]:
    """The label of an image (1,C,S,S), p(class | image) (1,K), and whether the model, which has no analysis, refuses
    it."""
    logits = logits_of(classifier, image)
    own, refuses = (getattr(classifier, name, None) for name in ("posterior", "refuses"))
    posterior = logits.softmax(1) if own is None else own(logits)
    return int(logits.argmax()), posterior, refuses is not None and bool(refuses(posterior))


def _readable(
    files: Sequence[str | Path],
    figures: Sequence[Path | None],
    size: int,
    unreadable: Callable[[InputError], None] | None,
) -> list[tuple[str | Path, Tensor, Path | None]]:
    """Each file that is a picture, as (1,1,S,S), with its figure; all are read before the first is classified."""
    found: list[tuple[str | Path, Tensor, Path | None]] = []
    for file, figure in zip(files, figures, strict=True):
        try:
            found.append((file, data.load_picture(file, size)[None], figure))
        except InputError as error:
            if unreadable is None:
                raise
            unreadable(error)
    return found


def _figure_files(path: Path, count: int) -> list[Path | None]:
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot draw into {path}: give a name that ends in {', '.join(FORMATS)}")
    check_writable(path.parent)
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
