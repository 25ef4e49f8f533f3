"""Accuracy under all attacks of a run within balls of any radius, and within their union.

    absynth evaluate --model msd --suite boundary-projection,brendel-bethge --norms l1,l2,linf --images 100 --out RUN
    python benchmarks/balls.py RUN linf=0.3 l2=2 l1=10

Prints one JSON document: for every model the share of images that survive each ball and the union of all, with 95 %
intervals, and how many images were attacked in each of the norms.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absynth.evaluation import Ledger
from absynth.evaluation.folders import ledger_folders
from absynth.evaluation.statistics import wilson_interval
from absynth.evaluation.summary import survivors
from absynth.norms import parse


def in_balls(ledger: Ledger, model: str, balls: dict[str, float]) -> dict[str, Any]:
    """Each ball by itself, and the union, for the model of this digest."""
    rows = ledger.rows(model)
    images = {index: image for index, (image, _) in ledger.images().items()}
    parts = {f"{norm} {radius:g}": {norm: radius} for norm, radius in balls.items()} | {"union": balls}
    found = {}
    for name, part in parts.items():
        if not set(part) <= {row.norm for row in rows}:
            continue
        alive = survivors(rows, images, part)
        count = sum(alive.values())
        interval = wilson_interval(count, len(alive))
        found[name] = {"accuracy": count / len(alive), "interval": interval, "images": len(alive)}
    return found


def main() -> None:
    if not any("=" in argument for argument in sys.argv[1:]):
        raise SystemExit(__doc__)
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    pairs = [argument.split("=") for argument in sys.argv[1:] if "=" in argument]
    balls = {parse(norm).name: float(radius) for norm, radius in pairs}
    result: dict[str, Any] = {}
    for folder in ledger_folders(folders):
        with Ledger(folder) as ledger:
            for record in ledger.models():
                result[record.name] = in_balls(ledger, record.digest, balls)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
