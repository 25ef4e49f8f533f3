"""The command ``quickstart``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from absynth.cli.options import Json, Root
from absynth.cli.output import emit, kept, note, percent, progress, table


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the page and its figures.")] = Path("quickstart"),
    images: Annotated[int, typer.Option(min=1, help="How many test images.")] = 300,
    noise: Annotated[int, typer.Option(min=1, help="How many images of noise, and of shuffled digits.")] = 100,
    root: Root = None,
    json: Json = False,
) -> None:
    """See it work: every model on digits and on noise.

    Writes a page that shows how ABS explains an image.
    """
    note("loading")
    with kept(f"what was trained is kept in {out}; the same command goes on from there"):
        from absynth.quickstart import run

        tour = run(out, images=images, noise_images=noise, root=root, bar=progress, say=note)
    if json:
        emit({**asdict(tour), "page": str(tour.page)})
        return
    rows = []
    for name, clean in tour.clean.items():
        blank, shuffled = tour.noise[name], tour.shuffled[name]
        refused = "cannot" if blank.refused is None else f"{percent(blank.refused, 0)}, {percent(shuffled.refused, 0)}"
        interval = " – ".join(percent(bound, 1) for bound in clean.interval)
        rows.append(
            (
                name,
                percent(clean.clean_accuracy, 1),
                interval,
                f"{clean.median_confidence:.2f}",
                f"{blank.confidence:.2f}",
                f"{shuffled.confidence:.2f}",
                refused,
            )
        )
    columns = ("model", "right", "95 % interval", "sure of digits", "of noise", "of shuffled digits", "refuses these")
    print(f"{tour.images} test images of {tour.dataset}; sure: median of the largest probability")
    table(columns, rows, right=columns[1:])
    print(f"how ABS explains an image: {tour.page}")
