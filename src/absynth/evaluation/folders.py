"""Where the ledgers are: folders of runs, and several runs put into one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from absynth.errors import InputError
from absynth.evaluation.files import FILE_NAME, begun, nothing_in
from absynth.evaluation.ledger import Ledger


def merge_ledgers(sources: Sequence[str | Path], target: str | Path) -> None:
    """Put the rows of all ``sources`` (run folders, or folders of them) into the ledger of ``target``, made if missing;
    of equal keys the first.

    Raises InputError when a source holds no ledger, when they are about different data, and for a target with run
    folders of its own below it.
    """
    places = ledger_folders(sources)
    below = [place for place in _below(Path(target)) if place.resolve() != Path(target).resolve()]
    if below:
        raise InputError(f"{target} holds a run in {below[0]}: give another folder, or that one")
    with Ledger(target, write=True) as merged:
        for source in places:
            if source.resolve() == Path(target).resolve():
                continue
            with Ledger(source) as other:
                merged.merge_from(other)


def ledger_folders(folders: Iterable[str | Path]) -> list[Path]:
    """The folders with a ledger among ``folders`` and right below each, where ``absynth evaluate --out`` makes them,
    sorted there. Raises InputError where there is none."""
    found: list[Path] = []
    for folder in map(Path, folders):
        here = _below(folder)
        if not here:
            raise nothing_in(folder)
        found += [path for path in here if path not in found]
    return found


def holds_evaluation(folder: str | Path) -> bool:
    """Whether there is a ledger in ``folder`` or right below it."""
    return bool(_below(Path(folder)))


def rows_at_hand(folder: str | Path) -> int:
    """How many attack rows there are at or below a folder that need not exist. Raises InputError for a ledger that
    cannot be read."""
    count = 0
    for place in _below(Path(folder)):
        with Ledger(place) as ledger:
            count += sum(len(ledger.keys(record.digest)) for record in ledger.models())
    return count


def _below(folder: Path) -> list[Path]:
    """``folder`` itself and those in it that hold an evaluation; not deeper, where others' runs may lie."""
    files = sorted([*folder.glob(FILE_NAME), *folder.glob(f"*/{FILE_NAME}")])
    return [file.parent for file in files if begun(file)]
