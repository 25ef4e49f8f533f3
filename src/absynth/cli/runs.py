"""The commands about finished runs: ``report``, ``verify``, ``merge``, ``compare``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from absynth.cli.options import Json, Root, Weights
from absynth.cli.output import emit, note, percent, progress, table

Runs = Annotated[list[Path], typer.Argument(help="Run folders, as 'absynth evaluate --out' makes them.")]


def report(
    run: Runs,
    out: Annotated[Path | None, typer.Option(help="Folder for the report. Default: the first run.")] = None,
    json: Json = False,
) -> None:
    """Write the report of a run: HTML, CSV and Markdown."""
    from absynth.evaluation import report as write

    files = write(*run, out=out)
    if json:
        emit({key: str(path) for key, path in asdict(files).items()})
    else:
        print(f"{files.html}\n{files.csv}\n{files.markdown}")


def verify(run: Runs, weights: Weights = None, root: Root = None, json: Json = False) -> None:
    """Recompute every row of a run. Exit code 1 if one fails."""
    from absynth.reproduction import verify_runs

    with progress("verifying") as tell:
        found = verify_runs(*run, weights=weights, root=root, progress=lambda done, total: tell(done, total, ""))
    if json:
        emit(found.to_json())
    else:
        for failure in found.failures:
            image = "all images" if failure.image is None else f"image {failure.image}"
            subject = [part for part in (failure.model, image, failure.attack or failure.norm) if part]
            print(f"{', '.join(subject)}: {failure.reason}")
        for reason in found.unchecked:
            print(f"not checked: {reason}")
        for notice in found.notices:
            print(f"note: {notice}")
        if found.found_nothing:
            rows = "row" if found.found_nothing == 1 else "rows"
            print(f"{found.found_nothing} {rows} found nothing: an attack that fails leaves nothing to recompute")
        result = "everything holds" if found.holds else f"{len(found.failures)} do not hold"
        errors = f" ({found.errors} of them errors, with nothing to recompute)" if found.errors else ""
        counts = f"{found.rows} rows{errors}, {found.clean} clean answers, {found.certificates} certificates"
        print(f"{counts}: {result}" + (f", {len(found.unchecked)} models not checked" if found.unchecked else ""))
    if not found.holds:
        raise typer.Exit(1)


def merge(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same data.")],
    out: Annotated[Path, typer.Option(help="Folder for both together.")],
    json: Json = False,
) -> None:
    """Put the rows of two runs into one."""
    from absynth.evaluation import merge as run

    summary = run(first, second, out)
    if json:
        emit(summary.to_json())
    else:
        note(f"merged {len(summary.models)} models")
        print(out)


def compare(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same data.")],
    json: Json = False,
) -> None:
    """Compare two runs on the images they share."""
    from absynth.evaluation import compare as run
    from absynth.evaluation.statistics import short

    found = run(first, second)
    if json:
        emit({"differences": [one.to_json() for one in found]})
        return
    rows = [
        (
            one.model,
            one.norm,
            one.attack + " *" * one.uneven,
            str(one.images),
            " → ".join(short(value) for value in one.medians),
            " → ".join(percent(share, 1) for share in one.accuracies),
            f"{one.nearer} / {one.farther}",
            f"{one.p_value:.2g}",
        )
        for one in found
    ]
    columns = ("model", "norm", "attack", "images", "median", "accuracy", "nearer / farther", "p")
    table(columns, rows, right=columns[3:])
    if any(one.uneven for one in found):
        note("* some of these images lack a row of some attack in one of the runs")
