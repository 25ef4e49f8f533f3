"""Where the ledgers are: folders of runs, and several runs put into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absynth.errors import InputError
from absynth.evaluation.files import FILE_NAME, begun, nothing_in
from absynth.evaluation.ledger import Ledger, different_fact
from absynth.evaluation.rows import AttackRecord


def merge_ledgers(sources: Sequence[str | Path], target: str | Path) -> None:
    """Put the rows of all ``sources`` (run folders, or folders of them) into the ledger of ``target``, made if missing;
    of equal keys the first. What a target that is none of the sources holds already comes before them.

    Raises InputError when a source holds no ledger, when two of them are about different data or mean different attacks
    by one repr, and for a target with run folders of its own below it; then nothing is written.
    """
    places = ledger_folders(sources)
    held = _below(Path(target))
    is_target = [place.resolve() == Path(target).resolve() for place in places]
    below = [place for place in held if place.resolve() != Path(target).resolve()]
    if below:
        raise InputError(f"{target} holds a run in {below[0]}: give another folder, or that one")
    _check_alike(places if any(is_target) else [*held, *places])
    before = places[: is_target.index(True)] if any(is_target) else []
    after = [place for place, same in zip(places, is_target, strict=True) if not same and place not in before]
    with Ledger(target, write=True) as merged:  # whose own rows stay there, so that nothing is lost halfway
        for source in (*reversed(before), *after):
            with Ledger(source) as other:
                merged.merge_from(other, first=source in before)


def _check_alike(places: Sequence[Path]) -> None:
    """Raises InputError for ledgers that cannot be one."""
    facts: Mapping[str, str] = {}
    attacks: dict[str, tuple[AttackRecord, Path]] = {}
    for place in places:
        with Ledger(place) as ledger:
            here = ledger.facts()
            facts = facts or here
            if key := different_fact(facts, here):
                raise InputError(
                    f"{places[0]} and {place} are about different data ({key.replace('_', ' ')} {facts[key]!r} and "
                    f"{here[key]!r}): merge runs on the same data"
                )
            for record in ledger.attacks().values():
                known, where = attacks.setdefault(record.attack, (record, place))
                if (known.name, known.norm) != (record.name, record.norm):
                    raise InputError(
                        f"{record.attack[:80]} is {known.name} in {known.norm} in {where}, and {record.name} in "
                        f"{record.norm} in {place}: rows of the two cannot be told apart in one ledger"
                    )


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


def holds_model(folder: str | Path, digest: str) -> bool:
    """Whether there is a ledger in ``folder`` itself that has the model of this digest. Raises InputError for one that
    cannot be read."""
    if not begun(Path(folder) / FILE_NAME):
        return False
    with Ledger(folder) as ledger:
        return any(record.digest == digest for record in ledger.models())


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
