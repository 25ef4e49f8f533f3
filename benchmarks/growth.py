"""How the cost of an analysis grows: with images, classes, candidates and latent size. Part of ``make benchmark``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absynth.analysis import DEFAULT
from absynth.candidates import prior_candidates
from absynth.classifiers import ABS
from absynth.vae import Decoder, VAEConfig

# Every class is followed for the same number of steps, so that only the size of the problem varies.
FIXED = replace(DEFAULT, steps=4, losing_steps=4, tolerance=0.0, slack=())


def best_of(call: Callable[[], Any], rounds: int = 3) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def growth(model: ABS, images: Tensor, figure: Path) -> dict[str, Any]:
    """Seconds by size, and the figure. ``images``: as many as the largest batch shall have."""
    counts = [count for count in (1, 4, 16, 64, 256, 1024) if count <= len(images)]
    batch = images[:64]
    found: dict[str, dict[str, list[float]]] = {}

    def record(name: str, sizes: Sequence[int], call: Callable[[int], Callable[[], Any]]) -> None:
        found[name] = {"size": list(sizes), "seconds": [best_of(call(size)) for size in sizes]}

    record("images", counts, lambda size: lambda: model(images[:size]))

    def classes(size: int) -> Callable[[], Any]:
        part = ABS(list(model.decoders)[:size], model.candidates[:size], schedule=FIXED)
        return lambda: part.analyze(batch)

    record("classes", (2, 4, 7, 10), classes)

    def candidates(size: int) -> Callable[[], Any]:
        latents = prior_candidates(size, model.candidates.shape[2])[None].expand(2, -1, -1)
        part = ABS(list(model.decoders)[:2], latents, schedule=FIXED)
        return lambda: part.analyze(batch)

    record("candidates a class (2 classes)", (100, 400, 1600, 6400), candidates)

    def latent_size(size: int) -> Callable[[], Any]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoders = [Decoder(VAEConfig(latent_size=size)).eval() for _ in range(2)]
        latents = prior_candidates(100, size)[None].expand(2, -1, -1)
        part = ABS(decoders, latents, schedule=FIXED)
        return lambda: part.analyze(batch)

    record("latent size (2 untrained classes)", (2, 8, 32, 64), latent_size)
    draw(found, figure)
    return found


def draw(found: dict[str, dict[str, list[float]]], figure: Path) -> None:
    """One panel for each size, both axes logarithmic; the gray line is proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, len(found), figsize=(3 * len(found), 2.8), layout="constrained")
    for panel, (name, one) in zip(axes, found.items(), strict=True):
        milliseconds = [1000 * value for value in one["seconds"]]
        last = milliseconds[-1] / one["size"][-1]
        panel.loglog(one["size"], [last * size for size in one["size"]], color="0.8", linewidth=1)
        panel.loglog(one["size"], milliseconds, marker="o", color="C0")
        panel.set_xticks(one["size"], [str(size) for size in one["size"]])
        panel.minorticks_off()
        panel.set_xlabel(name)
    axes[0].set_ylabel("milliseconds a call")
    drawing.savefig(figure, dpi=150)
    pyplot.close(drawing)
