"""The report of one or several evaluations: one HTML page that opens offline, a CSV file and a Markdown file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from torch import Tensor

from absynth import __version__
from absynth.errors import InputError
from absynth.evaluation import figures, paper
from absynth.evaluation.distal import Distal, load_distal
from absynth.evaluation.folders import holds_evaluation, ledger_folders
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.probed import KINDS
from absynth.evaluation.statistics import Interval, median, median_interval, wilson_interval
from absynth.evaluation.summary import THRESHOLDS, ModelSummary, Summary, summarize
from absynth.evaluation.tables import (
    NORM_TITLES,
    attack_table,
    beside_paper,
    cell_html,
    cell_text,
    certificate_rows,
    certified_at,
    certified_radii,
    cost,
    markdown_table,
    norms_of,
    overview,
    wins,
)

NAMED = 4  # attacks that are named where they were not put to the test

#: The columns of a CSV file. A line about certificates has a method under ``certificate``, and radii for distances.
COLUMNS = (
    *("model", "norm", "attack", "images", "errors", "median", "median_low", "median_high"),
    *("threshold", "accuracy", "accuracy_low", "accuracy_high", "wins", "forward", "backward", "seconds"),
    *("paper_median", "paper_accuracy", "uneven", "certificate", "kind", "mean_radius"),
)


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    html: Path
    csv: Path
    markdown: Path


def report(*folders: str | Path, out: str | Path | None = None) -> Report:
    """Write ``report.html``, ``report.csv`` and ``report.md`` about the runs in or below ``folders`` into ``out``.

    ``out`` is the first folder unless given. No model is touched: everything comes from the ledgers and the distal
    images; a folder may hold these alone. Raises InputError when there is neither, one cannot be read, runs are about
    different data, or the folder cannot be written.
    """
    if not folders:
        raise InputError("no run folder given: name at least one")
    runs = [folder for folder in folders if not load_distal(folder) or _holds_answers(folder)]
    summary = _ordered(summarize(*runs)) if runs else Summary((), {})
    images, parameters = _images(summary)
    distal = _distal(folders, runs)
    target = Path(out) if out is not None else Path(folders[0])
    files = Report(target / "report.html", target / "report.csv", target / "report.md")
    content = {
        files.html: render_html(summary, images, parameters, distal),
        files.csv: render_csv(summary),
        files.markdown: render_markdown(summary, distal),
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
    distal: Sequence[Mapping[str, Distal]] = (),
) -> str:
    """The page. ``images`` are the clean images (C,H,W) and labels by index, ``parameters`` names the attacks by
    repr."""
    norms = norms_of(summary)
    certificates = list(certificate_rows(summary))
    pictures = list(_pictures(summary, norms, images))
    distal_figures = [_embedded(figures.distal_figure(found)) for found in distal]
    doubted = _warnings(summary)
    sections = {
        ("overview", "At a glance"): summary.models,
        ("warnings", "Warnings"): any(doubted.values()),
        ("curves", "Curves"): norms,
        ("attacks", "Every attack"): norms,
        ("adversarials", "Adversarials"): pictures,
        ("distal", "Distal images"): distal_figures,
        ("certificates", "Certificates"): certificates,
        ("wins", "Wins"): norms,
        ("cost", "Cost"): norms,
        ("method", "Method"): summary.models,
    }
    counts = [len(model.clean) + model.unanswered for model in summary.models]
    data = f"{summary.facts.get('data', 'data')}, {summary.facts.get('split', '')} split"
    total, attacked = len(summary.models), f"attacked in {_listed_norms(norms)}" if norms else "not attacked"
    lead = f"{total} model{'s' * (total != 1)}, {_range(counts)} images each of {data}, {attacked}."
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("absynth.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title="Evaluation report",
        lead=lead if summary.models else "Distal images alone: nothing was attacked.",
        contents=[section for section, content in sections.items() if content],
        cell=cell_html,
        norms=[{"title": NORM_TITLES[norm]} for norm in norms],
        thresholds=", ".join(f"{NORM_TITLES[norm]} {THRESHOLDS[norm]:g}" for norm in norms),
        overview=[overview(model, norms) for model in summary.models],
        **doubted,
        curves=[_curves(summary, norm) for norm in norms],
        tables=[attack_table(summary, norm) for norm in norms],
        pictures=pictures,
        distal=distal_figures,
        certificates=certificates,
        wins=wins(summary, norms),
        cost=cost(summary, norms),
        digests=[(figures.title(model), model.digest) for model in summary.models],
        facts=[(key.replace("_", " "), value) for key, value in summary.facts.items()],
        parameters=list((parameters or {}).items()),
        paper=f"Published figures: {paper.source()}." if beside_paper(summary) else "",
        version=__version__,
    )


def render_csv(summary: Summary) -> str:
    """One line a model, norm and attack (``all`` for all together), raw numbers; accuracies are shares. Then its union
    and its certificates, a line a norm and method."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for model in summary.models:
        for line in (*_csv_attacks(model), *_csv_union(model), *_csv_certificates(model)):
            writer.writerow({"model": model.name, **line})
    return stream.getvalue()


def _csv_attacks(model: ModelSummary) -> Iterator[dict[str, Any]]:
    for norm, found in model.norms.items():
        for attack, cell in (("all", found.all), *found.attacks.items()):
            line = {"norm": norm, "attack": attack, "images": cell.images, "errors": cell.errors, "wins": cell.wins}
            line |= {"median": cell.median, "threshold": cell.threshold, "accuracy": cell.accuracy}
            line |= {"forward": cell.forward, "backward": cell.backward, "seconds": cell.seconds}
            line |= _ends("median", cell.median_interval) | _ends("accuracy", cell.accuracy_interval)
            published = paper.published(model.paper_name, norm, None if attack == "all" else attack)
            if published is not None:
                line |= {"paper_median": published.median, "paper_accuracy": published.accuracy}
            yield {**line, "uneven": int(found.uneven)} if attack == "all" else line


def _csv_union(model: ModelSummary) -> Iterator[dict[str, Any]]:
    if model.union is not None:
        alive, count = sum(model.union.values()), len(model.union)
        line = {"norm": "union", "attack": "all", "images": count, "errors": model.union_errors}
        line |= {"accuracy": alive / count if count else math.nan, "uneven": int(model.union_uneven)}
        yield line | _ends("accuracy", wilson_interval(alive, count))


def _csv_certificates(model: ModelSummary) -> Iterator[dict[str, Any]]:
    for (norm, method, kind), radii in certified_radii(model).items():
        certified, count = certified_at(norm, radii), len(radii)
        line = {"norm": norm, "certificate": method, "kind": kind, "images": count, "mean_radius": sum(radii) / count}
        line |= {"median": median(radii), "threshold": THRESHOLDS[norm], "accuracy": certified / count}
        yield line | _ends("median", median_interval(radii)) | _ends("accuracy", wilson_interval(certified, count))


def _ends(name: str, interval: Interval) -> dict[str, Any]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def render_markdown(summary: Summary, distal: Sequence[Mapping[str, Distal]] = ()) -> str:
    """The tables as Markdown: median / accuracy with 95 % intervals, the paper's figures in brackets."""
    lines = ["# Evaluation report"]
    lines += _markdown_attacks(summary) if summary.models else ["", "Distal images alone: nothing was attacked."]
    for found in distal:
        head = ["model", "class", "over 90 %", "probability", "steps"]
        rows = [[figures.display_name(name), *_distal_cells(one)] for name, one in found.items()]
        lines += ["", "## Distal images", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def _distal_cells(one: Distal) -> list[str]:
    return [
        ", ".join(map(str, one.targets.unique().tolist())),
        f"{int((one.confidences > 0.9).sum())} of {len(one.confidences)}",
        _span([f"{value:.3f}" for value in one.confidences.sort().values.tolist()]),
        _span([str(value) for value in one.steps.sort().values.tolist()]),
    ]


def _span(ordered: Sequence[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]}–{ordered[-1]}"


def _markdown_attacks(summary: Summary) -> list[str]:
    norms = norms_of(summary)
    lines = [""]
    head = ["model", "images", "clean accuracy", *(NORM_TITLES[norm] for norm in norms), "union"]
    rows = []
    for model in summary.models:
        view = overview(model, norms)
        cells = [view["clean"], *view["norms"], view["union"]]
        rows.append([view["model"], str(view["images"]), *(cell_text(cell) for cell in cells)])
    lines += markdown_table(head, rows)
    lines += (
        []
        if not norms
        else [
            "",
            "Median distance · accuracy at the threshold; 95 % intervals in parentheses"
            + ("; the paper's figures in brackets." if beside_paper(summary) else "."),
        ]
    )
    for norm in norms:
        table = attack_table(summary, norm)
        lines += ["", f"## {table['title']}", ""]
        body = [[row["attack"], *(cell_text(cell) for cell in row["cells"])] for row in table["rows"]]
        lines += markdown_table(["attack", *table["models"]], body)
    doubted = _warnings(summary)
    if any(doubted.values()):
        lines += ["", "## Warnings", *[""] * bool(doubted["warnings"])]
        lines += [
            f"- {name}, {doubt.subject}: {doubt.message}" for name, found in doubted["warnings"] for doubt in found
        ]
        lines += ["", doubted["no_warning"]] if doubted["no_warning"] else []
        unasked = f"Not looked for: {doubted['unasked']}. `absynth evaluate` looks for them."
        lines += ["", unasked] if doubted["unasked"] else []
    if certificates := list(certificate_rows(summary)):
        head = ["model", "norm", "method", "kind", "images", "mean radius", "median radius"]
        body = [list(map(str, row.values())) for row in certificates]
        lines += ["", "## Certificates", ""]
        lines += markdown_table([*head, "accuracy certified at the threshold"], body)
    return lines


def _warnings(summary: Summary) -> dict[str, Any]:
    """What stands under "Warnings": doubts by model, what was looked for where there is none, and what was not."""
    warnings = [(figures.title(model), model.doubts) for model in summary.models if model.doubts]
    tried = [kind for kind in KINDS if any(kind in model.probes for model in summary.models)]
    return {
        "warnings": warnings,
        "no_warning": _no_warning(tried, norms_of(summary)) if tried and not warnings else "",
        "unasked": ", ".join(_unasked(model) for model in summary.models if model.unprobed),
    }


def _no_warning(tried: Sequence[str], norms: Sequence[str]) -> str:
    """It is about what was tried, no more."""
    kinds = _listed([name for kind in tried for name in KINDS[kind]])
    attacks = f", attacks in {_listed_norms(norms)}" if norms else ""
    others = " What other attacks would find they do not say." if norms else ""
    return f"None of what was tried{attacks}: {kinds} gave no reason to mistrust the numbers.{others}"


def _unasked(model: ModelSummary) -> str:
    """An attacked model that the evaluation did not put its questions to, and which, where it put some."""
    if not model.probes:
        return figures.title(model)
    kinds = []
    for kind, attacks in model.unprobed.items():
        named = [*attacks[:NAMED], *([f"{len(attacks) - NAMED} more"] if len(attacks) > NAMED else [])]
        kinds.append(_listed(KINDS[kind]) + (f" of {_listed(named)}" if named else ""))
    return f"{figures.title(model)} ({'; '.join(kinds)})"


# Figures


def _curves(summary: Summary, norm: str) -> dict[str, Any]:
    figure = figures.accuracy_curves(summary.models, norm)
    svg = figures.to_svg(figure, f"accuracy against {NORM_TITLES[norm]} distance")
    dashed = " Dashed: the paper's curves." if beside_paper(summary) else ""
    caption = f"{NORM_TITLES[norm]}, all attacks.{dashed} Vertical line: {THRESHOLDS[norm]:g}."
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
    places = {name: place for place, name in enumerate(paper.NAMES)}
    models = sorted(summary.models, key=lambda model: (places.get(model.stored_name, len(places)), model.name))
    return Summary(tuple(models), summary.facts)


def _holds_answers(folder: str | Path) -> bool:
    """Whether there is an evaluation in or right below ``folder`` that a model has answered in."""
    if not holds_evaluation(folder):
        return False
    for place in ledger_folders([folder]):
        with Ledger(place) as ledger:
            if any(ledger.clean(record.digest) or ledger.keys(record.digest) for record in ledger.models()):
                return True
    return False


def _images(summary: Summary) -> tuple[dict[int, tuple[Tensor, int]], dict[str, str]]:
    """Clean images by index, and attacks by name."""
    images: dict[int, tuple[Tensor, int]] = {}
    parameters: dict[str, list[str]] = {}  # several where an attack was refined for some of the models
    for folder in sorted({model.folder for model in summary.models}):
        with Ledger(folder) as ledger:
            images.update(ledger.images())
            for record in ledger.attacks().values():
                given = parameters.setdefault(record.name, [])
                if record.attack not in given:
                    given.append(record.attack)
    return images, {name: "; ".join(given) for name, given in sorted(parameters.items())}


def _distal(folders: Sequence[str | Path], runs: Sequence[str | Path]) -> list[Mapping[str, Distal]]:
    """The distal images in ``folders``, and right below those that are ``runs``."""
    places = dict.fromkeys([Path(folder) for folder in folders] + ledger_folders(runs))
    return [found for place in places if (found := load_distal(place))]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _listed_norms(norms: Sequence[str]) -> str:
    return _listed([NORM_TITLES[norm] for norm in norms])


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
