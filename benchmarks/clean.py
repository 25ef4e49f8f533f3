"""The figures of docs/results.md that concern clean images and images without a digit.

    python benchmarks/clean.py [--images 10000] [--noise 1000] [--released FILE] [--models abs,madry,...]

Prints one JSON document. ``--released`` names the weights that the paper's authors released, as safetensors, to
compare energies under the same analysis. Needs MNIST and the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import absynth
from absynth import data, zoo
from absynth.classifiers import Calibrated
from absynth.quickstart import without_digits
from absynth.training.classifiers import robust_accuracy


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(chunk) for chunk in images.split(256)])


def confidence(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Median of the largest probability, and for ABS and its kin the share of images it refuses."""
    logits = logits_of(model, images)
    probabilities = model.posterior(logits) if isinstance(model, Calibrated) else logits.softmax(1)
    found = {"median": probabilities.amax(1).median().item()}
    if isinstance(model, Calibrated):
        found["refused"] = model.refuses(probabilities).float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--noise", type=int, default=1000)
    parser.add_argument("--released")
    parser.add_argument(
        "--models", default="abs,binary-abs,cnn,binary-cnn,transfer-cnn,nearest-neighbor,madry,prototype-abs"
    )
    arguments = parser.parse_args()
    images, labels = (tensor[: arguments.images] for tensor in data.load("mnist", "test"))
    noise, shuffled = without_digits(images[: arguments.noise])
    result: dict[str, Any] = {"images": len(images), "noise_images": len(noise)}
    for name in arguments.models.split(","):
        model = absynth.load(name)
        started = time.perf_counter()
        logits = logits_of(model, images)
        figures = {
            "clean_accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "milliseconds_an_image": 1000 * (time.perf_counter() - started) / len(images),
            "noise": confidence(model, noise),
            "shuffled": confidence(model, shuffled),
        }
        if name == "abs":
            figures["true_class_energy"] = -784 * logits.gather(1, labels[:, None]).double().mean().item()
        if name == "madry":
            first = slice(0, 1000)
            figures["pgd_40_steps"] = robust_accuracy(model, images[first], labels[first], 0.3, 0.01, 40, seed=0)
        result[name] = figures
        print(name, figures, file=sys.stderr)
    if arguments.released:
        logits = logits_of(zoo.from_released(arguments.released), images)
        result["released"] = {
            "clean_accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "true_class_energy": -784 * logits.gather(1, labels[:, None]).double().mean().item(),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
