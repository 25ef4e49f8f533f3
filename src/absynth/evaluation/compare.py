"""Two evaluations side by side, on the images both have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absynth.errors import InputError
from absynth.evaluation.statistics import median
from absynth.evaluation.summary import ModelSummary, NormSummary, summarize, uneven, within


@dataclass(frozen=True)
class Difference:
    """One cell in two evaluations, on their ``images`` shared images.

    ``nearer`` and ``farther`` count the images whose adversarial is nearer, or farther, in the second. ``p_value`` is
    that of the two-sided sign test on these: the probability of a split this uneven if neither were nearer in truth.
    ``uneven``: some of the images lack a usable row of some attack in one of the two; of ``all`` only.
    """

    model: str
    norm: str
    attack: str
    images: int
    medians: tuple[float, float]
    accuracies: tuple[float, float]
    nearer: int
    farther: int
    uneven: bool = False

    @property
    def p_value(self) -> float:
        """Two-sided sign test; 1 where nothing differs."""
        count = self.nearer + self.farther
        tail = sum(math.comb(count, k) for k in range(min(self.nearer, self.farther) + 1)) / 2**count
        return float(min(1.0, 2 * tail))

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite ones are None."""
        medians = [value if math.isfinite(value) else None for value in self.medians]
        return {**vars(self), "medians": medians, "accuracies": list(self.accuracies), "p_value": self.p_value}


def compare(first: str | Path, second: str | Path) -> tuple[Difference, ...]:
    """What differs between two runs: per model, norm and attack (``all`` first) that both have, on shared images.

    A model is compared with itself, as its digest says, and with another of its name where it is not there; two runs of
    one model each are compared whatever the names. Raises InputError when a run cannot be read, the data differ, or
    nothing is shared.
    """
    one, two = summarize(first), summarize(second)
    if one.facts.get("data_digest") != two.facts.get("data_digest"):
        raise InputError(f"{first} and {second} are about different data: compare runs on the same split")
    found: list[Difference] = []
    for left, right in _pairs(one.models, two.models):
        name = left.name if left.name == right.name else f"{left.name} | {right.name}"
        for norm in left.norms:
            if norm in right.norms:
                found += _cells(name, left.norms[norm], right.norms[norm], norm)
    if not found:
        raise InputError(f"{first} and {second} share no model, norm and image: nothing to compare")
    return tuple(found)


def _pairs(one: tuple[ModelSummary, ...], two: tuple[ModelSummary, ...]) -> list[tuple[ModelSummary, ModelSummary]]:
    if len(one) == len(two) == 1:
        return [(one[0], two[0])]
    return [(model, other) for model in one for other in _counterparts(model, one, two)]


def _counterparts(
    model: ModelSummary, one: tuple[ModelSummary, ...], two: tuple[ModelSummary, ...]
) -> list[ModelSummary]:
    """Which of ``two`` to compare a model of ``one`` with: several where a run holds several of it."""
    same = [other for other in two if other.digest == model.digest]
    known = {other.digest for other in one}
    found = same or [o for o in two if o.stored_name == model.stored_name and o.digest not in known]
    return [other for other in found if other.name == model.name] or found


def _cells(model: str, one: NormSummary, two: NormSummary, norm: str) -> list[Difference]:
    found = []
    right = {"all": two.all, **two.attacks}
    for attack, cell in {"all": one.all, **one.attacks}.items():
        if attack not in right:
            continue
        shared = [image for image in cell.distances if image in right[attack].distances]
        if not shared:
            continue
        pairs = [(cell.distances[image], right[attack].distances[image]) for image in shared]
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        alive = [sum(not within(d, cell.threshold) for d in side) / len(pairs) for side in sides]
        found.append(
            Difference(
                model,
                norm,
                attack,
                len(pairs),
                (median(sides[0]), median(sides[1])),
                (alive[0], alive[1]),
                nearer=sum(b < a for a, b in pairs),
                farther=sum(b > a for a, b in pairs),
                uneven=attack == "all" and uneven(shared, (*one.attacks.values(), *two.attacks.values())),
            )
        )
    return found
