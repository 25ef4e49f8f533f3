"""The line between the paper's two models: accuracy against the ramp's a, attacked and certified.

    python benchmarks/line.py [--images 100] [--ramps 0,0.1,0.2,0.25,0.3,0.35,0.4,0.48] [--abs] [--out runs/line]

The same prototypes, those of ``prototype-abs``, not trained anew, behind every ramp: certified, and attacked by
``ramp-projection`` in L2, L-infinity and L0, so that the truth lies between both. With ``--abs`` the model attacked is
ABS, the decoders of ``abs`` with the search in latent space, behind the same ramps. Rows go to ``OUT/line.json`` as
they come, and a run that was stopped goes on; the figure is ``OUT/line.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth import data, weight_files, zoo
from absynth.attacks.base import Goal
from absynth.attacks.ramp_projection import RampProjection
from absynth.certificates import certified_radii
from absynth.classifiers import ABS
from absynth.norms import L0, L2, LINF, NORMS
from absynth.prototypes import PrototypeABS, SaturatingPrototypeABS
from absynth.responses import Ramp

BALLS = {"l2": 1.5, "linf": 0.3, "l0": 12.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--ramps", default="0,0.1,0.2,0.25,0.3,0.35,0.4,0.48")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--abs", action="store_true", help="attack ABS instead of the prototypes")
    parser.add_argument("--out", type=Path, default=Path("runs/line"))
    arguments = parser.parse_args()
    images, labels = (part[: arguments.images] for part in data.load("mnist", "test"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "line.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    victim = "abs" if arguments.abs else "prototype-abs"
    done = {(row["a"], row["images"], row["steps"], row["victim"]) for row in rows}
    for a in map(float, arguments.ramps.split(",")):
        if (a, arguments.images, arguments.steps, victim) in done:
            continue
        row = {"a": a, "images": arguments.images, "steps": arguments.steps, "victim": victim}
        prototypes = saturated_prototypes(a)
        attack = saturated_abs(a) if arguments.abs else prototypes
        row["attacked"] = attacked(attack, images, labels, arguments.steps)
        row["certified"] = certified(prototypes, images, labels)
        rows.append(row)
        file.write_text(json.dumps(rows, indent=1))
        print(json.dumps(row), flush=True)
    draw(
        [row for row in rows if row["images"] == arguments.images and row["victim"] == victim],
        arguments.out / "line.png",
    )


def saturated_abs(a: float) -> ABS:
    """The decoders of ``abs`` behind a ramp."""
    plain = zoo.load("abs")
    assert isinstance(plain, ABS)
    return ABS(list(plain.decoders), plain.candidates, response=Ramp(a), beta=plain.beta)


def saturated_prototypes(a: float) -> SaturatingPrototypeABS:
    """The prototypes of ``prototype-abs`` behind a ramp."""
    plain = zoo.load("prototype-abs")
    assert isinstance(plain, PrototypeABS)
    decoders = zoo.decoders_of(weight_files.read(zoo.path_of("prototype-abs")))
    return SaturatingPrototypeABS(
        decoders, plain.latents.split(plain.class_counts), response=Ramp(a), beta=plain.beta
    )  # fmt: skip


def attacked(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, float]:
    """Accuracy, clean and in each ball, and of the union."""
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    found = {"clean": float(right.double().mean())}
    alive = right.clone()
    for norm in (L2, LINF, L0):
        result = RampProjection(norm, steps=steps)(model, images, Goal.untargeted(labels), torch.arange(len(images)))
        broken = torch.zeros(len(images), dtype=torch.bool)
        for ball, radius in BALLS.items():  # an adversarial may lie in the ball of another norm, too
            inside = result.found & (NORMS[ball].distance(result.images, images) <= radius)
            broken |= inside
            if ball == str(norm):
                found[ball] = float((right & ~inside).double().mean())
        alive &= ~broken
    return {**found, "union": float(alive.double().mean())}


def certified(model: SaturatingPrototypeABS, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, clean, and the shares certified in each ball and in their union."""
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    radii = certified_radii(model, images, labels, tuple(BALLS))
    held = {norm: radii[norm] > radius for norm, radius in BALLS.items()}
    shares = {norm: float(one.double().mean()) for norm, one in held.items()}
    union = torch.stack(list(held.values())).all(0)
    return {"clean": float(right.double().mean()), **shares, "union": float(union.double().mean())}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both panels: attacked and certified accuracy against a."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"clean": "clean", "l2": "L2 1.5", "linf": "L∞ 0.3", "l0": "L0 12", "union": "union of the three"}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, kind in zip(panels, ("attacked", "certified"), strict=True):
        for key, name in names.items():
            points = sorted((row["a"], 100 * row[kind][key]) for row in rows)
            width = 2.4 if key == "union" else 1.2
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=name)
        panel.set(xlabel="a  (0: ABS, ½: Binary ABS)", title=kind, xlim=(0, 0.5), ylim=(0, 101))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy [%]")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
