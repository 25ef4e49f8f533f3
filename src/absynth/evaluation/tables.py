"""The tables of a report: what stands in each cell, and how it is written in HTML and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from absynth.evaluation import figures, paper
from absynth.evaluation.statistics import Interval, median, short, wilson_interval
from absynth.evaluation.summary import THRESHOLDS, Cell, ModelSummary, Summary

#: The order of norms in a report.
ORDER = ("l2", "linf", "l0", "l1")
NORM_TITLES = {"l0": "L0", "l1": "L1", "l2": "L2", "linf": "L∞"}
PAPER = "; italic, the paper's figures."


@dataclass(frozen=True)
class Entry:
    """A cell of a table: the value; below it on which images, where it needs to be said, its interval, and the
    published value; each may be empty."""

    value: str = "–"
    interval: str = ""
    published: str = ""
    images: str = ""


def norms_of(summary: Summary) -> list[str]:
    """The norms of a summary, in the order of ``ORDER``."""
    return [norm for norm in ORDER if any(norm in model.norms for model in summary.models)]


def beside_paper(summary: Summary) -> bool:
    """Whether the paper has figures for some of the models, on the same data."""
    return any(model.paper_name in paper.MODELS for model in summary.models)


def _attacks(models: Sequence[ModelSummary], norm: str) -> list[str]:
    """The attacks of the paper in its order, then the others by name."""
    present = {attack for model in models for attack in model.norms[norm].attacks}
    known = [attack for attack in paper.paper_attacks(norm) if attack in present]
    return known + sorted(present - set(known))


def _attack_name(attack: str, norm: str) -> str:
    return attack.removesuffix(f"-{norm}")


def overview(model: ModelSummary, norms: Sequence[str]) -> dict[str, Any]:
    """One row of the first table: clean accuracy, every norm with all attacks together, and the union of the balls."""
    right, count = sum(model.clean.values()), len(model.clean)
    published = paper.published_clean(model.paper_name)
    clean = Entry(
        percent(model.clean_accuracy, 1) if count else "error" if model.unanswered else "–",
        _percents(wilson_interval(right, count)) if count else "",
        "" if published is None else percent(published, 1),
        f"{count} of {count + model.unanswered} images answered" if model.unanswered else "",
    )
    cells = [
        _entry(found.all, count, paper.published(model.paper_name, norm), found.uneven)
        if (found := model.norms.get(norm))
        else Entry()
        for norm in norms
    ]
    return {"model": figures.title(model), "images": count, "clean": clean, "norms": cells, "union": _union(model)}


def _union(model: ModelSummary) -> Entry:
    if not model.union:
        return Entry("error") if model.union_errors else Entry()
    alive, count = sum(model.union.values()), len(model.union)
    interval = _percents(wilson_interval(alive, count))
    return Entry(percent(alive / count), interval, images=_on(count, len(model.clean), model.union_uneven))


def _on(images: int, expected: int, is_uneven: bool = False) -> str:
    """On which images, where these are not those of the clean accuracy, or not all had every attack."""
    count = f"{images} image{'s' * (images != 1)}" if images != expected else ""
    return ", ".join(filter(None, (count, "some without every attack" if is_uneven else "")))


def attack_table(summary: Summary, norm: str) -> dict[str, Any]:
    """The paper's Table 1 for one norm: a row an attack, a column a model; several attacks together in the last row."""
    models = [model for model in summary.models if norm in model.norms]
    rows = []
    for attack in _attacks(models, norm):
        cells = []
        for model in models:
            published = paper.published(model.paper_name, norm, attack)
            cell = model.norms[norm].attacks.get(attack)
            cells.append(
                Entry(published="" if published is None else _published(published))
                if cell is None
                else _entry(cell, len(model.clean), published)
            )
        rows.append({"attack": _attack_name(attack, norm), "cells": cells, "total": False})
    total = [overview(model, [norm])["norms"][0] for model in models]
    if len(rows) != 1:  # of one attack it would be the same line again
        rows.append({"attack": "all attacks", "cells": total, "total": True})
    threshold = f"{NORM_TITLES[norm]} {THRESHOLDS[norm]:g}"
    return {
        "title": f"{NORM_TITLES[norm]}: median distance · accuracy at {THRESHOLDS[norm]:g}",
        "models": [figures.title(model) for model in models],
        "rows": rows,
        "caption": f"Median distance · accuracy at {threshold}; below, 95 % intervals"
        + (PAPER if beside_paper(summary) else "."),
    }


def _entry(cell: Cell, expected: int, published: paper.Published | None, is_uneven: bool = False) -> Entry:
    """``expected``: on how many images the clean accuracy was taken."""
    if not cell.images:
        return Entry("error")
    value = f"{number(cell.median)} · {percent(cell.accuracy)}"
    low, high = cell.median_interval
    interval = f"{number(low)}–{number(high)} · {_percents(cell.accuracy_interval)}"
    on = _on(cell.images, expected, is_uneven)
    return Entry(value, interval, "" if published is None else _published(published), on)


def _published(cell: paper.Published) -> str:
    return f"{number(cell.median)} · {percent(cell.accuracy)}"


def wins(summary: Summary, norms: Sequence[str]) -> dict[str, Any]:
    """Which attack came nearest on how many images of each model."""
    rows = []
    for norm in norms:
        models = summary.models
        for attack in _attacks([model for model in models if norm in model.norms], norm):
            cells = []
            for model in models:
                cell = model.norms[norm].attacks.get(attack) if norm in model.norms else None
                share = 0.0 if cell is None or not cell.images else cell.wins / cell.images
                cells.append((share, "" if cell is None else short(cell.wins)))
            rows.append({"attack": attack, "cells": cells})
    return {"models": [figures.title(model) for model in summary.models], "rows": rows}


def cost(summary: Summary, norms: Sequence[str]) -> dict[str, Any]:
    """Queries (forward + backward) and seconds an image of each attack and model."""
    rows = []
    for norm in norms:
        for attack in _attacks([model for model in summary.models if norm in model.norms], norm):
            cells = []
            for model in summary.models:
                cell = model.norms[norm].attacks.get(attack) if norm in model.norms else None
                queries = "" if cell is None else f"{cell.forward:,.0f} + {cell.backward:,.0f}"
                cells.append(Entry("" if cell is None else queries, "" if cell is None else _seconds(cell.seconds)))
            rows.append({"attack": attack, "cells": cells})
    return {"models": [figures.title(model) for model in summary.models], "rows": rows}


def certified_radii(model: ModelSummary) -> dict[tuple[str, str, str], list[float]]:
    """The radii of a model by norm, method and kind."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in model.certificates:
        groups.setdefault((one.norm, one.method, one.kind), []).append(one.radius)
    return groups


def certified_at(norm: str, radii: Sequence[float]) -> int:
    """How many are certified at the norm's threshold: a guarantee is for distances below the radius, and a distance
    equal to the threshold breaks an image."""
    return sum(radius > THRESHOLDS[norm] for radius in radii)


def certificate_rows(summary: Summary) -> Iterable[dict[str, Any]]:
    """Radii and certified accuracy of each model, norm, method and kind."""
    for model in summary.models:
        for (norm, method, kind), radii in certified_radii(model).items():
            certified = certified_at(norm, radii)
            interval = _percents(wilson_interval(certified, len(radii)))
            yield {
                "model": figures.title(model),
                "norm": NORM_TITLES[norm],
                "method": method,
                "kind": kind,
                "images": len(radii),
                "mean": number(sum(radii) / len(radii)),
                "median": number(median(radii)),
                "accuracy": f"{percent(certified / len(radii))} ({interval})",
            }


# Text


def number(value: float) -> str:
    """Three significant digits, from 1,000 on no decimals; ∞ for infinity, an en dash for NaN."""
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else short(value)


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 99.5 else f"{value:,.0f} s"


def _percents(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f} %"


def cell_html(entry: Entry) -> Markup:
    """An entry as HTML."""
    parts = [escape(entry.value)]
    for text in filter(None, (entry.images, entry.interval)):
        parts.append(Markup('<span class="range">{}</span>').format(text))
    if entry.published:
        parts.append(Markup('<span class="paper">{}</span>').format(entry.published))
    return Markup("").join(parts)


def cell_text(entry: Entry) -> str:
    """An entry on one line."""
    below = "; ".join(filter(None, (entry.images, entry.interval)))
    return entry.value + f" ({below})" * bool(below) + (f" [{entry.published}]" if entry.published else "")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_markdown_row(head), "|" + "---|" * len(head), *map(_markdown_row, rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
