"""What the commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Report = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)
SILENCE = 300.0  # seconds without a line that a reader of a log file puts up with


class Stopped(Exception):
    """The user pressed Ctrl-C. The message says what is kept and how to go on."""


@contextlib.contextmanager
def kept(what: str = "", where: Path | None = None) -> Iterator[None]:
    """Turn Ctrl-C within the block into ``Stopped``: ``what`` is kept in ``where``, if that is there by then."""
    try:
        yield
    except KeyboardInterrupt:
        if where is None or not where.exists():
            raise Stopped("nothing had been finished; run the same command again") from None
        raise Stopped(f"{what} kept in {where}; the same command goes on from there") from None


def note(line: str) -> None:
    """One line for the reader, on stderr."""
    print(line, file=sys.stderr, flush=True)


def emit(document: Any) -> None:
    """The one JSON document of a command, on stdout; numbers that are not finite, which JSON lacks, are null."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def apart() -> contextlib.AbstractContextManager[Any]:
    """Within it, what a user's model prints goes to stderr: stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on stdout; the columns named in ``right`` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    # What goes into a file or a pipe has no width: let no cell be folded there.
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(shown)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """A progress bar with the time left on stderr; where stderr is no terminal, a line for every tenth, and for every
    five minutes. What a model prints meanwhile goes to stderr too."""
    with apart():
        yield from _shown(title)


def _shown(title: str) -> Iterator[Report]:
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, text="")
        started = False

        def report(done: int, total: int, text: str) -> None:
            nonlocal started
            if not started:  # a resumed training begins in the middle: that is no measure of its speed
                bar.reset(task, total=total, completed=done, text=text)
                started = True
            bar.update(task, completed=done, total=total, text=text)

        yield report


def _lines(title: str) -> Report:
    shown, said = -1, 0.0

    def report(done: int, total: int, text: str) -> None:
        nonlocal shown, said
        tenth, now = 10 * done // max(total, 1), time.monotonic()
        if tenth != shown or now - said >= SILENCE:
            shown, said = tenth, now
            note(f"{title}: {100 * done // max(total, 1)} %" + (f" ({text})" if text else ""))

    return report


def percent(share: float | None, digits: int = 2) -> str:
    """0.9876 -> "98.76 %"; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"
