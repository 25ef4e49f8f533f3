"""The report of one or several evaluations: one HTML page that opens offline, a CSV file and a Markdown file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from torch import Tensor

from absynth import __version__
from absynth.errors import InputError
from absynth.evaluation import figures, paper
from absynth.evaluation.distal import load_distal
from absynth.evaluation.ledger import Ledger, ledger_folders
from absynth.evaluation.statistics import Interval, median, wilson_interval
from absynth.evaluation.summary import THRESHOLDS, Cell, ModelSummary, Summary, summarize

#: The order of norms in a report.
ORDER = ("l2", "linf", "l0", "l1")
NORM_TITLES = {"l0": "L0", "l1": "L1", "l2": "L2", "linf": "L∞"}


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    html: Path
    csv: Path
    markdown: Path


@dataclass(frozen=True)
class Entry:
    """A cell of a table: the value, its interval below it, the published value below that; each may be empty."""

    value: str = "–"
    interval: str = ""
    published: str = ""


def report(*folders: str | Path, out: str | Path | None = None) -> Report:
    """Write ``report.html``, ``report.csv`` and ``report.md`` about the runs in or below ``folders`` into ``out``.

    ``out`` is the first folder unless given. No model is touched: everything comes from the ledgers. Raises InputError
    when there is no ledger, one cannot be read, runs are about different images under the same index, or the folder
    cannot be written.
    """
    if not folders:
        raise InputError("no run folder given: name at least one")
    summary = _ordered(summarize(*folders))
    images, parameters = _images(folders)
    target = Path(out) if out is not None else Path(folders[0])
    files = Report(target / "report.html", target / "report.csv", target / "report.md")
    content = {
        files.html: render_html(summary, images, parameters, _distal(folders)),
        files.csv: render_csv(summary),
        files.markdown: render_markdown(summary),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in content.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {target}: {error.strerror}; choose a writable folder") from error
    return files


def render_html(
    summary: Summary,
    images: Mapping[int, tuple[Tensor, int]],
    parameters: Mapping[str, str] | None = None,
    distal: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page. ``images`` are the clean images (C,H,W) and labels by index, ``parameters`` names the attacks by
    repr."""
    norms = _norms(summary)
    certificates = list(_certificate_rows(summary))
    pictures = list(_pictures(summary, norms, images))
    distal_figures = [_embedded(figures.distal_figure(found)) for found in distal]
    contents = [
        ("overview", "At a glance"),
        ("warnings", "Warnings"),
        ("curves", "Curves"),
        ("attacks", "Every attack"),
    ]
    contents += [("adversarials", "Adversarials")] if pictures else []
    contents += [("distal", "Distal images")] if distal_figures else []
    contents += [("certificates", "Certificates")] if certificates else []
    contents += [("wins", "Wins"), ("cost", "Cost"), ("method", "Method")]
    counts = [len(model.clean) for model in summary.models]
    data = f"{summary.facts.get('data', 'data')}, {summary.facts.get('split', '')} split"
    lead = f"{len(summary.models)} models, {_range(counts)} images each of {data}, attacked in {_listed(norms)}."
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("absynth.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title="Evaluation report",
        lead=lead.replace("1 models", "1 model"),
        contents=contents,
        cell=_cell_html,
        norms=[{"title": NORM_TITLES[norm]} for norm in norms],
        thresholds=", ".join(f"{NORM_TITLES[norm]} {THRESHOLDS[norm]:g}" for norm in norms),
        overview=[_overview(model, norms) for model in summary.models],
        warnings=[(figures.display_name(model.name), model.doubts) for model in summary.models if model.doubts],
        unasked=_unasked(summary),
        curves=[_curves(summary, norm) for norm in norms],
        tables=[_table(summary, norm) for norm in norms],
        pictures=pictures,
        distal=distal_figures,
        certificates=certificates,
        wins=_wins(summary, norms),
        cost=_cost(summary, norms),
        digests=[(figures.display_name(model.name), model.digest) for model in summary.models],
        facts=[(key.replace("_", " "), value) for key, value in summary.facts.items()],
        parameters=list((parameters or {}).items()),
        source=paper.source(),
        version=__version__,
    )


def render_csv(summary: Summary) -> str:
    """One line a model, norm and attack (``all`` for all together), raw numbers; accuracies are shares."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            *("model", "norm", "attack", "images", "errors", "median", "median_low", "median_high"),
            *("threshold", "accuracy", "accuracy_low", "accuracy_high", "wins", "forward", "backward", "seconds"),
            *("paper_median", "paper_accuracy"),
        ]
    )
    for model in summary.models:
        for norm, found in model.norms.items():
            for attack, cell in (("all", found.all), *found.attacks.items()):
                published = paper.published(model.name, norm, None if attack == "all" else attack)
                writer.writerow(
                    [
                        *(model.name, norm, attack, cell.images, cell.errors, cell.median, *cell.median_interval),
                        *(cell.threshold, cell.accuracy, *cell.accuracy_interval),
                        *(cell.wins, cell.forward, cell.backward, cell.seconds),
                        *(("", "") if published is None else (published.median, published.accuracy)),
                    ]
                )
        if model.union is not None:
            alive, count = sum(model.union.values()), len(model.union)
            share = alive / count if count else math.nan
            numbers = (share, *wilson_interval(alive, count))
            writer.writerow([model.name, "union", "all", count, 0, "", "", "", "", *numbers, *[""] * 6])
    return stream.getvalue()


def render_markdown(summary: Summary) -> str:
    """The tables as Markdown: median / accuracy with 95 % intervals, the paper's figures in brackets."""
    norms = _norms(summary)
    lines = ["# Evaluation report", ""]
    head = ["model", "images", "clean accuracy", *(NORM_TITLES[norm] for norm in norms), "union"]
    rows = []
    for model in summary.models:
        view = _overview(model, norms)
        cells = [view["clean"], *view["norms"], view["union"]]
        rows.append([view["model"], str(view["images"]), *(_cell_text(cell) for cell in cells)])
    lines += _markdown_table(head, rows)
    lines += [
        "",
        "Median distance · accuracy at the threshold; 95 % intervals in parentheses; the paper's figures in brackets.",
    ]
    for norm in norms:
        table = _table(summary, norm)
        lines += ["", f"## {table['title']}", ""]
        body = [[row["attack"], *(_cell_text(cell) for cell in row["cells"])] for row in table["rows"]]
        lines += _markdown_table(["attack", *table["models"]], body)
    doubts = [(figures.display_name(model.name), doubt) for model in summary.models for doubt in model.doubts]
    lines += ["", "## Warnings", ""]
    lines += [f"- {name}, {doubt.subject}: {doubt.message}" for name, doubt in doubts]
    if unasked := _unasked(summary):
        lines += [f"Not looked for: {unasked}. `absynth evaluate` looks for them."]
    return "\n".join(lines if lines[-1] else [*lines, "None."]) + "\n"


def _unasked(summary: Summary) -> str:
    """The models that the evaluation did not put its questions to, attacked ones only."""
    return ", ".join(figures.display_name(model.name) for model in summary.models if model.norms and not model.probed)


# Tables


def _overview(model: ModelSummary, norms: Sequence[str]) -> dict[str, Any]:
    right, count = sum(model.clean.values()), len(model.clean)
    published = paper.published_clean(model.name)
    clean = Entry(
        percent(model.clean_accuracy, 1),
        _percents(wilson_interval(right, count)),
        "" if published is None else percent(published, 1),
    )
    union = Entry()
    if model.union:
        alive = sum(model.union.values())
        union = Entry(percent(alive / len(model.union)), _percents(wilson_interval(alive, len(model.union))))
    cells = [
        _entry(model.norms[norm].all, paper.published(model.name, norm)) if norm in model.norms else Entry()
        for norm in norms
    ]
    return {"model": figures.display_name(model.name), "images": count, "clean": clean, "norms": cells, "union": union}


def _table(summary: Summary, norm: str) -> dict[str, Any]:
    """The paper's Table 1 for one norm: a row an attack, a column a model, all attacks together in the last row."""
    models = [model for model in summary.models if norm in model.norms]
    rows = []
    for attack in _attacks(models, norm):
        cells = []
        for model in models:
            published = paper.published(model.name, norm, attack)
            cell = model.norms[norm].attacks.get(attack)
            cells.append(
                Entry(published="" if published is None else _published(published))
                if cell is None
                else _entry(cell, published)
            )
        rows.append({"attack": _attack_name(attack, norm), "cells": cells, "total": False})
    total = [_entry(model.norms[norm].all, paper.published(model.name, norm)) for model in models]
    rows.append({"attack": "all attacks", "cells": total, "total": True})
    threshold = f"{NORM_TITLES[norm]} {THRESHOLDS[norm]:g}"
    return {
        "title": f"{NORM_TITLES[norm]}: median distance · accuracy at {THRESHOLDS[norm]:g}",
        "models": [figures.display_name(model.name) for model in models],
        "rows": rows,
        "caption": f"Median distance · accuracy at {threshold}; below, 95 % intervals; italic, the paper's figures.",
    }


def _entry(cell: Cell, published: paper.Published | None) -> Entry:
    if not cell.images:
        return Entry("error")
    value = f"{number(cell.median)} · {percent(cell.accuracy)}"
    low, high = cell.median_interval
    interval = f"{number(low)}–{number(high)} · {_percents(cell.accuracy_interval)}"
    return Entry(value, interval, "" if published is None else _published(published))


def _published(cell: paper.Published) -> str:
    return f"{number(cell.median)} · {percent(cell.accuracy)}"


def _wins(summary: Summary, norms: Sequence[str]) -> dict[str, Any]:
    rows = []
    for norm in norms:
        models = summary.models
        for attack in _attacks([model for model in models if norm in model.norms], norm):
            cells = []
            for model in models:
                cell = model.norms[norm].attacks.get(attack) if norm in model.norms else None
                share = 0.0 if cell is None or not cell.images else cell.wins / cell.images
                cells.append((share, "" if cell is None else f"{cell.wins:.3g}"))
            rows.append({"attack": attack, "cells": cells})
    return {"models": [figures.display_name(model.name) for model in summary.models], "rows": rows}


def _cost(summary: Summary, norms: Sequence[str]) -> dict[str, Any]:
    rows = []
    for norm in norms:
        for attack in _attacks([model for model in summary.models if norm in model.norms], norm):
            cells = []
            for model in summary.models:
                cell = model.norms[norm].attacks.get(attack) if norm in model.norms else None
                queries = "" if cell is None else f"{cell.forward:,.0f} + {cell.backward:,.0f}"
                cells.append(Entry("" if cell is None else queries, "" if cell is None else f"{cell.seconds:.2g} s"))
            rows.append({"attack": attack, "cells": cells})
    return {"models": [figures.display_name(model.name) for model in summary.models], "rows": rows}


def _certificate_rows(summary: Summary) -> Iterable[dict[str, Any]]:
    for model in summary.models:
        groups: dict[tuple[str, str, str], list[float]] = {}
        for certificate in model.certificates:
            key = certificate.norm, certificate.method, certificate.kind
            groups.setdefault(key, []).append(certificate.radius)
        for (norm, method, kind), radii in groups.items():
            # The guarantee is for distances below the radius, and a distance equal to the threshold breaks an image.
            certified = sum(radius > THRESHOLDS[norm] for radius in radii)
            interval = _percents(wilson_interval(certified, len(radii)))
            yield {
                "model": figures.display_name(model.name),
                "norm": NORM_TITLES[norm],
                "method": method,
                "kind": kind,
                "images": len(radii),
                "mean": number(sum(radii) / len(radii)),
                "median": number(median(radii)),
                "accuracy": f"{percent(certified / len(radii))} ({interval})",
            }


# Figures


def _curves(summary: Summary, norm: str) -> dict[str, Any]:
    figure = figures.accuracy_curves(summary.models, norm)
    svg = figures.to_svg(figure, f"accuracy against {NORM_TITLES[norm]} distance")
    caption = f"{NORM_TITLES[norm]}, all attacks. Dashed: the paper's curves. Vertical line: {THRESHOLDS[norm]:g}."
    return {"svg": Markup(svg), "caption": caption}


def _pictures(
    summary: Summary, norms: Sequence[str], images: Mapping[int, tuple[Tensor, int]]
) -> Iterable[dict[str, Any]]:
    for norm in norms:
        figure = figures.adversarials(summary.models, norm, images)
        if figure is not None:
            yield {"caption": f"{NORM_TITLES[norm]}", **_embedded(figure)}


def _embedded(figure: Any) -> dict[str, Any]:
    return {"url": figures.data_url(figures.to_png(figure)), "width": int(96 * figure.get_figwidth())}


# Reading


def _ordered(summary: Summary) -> Summary:
    """Models in the paper's order, others after them."""
    known = list(paper.NAMES)
    models = sorted(summary.models, key=lambda m: (known.index(m.name) if m.name in known else len(known), m.name))
    return Summary(tuple(models), summary.facts)


def _images(folders: Sequence[str | Path]) -> tuple[dict[int, tuple[Tensor, int]], dict[str, str]]:
    """Clean images by index, and attacks by name."""
    images: dict[int, tuple[Tensor, int]] = {}
    parameters: dict[str, list[str]] = {}  # several where an attack was refined for some of the models
    digests = set()
    for folder in ledger_folders(folders):
        with Ledger(folder) as ledger:
            images.update(ledger.images())
            digests.add(ledger.facts().get("data_digest"))
            for record in ledger.attacks().values():
                given = parameters.setdefault(record.name, [])
                if record.attack not in given:
                    given.append(record.attack)
    if len(digests) > 1:
        raise InputError(f"{', '.join(map(str, folders))} are about different data: report on one data set at a time")
    return images, {name: "; ".join(given) for name, given in sorted(parameters.items())}


def _distal(folders: Sequence[str | Path]) -> list[Mapping[str, Any]]:
    places = dict.fromkeys([Path(folder) for folder in folders] + ledger_folders(folders))
    return [found for place in places if (found := load_distal(place))]


def _norms(summary: Summary) -> list[str]:
    return [norm for norm in ORDER if any(norm in model.norms for model in summary.models)]


def _attacks(models: Sequence[ModelSummary], norm: str) -> list[str]:
    """The attacks of the paper in its order, then the others by name."""
    present = {attack for model in models for attack in model.norms[norm].attacks}
    known = [attack for attack in paper.paper_attacks(norm) if attack in present]
    return known + sorted(present - set(known))


def _attack_name(attack: str, norm: str) -> str:
    return attack.removesuffix(f"-{norm}")


# Text


def number(value: float) -> str:
    """Three significant digits; ∞ for infinity, an en dash for NaN."""
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def _percents(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f} %"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _listed(norms: Sequence[str]) -> str:
    names = [NORM_TITLES[norm] for norm in norms]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names) or "no norm"


def _cell_html(entry: Entry) -> Markup:
    parts = [escape(entry.value)]
    if entry.interval:
        parts.append(Markup('<span class="range">{}</span>').format(entry.interval))
    if entry.published:
        parts.append(Markup('<span class="paper">{}</span>').format(entry.published))
    return Markup("").join(parts)


def _cell_text(entry: Entry) -> str:
    interval = f" ({entry.interval})" if entry.interval else ""
    return f"{entry.value}{interval}" + (f" [{entry.published}]" if entry.published else "")


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
