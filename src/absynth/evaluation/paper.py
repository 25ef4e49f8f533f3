"""The published figures, for comparison: Schott, Rauber, Bethge, Brendel 2019, arXiv 1805.09190.

The numbers are in ``data/paper.json`` with their source and how sure they are. Models go by their names in the zoo,
attacks by their names here ("deepfool-ge-l2"). Accuracies are shares, distances in the units of the norm for pixels in
[0,1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

#: The paper's order and names.
MODELS: Mapping[str, str] = {
    "cnn": "CNN",
    "binary-cnn": "Binary CNN",
    "nearest-neighbor": "Nearest neighbor",
    "madry": "Madry et al.",
    "binary-abs": "Binary ABS",
    "abs": "ABS",
}
#: These, and the models that the paper does not have.
NAMES: Mapping[str, str] = {
    **MODELS,
    "prototype-abs": "Prototype ABS",
    "saturating-abs": "Saturating ABS",
    "saturating-prototype-abs": "Saturating prototype ABS",
    "l2-adversarial": "L2 adversarial",
    "msd": "MSD",
    "smoothed-cnn": "Smoothed CNN",
    "transfer-cnn": "Transfer CNN",
}
#: Of the images and labels of MNIST's test split, which the paper's figures are about.
DATA_DIGEST = "a429566e135d22d54e91a259f924a0d512abe8696339fbde0fed9674c177d6c7"


@dataclass(frozen=True)
class Published:
    """A published cell: ``median`` distance, infinite where fewer than half were broken, and ``accuracy`` at the
    threshold."""

    median: float
    accuracy: float


def is_papers_data(facts: Mapping[str, str]) -> bool:
    """Whether a ledger with these facts is about the images that the paper's figures are about."""
    return facts.get("data_digest") == DATA_DIGEST or (facts.get("data"), facts.get("split")) == ("mnist", "test")


def published(model: str, norm: str, attack: str | None = None) -> Published | None:
    """The paper's cell of an attack, of all attacks together without ``attack``; None where it has none.

    ``attack`` in the paper's words: the attacks that came later have no published cell.
    """
    table = _paper()["all" if attack is None else "attacks"].get(norm, {})
    cell = (table if attack is None else table.get(attack, {})).get(model)
    if cell is None:
        return None
    return Published(math.inf if cell["median"] is None else cell["median"], cell["accuracy"])


def published_clean(model: str) -> float | None:
    """The paper's clean accuracy, approximate."""
    value: float | None = _paper()["clean"].get(model)
    return value


def published_curve(model: str, norm: str) -> tuple[list[float], list[float]] | None:
    """Distances and accuracies of the paper's accuracy-distance curve, minimum over all attacks; None where it has
    none."""
    curve = _paper()["curves"].get(norm, {}).get(model)
    return None if curve is None else (curve["distance"], curve["accuracy"])


def paper_attacks(norm: str) -> tuple[str, ...]:
    """The attacks of the paper's table, in its order."""
    return tuple(_paper()["attacks"].get(norm, {}))


def source() -> str:
    """Where the figures were published."""
    return str(_paper()["source"])


@cache
def _paper() -> dict[str, Any]:
    text = resources.files("absynth.evaluation").joinpath("data/paper.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
