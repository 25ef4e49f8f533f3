"""How close certificates come to the truth, in L2: certified radius, exact distance and nearest attack side by side.

    python benchmarks/exact.py [--model prototype-abs] [--images 100]

Prints one JSON document: means of the certified radii, of the exact lower bounds, of the distances of the adversarials
that the exact search found and of those of boundary projection; the ratio of the means; and the share of images on
which certificate and nearest adversarial meet within 5 %. Misclassified images are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

import absynth
from absynth import data
from absynth.attacks.base import Goal
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.certificates import Certifier
from absynth.evaluation.judge import is_broken
from absynth.exact import exact_distance
from absynth.norms import L2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="prototype-abs")
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    images, labels = (tensor[: arguments.images] for tensor in data.load("mnist", "test"))
    model = absynth.load(arguments.model)
    right = model(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    certifier = Certifier(model.prototypes())  # type: ignore[operator]
    started = time.perf_counter()
    certified = certifier.radii(images, labels, ("l2",))["l2"]
    seconds = (time.perf_counter() - started) / len(images)
    exact = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        exact.append(exact_distance(certifier, image.flatten(), int(label)))
        print(f"{number + 1} of {len(images)}: {exact[-1].lower:.4f} to {exact[-1].upper:.4f}", file=sys.stderr)
    proposals = BoundaryProjection(norm=L2)(model, images, Goal.untargeted(labels, 1e-6), torch.arange(len(images)))
    held = is_broken(model(proposals.images), labels) & proposals.found
    attacked = torch.where(held, L2.distance(proposals.images, images), torch.inf)
    lower, upper = (torch.tensor([getattr(one, side) for one in exact]).double() for side in ("lower", "upper"))
    nearest = torch.minimum(upper, attacked.double())
    print(
        json.dumps(
            {
                "model": arguments.model,
                "images": len(images),
                "mean_certified": certified.mean().item(),
                "mean_exact_lower": lower.mean().item(),
                "mean_exact_adversarial": upper.mean().item(),
                "mean_boundary_projection": attacked.double().mean().item(),
                "certified_over_nearest": (certified.mean() / nearest.mean()).item(),
                "within_5_percent": (certified >= nearest / 1.05).double().mean().item(),
                "violations": int((nearest < certified).sum()),
                "seconds_a_certificate": seconds,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
