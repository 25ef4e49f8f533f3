"""The figure of an analysis: the image, how every class re-creates it, and the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from absynth.classifiers import Analysis
from absynth.errors import InputError

_LIGHT = {"paper": "#ffffff", "ink": "#1c2330", "soft": "#66708a", "line": "#d5d9e2", "bar": "#a9b1c2"}
_LIGHT |= {"best": "#0b7a5c", "refused": "#c2571a"}
_DARK = {"paper": "#14171d", "ink": "#e8ebf2", "soft": "#98a1b5", "line": "#363c48", "bar": "#5a6376"}
_DARK |= {"best": "#3ecf9f", "refused": "#f0904e"}


def explanation(
    image: Tensor,
    analysis: Analysis,
    names: Sequence[str],
    path: str | Path,
    *,
    refused: bool = False,
    dark: bool = False,
) -> None:
    """Draw how an ABS explains one image into ``path`` (PNG, SVG, PDF or JPEG, by its suffix).

    ``image`` (C,S,S) in [0,1]; ``analysis`` of that image alone (B = 1); ``names`` of its K classes. From left to
    right: the image, the best image each class's model can make of it with its energy, and the posterior. The likeliest
    class is marked, in another color if ``refused``: if nothing explains the image. ``dark``: for dark pages. Raises
    InputError if the file cannot be written.
    """
    colors = _DARK if dark else _LIGHT
    mark = colors["refused" if refused else "best"]
    energies, probabilities = analysis.energies[0].tolist(), analysis.probabilities[0].tolist()
    best = int(analysis.labels)
    columns = (len(names) + 1) // 2
    figure = Figure(figsize=(4.6 + 1.12 * columns, 3.5), dpi=200, facecolor=colors["paper"])
    FigureCanvasAgg(figure)
    left, right = 2.45 / figure.get_figwidth(), 2.0 / figure.get_figwidth()

    seen = figure.add_axes((0.02, 0.12, left - 0.045, 0.68))
    _show(seen, image, colors["line"], 1.0)
    seen.set_title("the image", color=colors["ink"], fontsize=11, pad=9)
    verdict = "no class explains it" if refused else f"explained best as {names[best]}"
    seen.set_xlabel(verdict, color=mark, fontsize=11, labelpad=8, fontweight="bold")

    width = (1 - left - right - 0.03) / columns
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        cell = figure.add_axes((left + column * width, 0.5 - 0.455 * row, 0.84 * width, 0.325))
        chosen = number == best
        _show(cell, analysis.reconstructions[0, number], mark if chosen else colors["line"], 2.4 if chosen else 1.0)
        weight = "bold" if chosen else "normal"
        cell.set_title(name, color=mark if chosen else colors["ink"], fontsize=9.5, pad=4, fontweight=weight)
        cell.set_xlabel(
            f"{1000 * energies[number]:.1f}", color=mark if chosen else colors["soft"], fontsize=9, labelpad=3,
            fontweight=weight,
        )  # fmt: skip
    middle = left + (columns * width - 0.16 * width) / 2
    figure.text(
        middle, 0.945, "what each class makes of it, energy × 1000", color=colors["ink"], fontsize=11, ha="center"
    )

    bars = figure.add_axes((1 - right + 0.045, 0.12, right - 0.1, 0.75))
    bars.set_facecolor(colors["paper"])
    rows = list(range(len(names)))
    bars.barh(
        rows, probabilities, height=0.66, color=[mark if row == best else colors["bar"] for row in rows], linewidth=0
    )
    bars.set_xlim(0, 1)
    bars.set_ylim(len(names) - 0.4, -0.6)
    bars.set_yticks(rows, names, color=colors["ink"], fontsize=9)
    bars.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], color=colors["soft"], fontsize=8.5)
    bars.tick_params(length=0)
    bars.grid(axis="x", color=colors["line"], linewidth=0.8)
    bars.set_axisbelow(True)
    for spine in bars.spines.values():
        spine.set_visible(False)
    figure.text(
        1 - right + 0.045 + (right - 0.1) / 2, 0.945, "posterior", color=colors["ink"], fontsize=11, ha="center"
    )
    value = probabilities[best]
    inside = value > 0.6
    bars.text(
        value - 0.03 if inside else value + 0.03, best, f"{value:.2f}", va="center", ha="right" if inside else "left",
        color=colors["paper"] if inside else mark, fontsize=8.5, fontweight="bold",
    )  # fmt: skip
    try:
        # No date and version inside: the same analysis gives the same file.
        with matplotlib.rc_context({"svg.hashsalt": "absynth"}):
            figure.savefig(path, facecolor=colors["paper"], metadata=_no_date(Path(path)))
    except OSError as error:
        raise InputError(f"cannot draw into {path}: {error.strerror or error}; choose a writable folder") from error


def _no_date(path: Path) -> dict[str, Any] | None:
    keys = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    return keys.get(path.suffix.lower())


def _show(axes: Any, image: Tensor, frame: str, width: float) -> None:
    """One image (C,S,S), gray or color, in a frame."""
    pixels = image.detach().cpu()
    if len(pixels) == 3:
        axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axes.imshow(pixels[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(width)
