"""The commands that measure models: ``evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from absynth.cli.options import Json, Root, Weights
from absynth.cli.output import emit, note, percent, progress, table
from absynth.errors import InputError


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model's name, a weight file, or package.module:factory. Repeatable. Default: all."),
    ] = None,
    attacks: Annotated[str, typer.Option(help="none: measure on clean images.")] = "none",
    images: Annotated[int, typer.Option(help="How many of the first test images.")] = 1000,
    data: Annotated[str, typer.Option(help="Data set, or a folder of pictures.")] = "mnist",
    weights: Weights = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Measure models: accuracy, likelihood, confidence."""
    from absynth.clean import measure_models

    if attacks != "none":
        raise InputError(f"unknown attacks {attacks!r}: known: none")
    with progress("evaluating") as report:
        found = measure_models(
            model or _at_hand(weights, root), data, images, weights=weights, root=root, progress=report
        )
    if json:
        emit({"data": data, "images": images, "models": {name: asdict(one) for name, one in found.items()}})
        return
    rows = [
        (
            name,
            percent(one.clean_accuracy),
            " – ".join(percent(bound) for bound in one.interval),
            f"{one.log_likelihood:.4f}",
            f"{one.median_confidence:.3f}",
            percent(one.refused),
            _sparkline(one.confidence_histogram),
        )
        for name, one in found.items()
    ]
    columns = ("model", "clean", "95 % interval", "log p(label)", "median confidence", "refused", "confidence 0 … 1")
    table(columns, rows, right=columns[1:-1])


def _at_hand(weights: Path | None, root: Path | None) -> list[str]:
    """All models that can be loaded; the others are named on stderr."""
    from absynth import zoo
    from absynth.inventory import describe_model

    described = [describe_model(name, folder=weights, root=root) for name in zoo.names()]
    for one in described:
        if one.problem:
            note(f"left out {one.name}: {one.problem}")
    found = [one.name for one in described if one.problem is None]
    if not found:
        raise InputError("no model has weights here: run 'absynth train abs --out weights' and add --weights weights")
    return found


def _sparkline(counts: tuple[int, ...]) -> str:
    """A histogram as a word of bars; every bin that is not empty shows."""
    highest = max(*counts, 1)
    return "".join(" " if not count else "▁▂▃▄▅▆▇█"[7 * count // highest] for count in counts)
