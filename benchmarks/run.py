"""Every speed figure of the documentation, as ratios in one run: ``make benchmark``.

Prints a table, writes ``benchmarks/results.json`` and draws ``docs/performance.png``. Both sides of a ratio are timed
in turn and their medians compared, so that a machine that changes its speed changes both; every round of predictions
sees other images. The yardstick is slow, and its cost is proportional to the images: it is timed on fewer of them,
``--yardstick-images`` at once. Needs MNIST (``ABSYNTH_DATA``) and the shipped weights; some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from growth import growth
from yardstick import Yardstick

import absynth
from absynth import data
from absynth.attacks.base import Classifier, Goal
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.classifiers import ABS
from absynth.norms import L2

BATCH = 256
LIMITS = {  # line of the table: what it must show
    "prediction": "at least 20, aim 40",
    "all_energies": "at least 8, mean energy not above the yardstick's",
    "one_image": "at least 20",
    "classify": "under 5 s",
    "ours": "under 2 s",
    "gradient": "at most 1.3",
    "attack": "under 0.5 s",
    "attack_ratio": "at least 10",
    "memory": "under 1.5 GiB, whatever the number",
}


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(first: Callable[[int], Any], second: Callable[[int], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of both, timed in turn; the calls are told the round. Both have been called before."""
    pairs = [(seconds(lambda n=n: first(n)), seconds(lambda n=n: second(n))) for n in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def matrix_rate(size: int = 1024) -> float:
    """Multiply-adds a second of a float32 matrix product: the machine's limit."""
    a = torch.rand(size, size)
    a @ a
    return size**3 / min(seconds(lambda: a @ a) for _ in range(10))


def compare(ours: float, count: int, theirs: float, their_count: int) -> dict[str, float]:
    """Milliseconds an image of both sides, and how many times faster ours is."""
    mine, yardstick = 1000 * ours / count, 1000 * theirs / their_count
    return {"ms_per_image": mine, "yardstick_ms_per_image": yardstick, "ratio": yardstick / mine}


def measure(model: ABS, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predictions, full energies, one image and the gradient, against the yardstick and each other."""
    few, rounds = arguments.yardstick_images, arguments.rounds
    pixels = images[0].numel()
    note("the yardstick decodes its candidates")
    yardstick = Yardstick(model.decoders)
    result: dict[str, Any] = {}

    def batch(number: int) -> Tensor:
        """Other images every round; the test set is long enough for any sensible number of rounds."""
        rows = torch.arange(BATCH) + number * BATCH
        return images[rows % len(images)]

    def all_energies(number: int) -> Tensor:
        return model.analyze(batch(number)).energies

    note("predictions, all energies")
    model(batch(rounds)), yardstick(images[:1])  # warm-up
    ours, theirs = in_turn(lambda n: model(batch(n)), lambda n: yardstick(batch(n)[:few]), rounds)
    result["prediction"] = compare(ours, BATCH, theirs, few)
    full, theirs = in_turn(all_energies, lambda n: yardstick(batch(n)[:few]), rounds)
    result["all_energies"] = compare(full, BATCH, theirs, few)
    same = images[:few]
    energies, reference = pixels * model.analyze(same).energies, -pixels * yardstick(same)
    true = labels[:few, None]
    result["all_energies"] |= {
        "mean_energy": energies.mean().item(), "yardstick_mean_energy": reference.mean().item(),
        "true_class": energies.gather(1, true).mean().item(),
        "yardstick_true_class": reference.gather(1, true).mean().item(),
    }  # fmt: skip
    note("one image, the gradient")
    ours, theirs = in_turn(lambda n: model(images[n : n + 1]), lambda n: yardstick(images[n : n + 1]), max(rounds, 7))
    result["one_image"] = compare(ours, 1, theirs, 1)

    def gradient(number: int) -> None:
        probe = batch(number).requires_grad_(True)
        torch.autograd.backward(model(probe).sum())

    with_gradient, without = in_turn(gradient, lambda n: model(batch(n)), max(rounds, 5))
    result["gradient_over_prediction"] = with_gradient / without
    return result


def attack(model: ABS, images: Tensor, labels: Tensor, few: int) -> dict[str, float]:
    """The strongest L2 attack: seconds an image of 32 of ours and of ``few`` of the yardstick's, and its distances."""
    ours, yardstick = BoundaryProjection(L2), Yardstick(model.decoders)
    found: dict[str, Tensor] = {}

    def run(classifier: Classifier, name: str, count: int) -> None:
        result = ours(classifier, images[:count], Goal.untargeted(labels[:count]), torch.arange(count))
        found[name] = torch.where(result.found, L2.distance(result.images, images[:count]), torch.inf)

    count = min(32, len(images))
    timed = compare(
        seconds(lambda: run(model, "ours", count)), count, seconds(lambda: run(yardstick, "theirs", few)), few
    )
    return timed | {
        "images": count, "yardstick_images": few,
        "mean_distance": found["ours"][:few].mean().item(), "yardstick_mean_distance": found["theirs"].mean().item(),
    }  # fmt: skip


def run_python(program: list[str]) -> str:
    """What a fresh interpreter prints, this checkout's package first on its path."""
    source = str(Path(absynth.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(program)} failed:\n{done.stderr}")
    return done.stdout


def command_line(picture: Tensor, rounds: int) -> dict[str, float]:
    """Wall-clock seconds of one classification from the shell, and of importing torch alone."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digit.png"
        Image.fromarray((picture * 255).byte().numpy()).save(path)
        whole, bare = in_turn(
            lambda _: run_python(["-m", "absynth", "classify", str(path)]),
            lambda _: run_python(["-c", "import torch"]),
            rounds,
        )
    return {"classify_seconds": whole, "import_torch_seconds": bare, "ours_seconds": whole - bare}


def labels_by_search(model: ABS, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The labels of the default search beside those of exact Levenberg-Marquardt steps, which cost three times more."""
    reference = replace(model.schedule, method="levenberg-marquardt", steps=8, tolerance=1e-5, slack=(2.0, 1.7, 1.5))
    default, found = model.schedule, {}
    for name, schedule in (("default", default), ("reference", reference)):
        model.schedule = schedule
        found[name] = model(images).argmax(1)
    model.schedule = default
    return {
        "images": len(images),
        **{f"accuracy_{name}": (one == labels).double().mean().item() for name, one in found.items()},
        "labels_that_differ": int((found["default"] != found["reference"]).sum()),
    }


def peak_memory(count: int, call: str) -> tuple[float, float]:
    """Peak memory in GiB, and the accuracy, of a process that does ``call`` with ``count`` images."""
    memory, accuracy = run_python(
        [
            "-c",
            "import absynth, resource, torch\nfrom absynth import data\n"
            "model = absynth.load('abs'); images, labels = data.load('mnist', 'test')\n"
            f"images, labels = images[:{count}], labels[:{count}]\nfound = {call}\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
            "print((found == labels).double().mean().item())",
        ]
    ).split()
    return float(memory), float(accuracy)


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, the value, what it must show."""
    full, cli = result["all_energies"], result["command_line"]
    rows = [
        (f"predictions, batches of {BATCH}, times faster", f"{result['prediction']['ratio']:.1f}", "prediction"),
        ("all energies, times faster", f"{full['ratio']:.1f}", "all_energies"),
        ("  mean energy (yardstick)", f"{full['mean_energy']:.2f} ({full['yardstick_mean_energy']:.2f})", ""),
        ("one image, times faster", f"{result['one_image']['ratio']:.1f}", "one_image"),
        ("classify from the shell, s", f"{cli['classify_seconds']:.2f}", "classify"),
        ("  beyond importing torch, s", f"{cli['ours_seconds']:.2f}", "ours"),
        ("gradient over prediction", f"{result['gradient_over_prediction']:.2f}", "gradient"),
    ]
    if "attack" in result:
        one = result["attack"]
        rows.append((f"L2 attack on {one['images']} images, s an image", f"{one['ms_per_image'] / 1000:.2f}", "attack"))
        rows.append(("  times faster than on the yardstick", f"{one['ratio']:.1f}", "attack_ratio"))
        distances = f"{one['mean_distance']:.3f} ({one['yardstick_mean_distance']:.3f})"
        rows.append((f"  mean distance of {one['yardstick_images']} (yardstick)", distances, ""))
    rows += [(f"peak memory, {name}, GiB", f"{gib:.2f}", "memory") for name, gib in result["peak_memory_gib"].items()]
    rows += [(f"accuracy, {name}", f"{100 * share:.2f} %", "") for name, share in result["accuracy"].items()]
    if "labels" in result:
        one = result["labels"]
        rows.append((f"labels of {one['images']} that exact steps change", str(one["labels_that_differ"]), ""))
        shares = f"{100 * one['accuracy_default']:.2f} % ({100 * one['accuracy_reference']:.2f} %)"
        rows.append(("  accuracy (exact steps)", shares, "not lower"))
    return [(name, value, LIMITS.get(limit, "")) for name, value, limit in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each side")
    parser.add_argument("--yardstick-images", type=int, default=32, help="images at once for the yardstick")
    parser.add_argument("--memory-images", type=int, default=10_000, help="images analyzed for the peak memory")
    parser.add_argument("--check-images", type=int, default=2000, help="labels compared with an exact search; 0: none")
    parser.add_argument("--attack-images", type=int, default=4, help="images attacked on the yardstick; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth-images", type=int, default=256, help="largest batch of the figure; 0: no figure")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "performance.png")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    images, labels = data.load("mnist", "test")
    model = absynth.load("abs")
    assert isinstance(model, ABS)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "yardstick_images": arguments.yardstick_images,
        "multiply_adds_per_second": matrix_rate(),
    }
    result |= measure(model, images, labels, arguments)
    if arguments.attack_images:
        note("the strongest L2 attack")
        result["attack"] = attack(model, images, labels, arguments.attack_images)
    note("the command line")
    result["command_line"] = command_line(images[0, 0], arguments.rounds)
    if arguments.check_images:
        note("labels against exact steps")
        count = arguments.check_images
        result["labels"] = labels_by_search(model, images[:count], labels[:count])
    result["peak_memory_gib"], result["accuracy"] = {}, {}
    calls = {
        "analyses": "torch.cat([model.analyze(chunk).labels for chunk in images.split(256)])",
        "predictions": "model(images).argmax(1)",
    }
    for what, call in calls.items():
        for count in (min(1000, arguments.memory_images), arguments.memory_images):
            note(f"peak memory of {count} {what}")
            memory, accuracy = peak_memory(count, call)
            result["peak_memory_gib"][f"{count} {what}"] = memory
            result["accuracy"][f"{count} {what}"] = accuracy
    if arguments.growth_images:
        note("how cost grows")
        result["growth"] = growth(model, images[: arguments.growth_images], arguments.figure)
    result["benchmark_seconds"] = time.perf_counter() - started
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    rows = table(result)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, value, limit in rows:
        print(f"{name:{widths[0]}}  {value:>{widths[1]}}  {limit}")
    note(f"everything is in {arguments.out}")


if __name__ == "__main__":
    main()
