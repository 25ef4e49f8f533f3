"""The command ``quickstart``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from absynth.cli.evaluation import show_attacked
from absynth.cli.options import Json, Root
from absynth.cli.output import emit, kept, note, percent, progress, table


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the page and its figures.")] = Path("quickstart"),
    images: Annotated[int, typer.Option(min=1, help="How many test images.")] = 300,
    noise: Annotated[int, typer.Option(min=1, help="How many images of noise, and of shuffled digits.")] = 100,
    attacked: Annotated[
        int, typer.Option(min=0, help="How many test images to attack: ABS, Binary ABS, CNN and madry. 0: none.")
    ] = 20,
    root: Root = None,
    json: Json = False,
) -> None:
    """See it work: every model on digits and on noise.

    Attacks four of them, and writes a page that shows how ABS explains an image, and the report of the attacks.
    """
    note("loading")
    with kept("what was trained and attacked is", out):
        from absynth.quickstart import run

        tour = run(out, images=images, noise_images=noise, attacked=attacked, root=root, bar=progress, say=note)
    if json:
        under_attack = None if tour.attacked is None else tour.attacked.to_json()
        written = None if tour.report is None else str(tour.report)
        plain = {**asdict(replace(tour, attacked=None)), "page": str(tour.page), "report": written}
        emit({**plain, "attacked": under_attack})
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
    if tour.attacked is not None:
        # a run that went on from an earlier quickstart may hold more images than were asked for now
        count = max((cell.all.images for one in tour.attacked.models for cell in one.norms.values()), default=0)
        print(f"the first {count} test images under one attack a norm, every figure an upper bound: {tour.report}")
        show_attacked(tour.attacked)
    print(f"how ABS explains an image: {tour.page}")
