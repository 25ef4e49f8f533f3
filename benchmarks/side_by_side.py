"""Certified radius and nearest adversarial side by side, from the ledger of a run that has both.

    absynth certify --model prototype-abs --images 100 --out RUN
    absynth evaluate --model prototype-abs --suite boundary-projection,brendel-bethge --norms l0,l1,l2,linf --images 100 --out RUN
    python benchmarks/side_by_side.py RUN

Prints one JSON document: for every model and norm the number of images that have a certificate and an attack and are
classified rightly, the means and medians of both, the ratio of the means, and the share of images where they meet
within 5 %. An image that no attack broke is left out and counted.
"""  # noqa: E501

from __future__ import annotations

import json
import math
import statistics
import sys
from typing import Any

from absynth.evaluation import Ledger
from absynth.evaluation.folders import ledger_folders


def side_by_side(ledger: Ledger, model: str) -> dict[str, Any]:
    """By norm, what the certificates and the nearest attacks of ``model`` say of the same images."""
    nearest: dict[tuple[str, int], float] = {}
    for row in ledger.rows(model, images=False):
        if row.status != "misclassified":
            key = row.norm, row.image
            nearest[key] = min(nearest.get(key, math.inf), row.distance)
    found: dict[str, list[tuple[float, float]]] = {}
    unbroken: dict[str, int] = {}
    for one in ledger.certificates(model):
        distance = nearest.get((one.norm, one.image))
        if one.kind != "exact" or distance is None:
            continue
        if math.isinf(distance):
            unbroken[one.norm] = unbroken.get(one.norm, 0) + 1
        else:
            found.setdefault(one.norm, []).append((one.radius, distance))
    return {
        norm: {
            "images": len(pairs),
            "unbroken": unbroken.get(norm, 0),
            "mean_certified": statistics.fmean(radius for radius, _ in pairs),
            "mean_attacked": statistics.fmean(distance for _, distance in pairs),
            "ratio_of_means": sum(radius for radius, _ in pairs) / sum(distance for _, distance in pairs),
            "median_certified": statistics.median(radius for radius, _ in pairs),
            "median_attacked": statistics.median(distance for _, distance in pairs),
            "meet_within_5_percent": statistics.fmean(radius >= 0.95 * distance for radius, distance in pairs),
        }
        for norm, pairs in sorted(found.items())
    }


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    result: dict[str, Any] = {}
    for folder in ledger_folders(sys.argv[1:]):
        with Ledger(folder) as ledger:
            for record in ledger.models():
                result[record.name] = side_by_side(ledger, record.digest)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
