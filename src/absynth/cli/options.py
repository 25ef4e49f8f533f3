"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Root = Annotated[
    Path | None,
    typer.Option("--root", "--data-root", help="Folder with the data set's files, looked in before ABSYNTH_DATA."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Folder with weight files, as 'absynth train' writes. Default: the shipped ones.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, or cuda on a machine with a GPU.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Compute the attacks on a Ray cluster: auto (the one that runs here, or all cores of this machine), or "
        "HOST:PORT."
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="A model's name, a weight file, or package.module:factory. Repeatable. Default: all at hand."
    ),
]
