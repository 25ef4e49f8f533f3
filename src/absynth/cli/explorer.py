"""The command ``explore``."""

from __future__ import annotations

from typing import Annotated

import typer

from absynth.cli.options import Root, Weights
from absynth.cli.output import note
from absynth.errors import InputError


def explore(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any that is free.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    weights: Weights = None,
    root: Root = None,
) -> None:
    """Open the explorer: draw a digit, see it explained, attack it.

    A page served to this machine alone. Ctrl-C ends it.
    """
    try:
        from absynth.explorer.app import create_app
        from absynth.explorer.serve import serve
        from absynth.explorer.shelf import Shelf
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "absynth":
            raise
        raise InputError(f"the explorer needs {error.name}: pip install 'absynth[explorer]'") from error
    if weights is not None and not weights.is_dir():
        raise InputError(f"no folder of weights at {weights}: give one that 'absynth train' wrote")
    try:
        serve(create_app(Shelf(weights, root)), port, browser=browser, say=note)
    except KeyboardInterrupt:
        note("the explorer has ended")
