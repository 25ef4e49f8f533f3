"""Names that tell the models of several runs apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from absynth.evaluation.summary import ModelSummary


def named_apart(models: Sequence[ModelSummary]) -> tuple[ModelSummary, ...]:
    """The models with names that differ: behind equal ones the shortest ends of the folders' paths that do, and the
    digests of several in one folder."""
    by_name: dict[str, list[ModelSummary]] = defaultdict(list)
    for model in models:
        by_name[model.name].append(model)
    marks = {name: _marks(group) for name, group in by_name.items() if len(group) > 1}
    return tuple(
        replace(model, name=f"{model.name} ({next(marks[model.name])})") if model.name in marks else model
        for model in models
    )


def _marks(models: Sequence[ModelSummary]) -> Iterator[str]:
    """What tells models of one name apart."""
    paths = [model.folder.resolve().parts for model in models]
    different = set(paths)
    enough = (n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in different}) == len(different))
    length = next(enough)
    for model, path in zip(models, paths, strict=True):
        end, digest = Path(*path[-length:]).as_posix(), model.digest[:8]
        alone = paths.count(path) == 1
        yield end if alone else digest if len(different) == 1 else f"{end}, {digest}"
