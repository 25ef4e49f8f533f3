"""Figures of an evaluation, drawn from its summary alone. The only place that knows matplotlib; no global figure
state."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from absynth.evaluation.distal import Distal
from absynth.evaluation.paper import NAMES, published_curve
from absynth.evaluation.statistics import short
from absynth.evaluation.summary import THRESHOLDS, ModelSummary

#: Colors that are told apart on white and on black.
COLORS = {
    "cnn": "#e69f00",
    "binary-cnn": "#a6761d",
    "nearest-neighbor": "#8c8c8c",
    "madry": "#d5402b",
    "binary-abs": "#38a9d6",
    "abs": "#3f6fd8",
    "prototype-abs": "#1b9e77",
    "saturating-abs": "#8e44ad",
    "saturating-prototype-abs": "#0f6b50",
}
OTHER_COLORS = ("#cc79a7", "#8e6bd0", "#66a61e", "#e7298a")
LABELS = {"l0": "L0 (pixels)", "l1": "L1", "l2": "L2", "linf": "L∞"}
WIDEST = {"l0": 50.0, "l1": 40.0, "l2": 4.0, "linf": 0.5}  # how far the curves are drawn
_INK = "#0a0b0c"  # stands for the page's text color and is replaced by it in an SVG
_GRAY = 0.55


def display_name(model: str) -> str:
    """The paper's name of a model of the zoo, other names as they are."""
    return NAMES.get(model, model)


def title(model: ModelSummary) -> str:
    """What a model is called in tables and figures: as ``display_name`` says, and in which folder where names are
    equal."""
    return display_name(model.stored_name) + model.name.removeprefix(model.stored_name)


def model_colors(models: Sequence[ModelSummary]) -> list[str]:
    """A color a model: its own for the first of a name that has one, others by their place."""
    colors: list[str] = []
    for place, model in enumerate(models):
        own = COLORS.get(model.stored_name)
        colors.append(OTHER_COLORS[place % len(OTHER_COLORS)] if own is None or own in colors else own)
    return colors


def accuracy_curves(models: Sequence[ModelSummary], norm: str) -> Figure:
    """Accuracy against distance, all attacks of ``norm``: ours solid, the paper's dashed, certified accuracy dotted."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    is_published = False
    for model, color in zip(models, model_colors(models), strict=True):
        attacked = list(model.norms[norm].all.distances.values()) if norm in model.norms else []
        if attacked:
            distance, accuracy = curve(attacked, WIDEST[norm])
            axes.step(distance, accuracy, where="post", color=color, label=title(model), linewidth=1.8)
        elif norm in model.norms:
            axes.plot([], [], color=color, label=f"{title(model)} (errors only)")
        if (published := _published(model, norm)) is not None and color not in OTHER_COLORS:  # once a name
            is_published = True
            axes.plot(published[0], 100 * np.array(published[1]), "--", color=color, linewidth=1.0, alpha=0.8)
        if radii := certified_radii(model, norm):
            # under the attacks' curve belong the same images: others may be easier
            beside = model.norms[norm].all.distances if attacked else radii
            shown = [radius for image, radius in radii.items() if image in beside] or list(radii.values())
            distance, accuracy = curve(shown, WIDEST[norm])
            axes.step(distance, accuracy, where="post", color=color, linestyle=":", linewidth=1.6)
    axes.axvline(THRESHOLDS[norm], color=_INK, linewidth=0.8, alpha=0.5)
    axes.set(xlabel=f"{LABELS[norm]} distance", ylabel="accuracy (%)", xlim=(0, WIDEST[norm]), ylim=(0, 101))
    _plain_axes(axes)
    if is_published:
        axes.plot([], [], "--", color=_INK, linewidth=1.0, alpha=0.8, label="published")
    if any(certified_radii(model, norm) for model in models):
        axes.plot([], [], ":", color=_INK, linewidth=1.6, label="certified")
    legend = axes.legend(frameon=False, fontsize=8, loc="upper right", labelcolor=_INK)
    legend.set_zorder(5)
    return figure


def _published(model: ModelSummary, norm: str) -> tuple[list[float], list[float]] | None:
    """The paper's curve of a model that was attacked in the norm, on the paper's data."""
    return published_curve(model.paper_name, norm) if norm in model.norms else None


def curve(distances: Sequence[float], widest: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of the share (in %) of images farther than a distance, up to ``widest``: each holds until the next one.

    ``distances``: at least one.
    """
    ordered = np.sort(np.array(distances, dtype=np.float64))
    points = np.unique(np.concatenate([[0.0], ordered[ordered <= widest], [widest]]))
    return points, 100 * (1 - np.searchsorted(ordered, points, side="right") / len(ordered))


def certified_radii(model: ModelSummary, norm: str) -> dict[int, float]:
    """The largest guaranteed radius of each image, over all methods; estimates do not count."""
    radii: dict[int, float] = {}
    for certificate in model.certificates:
        if certificate.norm == norm and certificate.kind != "estimate":
            radii[certificate.image] = max(certificate.radius, radii.get(certificate.image, 0.0))
    return radii


def adversarials(
    models: Sequence[ModelSummary], norm: str, images: Mapping[int, tuple[Tensor, int]], columns: int = 10
) -> Figure | None:
    """The smallest adversarials of all models side by side, one image per class, each above its difference to the
    clean one.

    ``images`` are the clean images (C,H,W) and labels by index. In the differences red was added, blue taken away. None
    when no model has an adversarial in ``norm``.
    """
    shown = [model for model in models if model.nearest.get(norm)]
    chosen = _one_per_class(shown, norm, images)[:columns]
    if not chosen:
        return None
    height, width = images[chosen[0]][0].shape[-2:]
    gap = max(1, height // 14)
    blank = np.full((height, width, 3), _GRAY)
    rows = [[_picture(images[index][0]) for index in chosen]]
    for model in shown:
        nearest = model.nearest[norm]
        rows.append([_picture(_adversarial(nearest[i])) if i in nearest else blank for i in chosen])
        rows.append([_difference(_adversarial(nearest[i]) - images[i][0]) if i in nearest else blank for i in chosen])
    mosaic = np.full((len(rows) * (height + gap) - gap, len(chosen) * (width + gap) - gap, 4), 0.0)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            mosaic[top : top + height, left : left + width, :3] = picture
            mosaic[top : top + height, left : left + width, 3] = 1.0
    figure = Figure(figsize=(0.62 * len(chosen) + 1.5, 0.66 * len(rows) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(mosaic, interpolation="nearest")
    centers = [r * (height + gap) + height / 2 for r in range(len(rows))]
    axes.set_yticks([centers[0], *centers[1::2]], ["clean", *(title(model) for model in shown)])
    axes.set_xticks([c * (width + gap) + width / 2 for c in range(len(chosen))], [str(images[i][1]) for i in chosen])
    for m, model in enumerate(shown):
        for c, index in enumerate(chosen):
            nearest_row = model.nearest[norm].get(index)
            text = "–" if nearest_row is None else short(nearest_row.distance)
            spot = c * (width + gap) + width - 1, (2 * m + 2) * (height + gap) + height - 1
            axes.text(*spot, text, ha="right", va="bottom", fontsize=6.5, color="#202020")
    _plain_axes(axes)
    axes.tick_params(length=0)
    return figure


def distal_figure(found: Mapping[str, Distal]) -> Figure:
    """Distal images, a row a model: the first one's noise, then what each became, with the model's confidence above."""
    count = max(len(item.images) for item in found.values())
    figure = Figure(figsize=(1.05 * (count + 1) + 1.2, 1.3 * len(found) + 0.2), layout="constrained")
    grid = figure.subplots(len(found), count + 1, squeeze=False)
    for axes_row, (name, item) in zip(grid, found.items(), strict=True):
        pictures = [item.starts[0], *item.images]
        confidences = [item.start_confidences[0], *item.confidences]
        for place, axes in enumerate(axes_row):
            _plain_axes(axes)
            axes.set(xticks=[], yticks=[])
            if place < len(pictures):
                axes.imshow(_picture(pictures[place]), interpolation="nearest")
                axes.set_title(f"{100 * float(confidences[place]):.0f} %", fontsize=8, color=_INK, pad=2)
        axes_row[0].set_ylabel(display_name(name), fontsize=8, color=_INK)
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element to put into a page: its text has the page's color, its width adapts; ``label``
    names it."""
    stream = io.StringIO()
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        FigureCanvasSVG(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    limit = f' style="max-width:{float(width.group(1)) * 1.5:.0f}px"' if width else ""
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}"{limit} ', 1)


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG on white."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure)  # draws without any display
    # "tight": the layout leaves a picture whose sides are fixed less room for the names than they take
    figure.savefig(stream, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}, bbox_inches="tight")
    return stream.getvalue()


def data_url(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _one_per_class(models: Sequence[ModelSummary], norm: str, images: Mapping[int, tuple[Tensor, int]]) -> list[int]:
    """For each class the image that most models have an adversarial of; of equals the first."""
    best: dict[int, tuple[int, int]] = {}
    for index, (_, label) in sorted(images.items()):
        count = sum(index in model.nearest[norm] for model in models)
        if count and count > best.get(label, (0, -1))[0]:
            best[label] = (count, index)
    return [index for _, (_, index) in sorted(best.items())]


def _adversarial(row: object) -> Tensor:
    image = getattr(row, "adversarial", None)
    assert isinstance(image, torch.Tensor)
    return image


def _picture(image: Tensor) -> np.ndarray:
    """(C,H,W) in [0,1] -> (H,W,3); one channel becomes gray, of several the first three are shown."""
    colors = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return np.asarray(colors.permute(1, 2, 0).double())  # (3,H,W) -> (H,W,3)


def _difference(delta: Tensor) -> np.ndarray:
    """(C,H,W) in [-1,1] -> (H,W,3): white where nothing changed, red where ink was added, blue where it was taken
    away."""
    value = np.asarray(delta.mean(0).double())
    strength = np.sqrt(np.abs(value))[..., None]  # the root makes small changes visible
    color = np.where(value[..., None] > 0, np.array([0.79, 0.0, 0.13]), np.array([0.02, 0.19, 0.68]))
    return np.asarray(1 - strength * (1 - color))


def _plain_axes(axes: Axes) -> None:
    """Ink in the page's color, no box, nothing behind."""
    axes.patch.set_alpha(0)
    axes.figure.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and not axes.images)
        spine.set_color(_INK)
