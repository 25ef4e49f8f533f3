"""The command ``classify``: what is on a picture, and why."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from absynth.cli.options import Json, Weights
from absynth.cli.output import apart, emit, note
from absynth.errors import InputError

if TYPE_CHECKING:
    from absynth.verdicts import Verdict


_NORMS = {"l0": "L0 (pixels)", "l1": "L1", "l2": "L2", "linf": "L∞"}


def classify(
    image: Annotated[list[str], typer.Argument(help="Pictures of any size and color, ink on paper or white on black.")],
    model: Annotated[str, typer.Option(help="A model's name, a weight file, or package.module:factory.")] = "abs",
    weights: Weights = None,
    explain: Annotated[
        Path | None,
        typer.Option(help="Draw how every class explains the image; several images are numbered out-1.png, out-2.png."),
    ] = None,
    json: Json = False,
) -> None:
    """Say which digit a picture shows, and why."""
    from absynth.verdicts import classify_pictures

    unreadable: list[InputError] = []
    with apart():
        found = classify_pictures(image, model, weights=weights, explain=explain, unreadable=unreadable.append)
    if json:
        problems = {"unreadable": [str(error) for error in unreadable]} if unreadable else {}
        emit({"model": model, "images": [_document(one) for one in found], **problems})
    else:
        for one in found:
            print(f"{one.file}: {_sentence(one)}")
            if one.energies is not None:
                print("  energies " + "  ".join(f"{name}: {energy:.4f}" for name, energy in one.energies.items()))
            if one.certified is not None:
                radii = ", ".join(f"{_NORMS[norm]} {at_most(radius)}" for norm, radius in one.certified.items())
                print(f"  certified: of no image nearer than {radii} is another class the likeliest")
    for one in found:
        if one.explanation is not None:
            note(f"explained in {one.explanation}")
    for error in unreadable:
        note(f"error: {error}")
    if unreadable:
        raise typer.Exit(2)


def at_most(radius: float) -> str:
    """A radius to three digits, never rounded up: a certificate must not promise more than it proves."""
    return f"{float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal_from_float(radius)):.3g}"


def _sentence(verdict: Verdict) -> str:
    sure = f"{100 * verdict.probability:.1f} %"
    if verdict.label is None:
        return f"no digit: nothing explains this image (likeliest {verdict.likeliest}, {sure})"
    return f"{verdict.label}, probability {sure}"


def _document(verdict: Verdict) -> dict[str, object]:
    return {
        "file": verdict.file,
        "label": verdict.label,
        "likeliest": verdict.likeliest,
        "probability": verdict.probability,
        "probabilities": verdict.probabilities,
        "energies": verdict.energies,
        "explanation": verdict.explanation,
        "certified": verdict.certified,
    }
