"""ABS on a GPU: predictions, all energies and gradients a second, and whether the answers are those of the processor.

python benchmarks/gpu.py [--device cuda] [--images 10000] [--batch 1024 --batch 5000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import absynth
from absynth import data
from absynth.checks import usable_device


def rate(work: Callable[[Tensor], object], parts: tuple[Tensor, ...], device: torch.device) -> float:
    """Images a second over all parts, after the first has been worked on once."""
    work(parts[0])
    _wait(device)
    before = time.perf_counter()
    for part in parts:
        work(part)
    _wait(device)
    return sum(len(part) for part in parts) / (time.perf_counter() - before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--images", type=int, default=10_000)
    arguments.add_argument("--batch", type=int, action="append")
    chosen = arguments.parse_args()
    device = usable_device(chosen.device)
    images, labels = (part[: chosen.images] for part in data.load("mnist", "test"))
    model = absynth.load("abs", device=device)
    placed = images.to(device)

    def gradients(part: Tensor) -> None:
        asked = part.clone().requires_grad_(True)
        model(asked).sum().backward()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    print(f"{name}, PyTorch {torch.__version__}, {len(images)} images")
    for size in chosen.batch or [1024, 5000]:
        parts = placed.split(size)
        found = {
            "predictions": rate(model, parts, device),
            "analyses": rate(model.analyze, parts, device),  # type: ignore[operator, arg-type]
            "gradients": rate(gradients, parts, device),
        }
        print(f"batches of {size}: " + ", ".join(f"{value:,.0f} {what} a second" for what, value in found.items()))
    some = min(500, len(images))
    here = absynth.load("abs")(images[:some])
    there = model(placed[:some]).cpu()
    same = int((here.argmax(1) == there.argmax(1)).sum())
    apart = float((here.amax(1) - there.amax(1)).abs().max())
    print(f"first {some}: {same} labels as on the processor, best logits within {apart:.1e}")
    right = int((torch.cat([model(part).argmax(1) for part in placed.split(5000)]).cpu() == labels).sum())
    print(f"{right} of {len(images)} right")


if __name__ == "__main__":
    main()
