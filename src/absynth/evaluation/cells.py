"""The numbers of one attack, or of several together, on one model in one norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from absynth.evaluation.statistics import Interval, median, median_interval, wilson_interval

#: The paper's thresholds and MSD's for L1. An image whose distance equals the threshold counts as broken.
THRESHOLDS: Mapping[str, float] = {"l0": 12.0, "l1": 10.0, "l2": 1.5, "linf": 0.3}
UNION = ("l0", "l2", "linf")
#: A distance this much (relatively) above a threshold equals it: 0.3 is no float32.
EQUAL = 1e-6


@dataclass(frozen=True)
class Cell:
    """One cell of the table. ``distances`` by image index; ``errors`` counts the images left out, on which nothing but
    errors came of it.

    ``accuracy`` is the share of images whose distance exceeds ``threshold``. ``forward``, ``backward`` (queries) and
    ``seconds`` are means over the images an attack was spent on; ``wins`` is on how many images the attack was the
    nearest of all, ties shared.
    """

    distances: Mapping[int, float]
    threshold: float
    errors: int = 0
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0
    wins: float = 0.0
    knowledge: str = ""

    @property
    def images(self) -> int:
        """How many images have a usable row."""
        return len(self.distances)

    @property
    def median(self) -> float:
        """Median distance; infinite when fewer than half of the images are broken."""
        return median(list(self.distances.values()))

    @property
    def median_interval(self) -> Interval:
        """95 % interval of the median."""
        return median_interval(list(self.distances.values()))

    @property
    def survivors(self) -> int:
        """Images farther from their adversarial than the threshold."""
        return sum(not within(distance, self.threshold) for distance in self.distances.values())

    @property
    def accuracy(self) -> float:
        """Share of survivors, in [0,1]; NaN without images."""
        return self.survivors / self.images if self.images else math.nan

    @property
    def accuracy_interval(self) -> Interval:
        """95 % interval (Wilson) of the accuracy."""
        return wilson_interval(self.survivors, self.images)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite and undefined ones are None."""
        return {
            "median": plain(self.median),
            "accuracy": plain(self.accuracy),
            "threshold": self.threshold,
            "images": self.images,
            "median_interval": [plain(value) for value in self.median_interval],
            "accuracy_interval": list(self.accuracy_interval),
            "errors": self.errors,
            "forward_queries": self.forward,
            "backward_queries": self.backward,
            "seconds": self.seconds,
        }


def uneven(images: Iterable[int], cells: Iterable[Cell]) -> bool:
    """Whether one of the cells lacks one of the images."""
    wanted = set(images)
    return any(not wanted <= cell.distances.keys() for cell in cells)


def within(distance: float, threshold: float) -> bool:
    """Whether a distance is at most the threshold, up to the rounding of float32 images."""
    return distance <= threshold * (1 + EQUAL)


def plain(value: float) -> float | None:
    """The value, None where it is infinite or NaN."""
    return value if math.isfinite(value) else None
