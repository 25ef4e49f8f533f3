"""Every speed figure of the documentation, as ratios in one run: ``make benchmark``.

Prints the figures and writes ``benchmarks/results.json``. Ratios are taken between medians of alternating timings, so
that a machine that changes its speed changes both sides. Needs MNIST (``ABSYNTH_DATA``) and the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from yardstick import Yardstick

import absynth
from absynth import data
from absynth.classifiers import ABS


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of both, timed in turn."""
    first(), second()  # warm-up
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def matrix_rate(size: int = 1024) -> float:
    """Multiply-adds a second of a float32 matrix product: the machine's limit."""
    a = torch.rand(size, size)
    a @ a
    return size**3 / min(seconds(lambda: a @ a) for _ in range(10))


def command_line(picture: Path) -> dict[str, float]:
    """Wall-clock seconds of one classification from the shell, and of importing torch alone."""
    whole = min(
        seconds(
            lambda: subprocess.run(
                [sys.executable, "-m", "absynth", "classify", str(picture)], check=True, capture_output=True
            )
        )
        for _ in range(3)
    )
    torch_only = min(
        seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)) for _ in range(3)
    )
    return {"classify_seconds": whole, "import_torch_seconds": torch_only, "ours_seconds": whole - torch_only}


@torch.no_grad()
def measure(images_count: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(2)
    model = absynth.load("abs")
    assert isinstance(model, ABS)
    images, labels = data.load("mnist", "test")
    yardstick = Yardstick(model.decoders)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "images": images_count,
        "multiply_adds_per_second": matrix_rate(),
    }
    batch = images[:images_count]
    ours, theirs = paired(lambda: model(batch), lambda: yardstick(batch), rounds)
    result["prediction"] = compare(ours, theirs, images_count)
    full, _ = paired(lambda: model.analyze(batch), lambda: None, rounds)
    result["all_energies"] = compare(full, theirs, images_count)
    energies, reference = model.analyze(batch).energies * 784, -yardstick(batch) * 784
    true = torch.nn.functional.one_hot(labels[:images_count], 10).bool()
    result["all_energies"] |= {
        "mean_energy": energies.mean().item(), "yardstick_mean_energy": reference.mean().item(),
        "true_class": energies[true].mean().item(), "yardstick_true_class": reference[true].mean().item(),
    }  # fmt: skip
    one = images[:1]
    ours, theirs = paired(lambda: model(one), lambda: yardstick(one), max(rounds, 5))
    result["one_image"] = compare(ours, theirs, 1)

    def gradient() -> None:
        with torch.enable_grad():
            probe = batch.clone().requires_grad_(True)
            torch.autograd.backward(model(probe).sum())

    with_gradient, without = paired(gradient, lambda: model(batch), max(rounds, 3))
    result["gradient_over_prediction"] = with_gradient / without
    return result


def compare(ours: float, theirs: float, count: int) -> dict[str, float]:
    return {
        "ms_per_image": 1000 * ours / count,
        "yardstick_ms_per_image": 1000 * theirs / count,
        "ratio": theirs / ours,
    }


def peak_memory(count: int) -> float:
    """Peak memory in GiB of a process that analyzes ``count`` images."""
    program = (
        "import absynth, resource, torch\nfrom absynth import data\ntorch.set_num_threads(2)\n"
        f"model = absynth.load('abs'); images = data.load('mnist', 'test')[0][:{count}]\n"
        "for chunk in images.split(256): model.analyze(chunk)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory-images", type=int, default=1024, help="images for the peak memory; 10000 takes minutes"
    )
    arguments = parser.parse_args()
    result = measure(arguments.images, arguments.rounds)
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "digit.png"
        pixels = (data.load("mnist", "test")[0][0, 0] * 255).byte().numpy()
        Image.fromarray(pixels).save(picture)
        result["command_line"] = command_line(picture)
    result["peak_memory_gib"] = {
        str(arguments.memory_images): peak_memory(arguments.memory_images),
        "256": peak_memory(256),
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(result, indent=2) + "\n")
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
