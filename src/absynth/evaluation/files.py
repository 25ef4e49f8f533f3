"""Where a ledger's file is, whether there is one, and how it is opened."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from absynth.errors import InputError

FILE_NAME = "ledger.sqlite"


def begun(file: Path) -> bool:
    """Whether ``file`` has more in it than an SQLite file without tables, which a run leaves that ends while it makes
    its ledger (the tables come in one transaction). What it holds, if anything, is for ``Ledger`` to say."""
    if not file.is_file():
        return False
    try:
        with closing(connected(file)) as connection:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True


def connected(file: Path, write: bool = False) -> sqlite3.Connection:
    """A connection to an SQLite file, in transactions of its own.

    SQLite reads a file with a write-ahead log through files beside it. Where these cannot be made, as on a medium that
    is read only, a file whose log is empty is read as one that nobody changes.
    """
    if write:
        return sqlite3.connect(file, timeout=10.0, isolation_level=None)
    log = file.with_name(f"{file.name}-wal")
    if os.access(file.parent, os.W_OK):
        mode = "mode=rw"  # with "ro" the files beside it would stay
    elif log.is_file() and log.stat().st_size:
        mode = "mode=ro"
    else:
        mode = "mode=ro&immutable=1"
    return sqlite3.connect(f"{file.resolve().as_uri()}?{mode}", timeout=10.0, isolation_level=None, uri=True)


def nothing_in(folder: Path) -> InputError:
    """What to say about a folder without a ledger."""
    deeper = sorted({str(file.parent.parent) for file in folder.glob(f"*/*/{FILE_NAME}")})
    if deeper:
        return InputError(f"no evaluation in {folder} itself: name the run, {' or '.join(deeper[:3])}")
    return InputError(f"no evaluation in {folder}: run `absynth evaluate --suite quick --out {folder}` first")
