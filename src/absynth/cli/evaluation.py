"""The commands that measure, attack and certify: ``evaluate``, ``attacks``, ``certify``, ``distal``, ``reproduce``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from absynth.cli.options import Cluster, Device, Json, Models, Root, Weights
from absynth.cli.output import emit, kept, note, percent, progress, table
from absynth.errors import InputError

if TYPE_CHECKING:
    from absynth.clean import Clean
    from absynth.evaluation import Distal, Summary

Data = Annotated[str, typer.Option(help="Data set, or a folder of pictures.")]
ROWS = "all finished rows are"  # what an interrupted run has kept
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]


def attacks(json: Json = False) -> None:
    """The attacks and suites, and what each needs."""
    from absynth.attacks.catalog import SUITES, information

    found = information()
    if json:
        emit({"attacks": [asdict(one) for one in found], "suites": {name: list(all) for name, all in SUITES.items()}})
        return
    rows = [
        (
            one.name,
            one.norm,
            one.kind,
            one.knowledge,
            "yes" if one.deterministic else "no",
            one.queries,
            " ".join(one.suites),
            one.source,
        )
        for one in found
    ]
    table(("attack", "norm", "finds", "needs", "deterministic", "queries", "suites", "source"), rows)


def evaluate(
    context: typer.Context,
    model: Models = None,
    attacks: Annotated[
        str, typer.Option("--attacks", "--suite", help="none, quick, paper, strong, or attacks separated by commas.")
    ] = "none",
    norms: Annotated[str, typer.Option(help="Norms to attack in.")] = "l0,l2,linf",
    images: Annotated[
        int | None, typer.Option(help="How many of the first test images. Default: 1000, under attack 100.")
    ] = None,
    data: Data = "mnist",
    out: Annotated[Path, typer.Option(help="Folder for the rows of an attack; the same command goes on there.")] = Path(
        "runs/evaluation"
    ),
    seed: Seed = 0,
    cluster: Cluster = None,
    device: Device = "cpu",
    weights: Weights = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Measure models, clean or under attack."""
    from absynth.norms import listed, parse

    wanted = listed(norms)
    for norm in wanted:
        parse(norm)  # before models are loaded, and where nothing is attacked too
    models = model or _at_hand(weights, root, cheap=attacks != "none")
    if attacks == "none":
        from absynth.clean import measure_models

        idle = [f"--{name}" for name in ("norms", "out", "seed", "cluster") if _is_given(context, name)]
        if idle:
            note(f"without attacks {', '.join(idle)} {'do' if idle[1:] else 'does'} nothing: --suite quick attacks")
        with progress("evaluating") as report:
            clean = measure_models(models, data, images, weights=weights, root=root, progress=report, device=device)
        if json:
            count = next(iter(clean.values())).images
            emit({"data": data, "images": count, "models": {name: asdict(one) for name, one in clean.items()}})
        else:
            _show_clean(clean)
        return
    from absynth.reproduction import evaluate_models, what_is_kept

    if line := what_is_kept(out):
        note(line)
    with kept(ROWS, out), progress("attacking") as report:
        summary = evaluate_models(
            models, data, suite=attacks, norms=wanted, images=100 if images is None else images, out=out, seed=seed,
            weights=weights, root=root, progress=report, cluster=cluster, device=device,
        )  # fmt: skip
    if json:
        emit(summary.to_json())
    else:
        show_attacked(summary)
        print(f"the rows are in {out}: absynth report {out}, absynth verify {out}")
    asked = [one for one in summary.models if one.stored_name in models]  # the folder may hold others, of earlier runs
    silent = [one.name for one in asked if one.norms and not any(n.all.images for n in one.norms.values())]
    if silent:
        raise InputError(
            f"{', '.join(silent)}: no image got an answer that counts; {out} says of each what was wrong: mend the "
            "model, and run again into another folder"
        )


def certify(
    model: Annotated[
        str,
        typer.Option(
            help="prototype-abs, saturating-prototype-abs, nearest-neighbor, a weight file, or package.module:factory."
        ),
    ] = "prototype-abs",
    norm: Annotated[
        list[str] | None, typer.Option("--norm", help="l0, l1, l2 or linf. Repeatable. Default: all four.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of the first test images.")] = 1000,
    radius: Annotated[
        float | None,
        typer.Option(help="Where to take the certified accuracy, in one --norm. Default: the paper's thresholds."),
    ] = None,
    estimates: Annotated[
        bool, typer.Option("--estimates", help="The paper's bounds of an ABS model instead: no guarantee.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on there.")] = Path("runs/certificates"),
    data: Data = "mnist",
    weights: Weights = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Prove radii within which no image gets another label."""
    from absynth.evaluation import certified_union
    from absynth.reproduction import certify_model

    with kept(ROWS, out), progress("certifying") as report:
        found = certify_model(
            model, data, norms=norm or ("l0", "l1", "l2", "linf"), images=images, out=out, radius=radius,
            estimates=estimates, weights=weights, root=root, progress=report,
        )  # fmt: skip
    union = certified_union(found)
    if json:
        cells = {name: one.to_json() for name, one in found.items()}
        # one norm, as a script asks for it: its figures at the top
        figures = next(iter(cells.values())) if len(cells) == 1 else {"norms": cells}
        emit({"model": model, **figures, **({} if union is None else {"union": union.to_json()})})
        return
    rows = [
        (
            name,
            percent(one.clean_accuracy),
            f"{one.radius:g}",
            f"{percent(one.certified_accuracy)} ({' – '.join(percent(bound, 1) for bound in one.interval)})",
            f"{one.mean_radius:.3f}",
            f"{one.median_radius:.3f}",
            str(one.images),
        )
        for name, one in found.items()
    ]
    if union is not None:
        at = " · ".join(f"{norm} {radius:g}" for norm, radius in union.balls.items())
        certified = f"{percent(union.certified_accuracy)} ({' – '.join(percent(b, 1) for b in union.interval)})"
        rows.append(("union", rows[0][1], at, certified, "", "", str(union.images)))
    share = "estimated there, no guarantee (95 %)" if estimates else "certified there (95 %)"
    columns = ("estimate" if estimates else "norm", "clean", "at", share, "mean radius", "median radius", "images")
    table(columns, rows, right=columns[1:])
    print(f"every radius is in {out}: absynth report {out}, absynth verify {out} (and the folder of the attacks)")


def distal(
    model: Models = None,
    target: Annotated[int, typer.Option(help="The class that the images are made to be called.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Images a model.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps at most.")] = 10_000,
    out: Annotated[Path, typer.Option(help="Run folder; the report shows the images.")] = Path("runs/evaluation"),
    data: Data = "mnist",
    seed: Seed = 0,
    device: Device = "cpu",
    weights: Weights = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Turn noise into what each model is sure of."""
    models = model or _at_hand(weights, root, cheap=True)
    from absynth.evaluation.distal import FILE_NAME
    from absynth.reproduction import distal_images

    unfit: list[InputError] = []
    with kept("the images of all finished models are", out / FILE_NAME), progress("distal images") as report:
        found = distal_images(
            models, out, dataset=data, target=target, count=count, steps=steps, seed=seed, weights=weights, root=root,
            progress=report, device=device, unfit=unfit.append,
        )  # fmt: skip
    if found:
        _show_distal(found, target, out, json)
    if unfit:
        raise InputError("; ".join(str(error) for error in unfit))


def _show_distal(found: dict[str, Distal], target: int, out: Path, json: bool) -> None:
    if json:
        emit(
            {
                "target": target,
                "models": {
                    name: {"confidences": one.confidences.tolist(), "steps": one.steps.tolist()}
                    for name, one in found.items()
                },
            }
        )
        return
    rows = [
        (
            name,
            f"{int((one.confidences > 0.9).sum())} of {len(one.confidences)}",
            " ".join(f"{value:.3f}" for value in one.confidences.tolist()),
            " ".join(str(step) for step in one.steps.tolist()),
        )
        for name, one in found.items()
    ]
    table(("model", "over 90 %", f"probability of {target}", "steps"), rows)
    print(f"the images are in {out}: absynth report {out}")


def reproduce(
    images: Annotated[int, typer.Option(min=1, help="How many of the first test images.")] = 100,
    model: Models = None,
    suite: Annotated[str, typer.Option(help="Suites or attacks, separated by commas.")] = "paper,strong",
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on there.")] = Path("runs/reproduce"),
    data: Data = "mnist",
    seed: Seed = 0,
    cluster: Cluster = None,
    device: Device = "cpu",
    weights: Weights = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """The paper's evidence: all models, all attacks, the report."""
    models = model or _at_hand(weights, root, cheap=True)
    from absynth.reproduction import reproduce as run
    from absynth.reproduction import what_is_kept

    if line := what_is_kept(out):
        note(line)
    with kept(ROWS, out), progress("reproducing") as report:
        files = run(
            models, out, dataset=data, images=images, suite=suite, seed=seed, weights=weights, root=root,
            progress=report, cluster=cluster, device=device,
            unfit=lambda error: note(f"warning: no distal images of {error}"),
        )  # fmt: skip
    if json:
        emit({key: str(path) for key, path in asdict(files).items()})
    else:
        print(f"{files.html}\n{files.csv}\n{files.markdown}")


def _at_hand(weights: Path | None, root: Path | None, *, cheap: bool) -> list[str]:
    """All models that can be loaded, if ``cheap`` without those an attack on takes days; the others are named on
    stderr."""
    from absynth.reproduction import COSTLY, at_hand

    found, problems = at_hand(weights, root)
    for name in COSTLY if cheap else ():
        if name in found:
            found.remove(name)
            problems[name] = f"it answers a hundred times for each question; --model {name} attacks it all the same"
    for problem in dict.fromkeys(problems.values()):
        note(f"left out {', '.join(name for name, one in problems.items() if one == problem)}: {problem}")
    if not found:
        raise InputError(
            "no model has weights here: run 'absynth train abs --out weights' and add the option --weights weights"
        )
    return found


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether the user has given an option, or its default value stands for it."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _show_clean(found: dict[str, Clean]) -> None:
    rows = [
        (
            name,
            percent(one.clean_accuracy),
            " – ".join(percent(bound) for bound in one.interval),
            f"{one.log_likelihood:.4f}",
            f"{one.median_confidence:.3f}",
            percent(one.refused),
            percent(one.right_and_accepted),
            _sparkline(one.confidence_histogram),
        )
        for name, one in found.items()
    ]
    columns = ("model", "clean", "95 % interval", "log p(label)", "median confidence", "refused", "right, not refused")
    table((*columns, "confidence 0 … 1"), rows, right=columns[1:])
    for name, one in found.items():
        for doubt in one.doubts:
            note(f"warning: {name}: {doubt}")


def show_attacked(summary: Summary) -> None:
    """A table of what the attacks left, and the doubts on stderr."""
    from absynth.evaluation.statistics import short

    rows = []
    for one in summary.models:
        for norm, cells in one.norms.items():
            together = {"all attacks": cells.all} if len(cells.attacks) > 1 else {}
            for attack, cell in {**cells.attacks, **together}.items():
                low, high = cell.accuracy_interval
                shown = f"{percent(cell.accuracy, 1)} ({percent(low, 0)} – {percent(high, 0)})"
                median, share = (short(cell.median), shown) if cell.images else ("error", "error")
                rows.append((one.name, norm, attack, median, f"{cell.threshold:g}", share, str(cell.images)))
    columns = ("model", "norm", "attack", "median distance", "threshold", "accuracy there", "images")
    table(columns, rows, right=columns[3:])
    for one in summary.models:
        for doubt in one.doubts:
            note(f"warning: {one.name}, {doubt.subject}: {doubt.message}")


def _sparkline(counts: tuple[int, ...]) -> str:
    """A histogram as a word of bars; every bin that is not empty shows."""
    highest = max(*counts, 1)
    return "".join(" " if not count else "▁▂▃▄▅▆▇█"[7 * count // highest] for count in counts)
