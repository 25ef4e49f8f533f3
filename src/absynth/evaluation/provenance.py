"""Where a ledger's numbers come from: whether its images are the data set's, and what it has no rows of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from absynth import data as datasets
from absynth.errors import InputError
from absynth.evaluation.rows import AttackRecord, CleanRow, Row
from absynth.evaluation.summary import attack_labels

#: Pixels that differ by less are the same: `digits` are enlarged by arithmetic that rounds differently elsewhere.
ROUNDING = 1e-6
SHOWN = 5  # so many stretches of images are named in a line

Images = Mapping[int, tuple[Tensor, int]]


@dataclass(frozen=True)
class Compared:
    """Stored images beside the data set's. ``problems``: by image (None: all of them) what is wrong; ``reason``: why
    they were not compared, empty where they were."""

    problems: tuple[tuple[int | None, str], ...] = ()
    reason: str = ""


class DataSets:
    """The data sets at hand, each read once. ``root`` as for ``absynth.data.load``; nothing is downloaded."""

    def __init__(self, root: str | Path | None = None) -> None:
        self._root = root
        self._read: dict[tuple[str, str], tuple[Tensor, Tensor] | None] = {}

    def compare(self, facts: Mapping[str, str], images: Images) -> Compared:
        """The stored images (C,H,W) and labels by index, compared with those of the data set that a ledger's ``facts``
        name. A folder of pictures counts only as long as it is what was evaluated."""
        name, split = facts.get("data", ""), facts.get("split", "")
        if name in datasets.NAMES and split not in datasets.SPLITS:
            return Compared(((None, f"the data set {name} has no split {split!r}"),))
        if name not in datasets.NAMES and not (name and Path(name).expanduser().is_dir()):
            return Compared(reason=f"the run was made on {name or 'data without a name'}, which is no data set at hand")
        try:
            loaded = self._load(name, split)
        except InputError as error:
            return Compared(reason=str(error))
        if loaded is None:
            return Compared(reason=f"the files of {name} are not at hand, --root names their folder")
        pictures, labels = loaded
        if name not in datasets.NAMES and datasets.digest(pictures, labels) != facts.get("data_digest"):
            return Compared(reason=f"the pictures in {name} are not those of the run")
        return Compared(_different(f"{name}, {split}", images, pictures, labels))

    def _load(self, name: str, split: str) -> tuple[Tensor, Tensor] | None:
        """None where it would have to be downloaded."""
        if (name, split) not in self._read:
            there = datasets.at_hand(name, split, self._root)
            self._read[name, split] = datasets.load(name, split, self._root) if there else None
        return self._read[name, split]


def _different(source: str, images: Images, pictures: Tensor, labels: Tensor) -> tuple[tuple[int | None, str], ...]:
    problems: list[tuple[int | None, str]] = []
    for index, (image, label) in images.items():
        if not 0 <= index < len(pictures):
            problems.append((index, f"{source} has no such image"))
        elif image.shape != pictures.shape[1:] or not bool(((image - pictures[index]).abs() <= ROUNDING).all()):
            problems.append((index, f"the stored image is not that of {source}"))
        elif label != int(labels[index]):
            problems.append((index, f"the stored label is {label}, that of {source} is {int(labels[index])}"))
    if 1 < len(problems) == len(images):
        return ((None, f"none of the {len(images)} stored images, with its label, is that of {source}"),)
    return tuple(problems)


def missing(
    model: str,
    images: Collection[int],
    clean: Iterable[CleanRow],
    rows: Iterable[Row],
    attacks: Mapping[str, AttackRecord],
) -> list[str]:
    """Lines about images without an answer or a row of one model, among the ``images`` of its ledger.

    A ledger does not say what was asked for: a run that was stopped, or went on with more attacks on fewer images,
    lacks rows as one does that somebody took them out of.
    """
    answered = {answer.image for answer in clean}
    lines = []
    if gaps := _before(answered, images):
        lines.append(f"{model}: {_listed(gaps)} no clean answer, later ones have")
    covered: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row in rows:
        covered[row.attack, row.seed].add(row.image)
    names = attack_labels(attacks.values())
    seeds = {seed for _, seed in covered}
    without: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for (attack, seed), done in covered.items():
        name = names.get(attack, attack) + (f" (seed {seed})" if len(seeds) > 1 else "")
        without[tuple(sorted(answered - done))].append(name)
    for left, lacking in without.items():
        if left:
            who = "any attack" if 1 < len(lacking) == len(covered) else ", ".join(lacking)
            lines.append(f"{model}: {_listed(left)} no row of {who}")
    return lines


def left_out(images: Collection[int], attacks: Mapping[str, AttackRecord], used: Collection[str]) -> list[str]:
    """Lines about a whole ledger: indices that its ``images`` skip, and the ``attacks`` that are not ``used``."""
    lines = []
    if skipped := _before(images, range(max(images, default=0))):
        lines.append(f"{_listed(skipped)} not been evaluated, later ones have")
    names = attack_labels(attacks.values())
    if unused := [names[attack] for attack in attacks if attack not in used]:
        lines.append(f"no image has a row of {', '.join(unused)}")
    return lines


def _before(there: Collection[int], expected: Iterable[int]) -> list[int]:
    """Which of the ``expected`` are not ``there`` although a later one is."""
    return sorted(image for image in expected if image not in there and image < max(there, default=0))


def _listed(images: Sequence[int]) -> str:
    """Sorted indices as the subject of a sentence: "image 7 has", "images 0, 3-9, 12 and 80 more have"."""
    spans: list[tuple[int, int]] = []
    for image in images:
        if spans and spans[-1][1] == image - 1:
            spans[-1] = spans[-1][0], image
        else:
            spans.append((image, image))
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans[:SHOWN])
    more = sum(last - first + 1 for first, last in spans[SHOWN:])
    return f"image{'s' * (len(images) > 1)} {shown}{f' and {more} more' * (more > 0)} {'have' if images[1:] else 'has'}"
