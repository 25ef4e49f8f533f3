"""Draws docs/figures from the shipped weights and the MNIST test images: python docs/draw.py [FOLDER]."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from absynth import ABS, data, load
from absynth.attacks.base import Goal
from absynth.attacks.catalog import ATTACKS
from absynth.figures import explanation
from absynth.norms import L2
from absynth.quickstart import without_digits

INK, SOFT, BEST, RIVAL = "#1c2330", "#a9b1c2", "#0b7a5c", "#c2571a"
SHOWN = 0  # the test image on most figures: a seven


def picture(image: Tensor, path: Path) -> None:
    """The image as ink on paper, enlarged: what somebody might have scanned."""
    pixels = 255 - (255 * image[0]).byte()
    Image.fromarray(pixels.numpy()).resize((280, 280), Image.Resampling.BICUBIC).save(path)


def samples(model: ABS, path: Path) -> None:
    """What the ten generative models draw when nothing is asked of them: a row a class, latents from the prior."""
    latents = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    figure = _figure(8, 5)
    for row, decoder in enumerate(model.decoders):
        for column, image in enumerate(decoder(latents).detach()):
            _image(figure.add_axes((column / 16, 1 - (row + 1) / 10, 0.058, 0.093)), image)
    _save(figure, path)


def search(model: ABS, image: Tensor, label: int, path: Path) -> None:
    """The energy of every class, from the best candidate to the end of the search."""
    steps = range(9)
    found = [
        model.analyze(image[None], schedule=replace(model.schedule, slack=(), steps=count, tolerance=0)).energies[0]
        for count in steps
    ]
    figure = _figure(6.4, 3.4)
    axes = figure.add_axes((0.1, 0.15, 0.84, 0.8))
    for number, energies in enumerate(torch.stack(found, dim=1).tolist()):
        color = BEST if number == label else SOFT
        axes.plot(steps, energies, color=color, linewidth=2.4 if number == label else 1.4)
        axes.text(8.12, energies[-1], str(number), color=color if number == label else INK, fontsize=9, va="center")
    axes.set_ylim(0, None)
    axes.set_xlim(0, 8.4)
    axes.set_xlabel("Levenberg–Marquardt steps", color=INK)
    axes.set_ylabel("energy of a class", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def adversarials(image: Tensor, label: int, path: Path) -> dict[str, float]:
    """The nearest adversarial found in L2 beside a digit, for a plain network and for ABS; their distances."""
    figure = _figure(6.4, 4.5)
    distances = {}
    for row, name in enumerate(("cnn", "abs")):
        model = load(name)
        goal = Goal.untargeted(torch.tensor([label]))
        found = ATTACKS["boundary-projection-l2"](model, image[None], goal, torch.tensor([0])).images[0]
        distances[name] = float(L2.distance(found[None], image[None]))
        said = int(model(found[None]).argmax())
        titles = ("the image", f"{name} says {said}", f"the difference, L2 {distances[name]:.2f}")
        for column, (title, shown) in enumerate(zip(titles, (image, found, found - image), strict=True)):
            axes = figure.add_axes((0.02 + column / 3, 0.5 - row / 2, 0.29, 0.43))
            if column < 2:
                _image(axes, shown)
            else:
                _bare(axes).imshow(shown[0].numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title, color=INK, fontsize=10, pad=3)
    _save(figure, path)
    return distances


def explained(model: ABS, image: Tensor, path: Path) -> None:
    """What the ten classes make of the image; of a digit with its pixels shuffled: no class explains it."""
    analysis = model.analyze(image[None])
    refused = bool(model.refuses(analysis.probabilities))
    explanation(image, analysis, data.class_names("mnist"), path, refused=refused)


def main(folder: Path) -> dict[str, float]:
    """All figures, into ``folder``; the distances of the adversarials shown."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = data.load("mnist", "test")
    image, label = images[SHOWN], int(labels[SHOWN])
    model = load("abs")
    assert isinstance(model, ABS)
    picture(image, folder / "digit.png")
    samples(model, folder / "samples.png")
    search(model, image, label, folder / "search.png")
    explained(model, image, folder / "explanation.png")
    explained(model, without_digits(images[SHOWN : SHOWN + 1])[1][0], folder / "refusal.png")
    return adversarials(image, label, folder / "adversarials.png")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(SOFT)
    return axes


def _image(axes: Any, image: Tensor) -> None:
    _bare(axes).imshow(image[0].detach().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures"))
