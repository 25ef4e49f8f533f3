"""Several models under attack, and all the evidence of the paper in one go."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absynth import data, zoo
from absynth.checks import check_seed, usable_device
from absynth.clean import load_any
from absynth.errors import InputError
from absynth.evaluation import (
    Certified,
    Distal,
    Progress,
    Summary,
    Verification,
    certify,
    distal,
    load_distal,
    model_digest,
    save_distal,
    summarize,
    verify,
)
from absynth.evaluation.certify import check_request
from absynth.evaluation.distal import FILE_NAME as DISTAL_FILE
from absynth.evaluation.distal import made_distal
from absynth.evaluation.files import FILE_NAME, begun
from absynth.evaluation.folders import holds_evaluation, holds_model, ledger_folders, rows_at_hand
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.reporting import Report, report
from absynth.evaluation.run import Executor, check_run, load_split, make_plan, prepare, run
from absynth.inventory import describe_model
from absynth.norms import listed

COSTLY = ("smoothed-cnn",)  # attacked only when asked for by name

SHARE = 1000  # steps of the progress that a model's attacks are

Told = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)


def at_hand(weights: str | Path | None = None, root: str | Path | None = None) -> tuple[list[str], dict[str, str]]:
    """The models that can be loaded, and why the others cannot, by name."""
    described = [describe_model(name, folder=weights, root=root) for name in zoo.names()]
    usable = [one.name for one in described if one.problem is None]
    return usable, {one.name: one.problem for one in described if one.problem is not None}


def what_is_kept(out: str | Path) -> str:
    """A line about the rows that a run folder holds already; empty where there are none."""
    count = rows_at_hand(out)
    again = "what has one is not attacked again, and the table is of all of them"
    return f"{out} holds {count:,} rows already: {again}" if count else ""


def evaluate_models(
    models: Sequence[str],
    dataset: str | Path = "mnist",
    *,
    suite: str = "quick",
    norms: Sequence[str] = ("l0", "l2", "linf"),
    images: int = 100,
    out: str | Path = "runs/evaluation",
    seed: int = 0,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Told | None = None,
    cluster: str | None = None,
    probe: bool = True,
    device: str | torch.device = "cpu",
) -> Summary:
    """Attack each model (as ``absynth.clean.load_any`` takes them) into a run folder of its own below ``out``.

    What can be wrong with any of them is found before the first is attacked. Called again, it goes on where it was
    interrupted. ``cluster`` is the address of a Ray cluster that computes the batches, see
    ``absynth.distributed.connect``; without one they are computed on ``device``. Arguments and errors as for
    ``absynth.evaluation.evaluate``; besides, InputError for two models of one folder, and for an ``out`` with runs on
    another data set.
    """
    place = usable_device(device)
    check_seed(seed)
    classifiers = {name: load_any(name, weights=weights, root=root).to(place) for name in models}
    folders = _run_folders(out, classifiers)
    pictures, labels, *_ = loaded = load_split(dataset, "test", root)
    _check_data(out, loaded)
    plans = {name: make_plan(one, name, loaded, suite, norms, images, seed) for name, one in classifiers.items()}
    for name, plan in plans.items():
        if begun(folders[name] / FILE_NAME):
            with Ledger(folders[name]) as ledger:
                check_run(plan, ledger)
    with _executors(cluster, models, weights, root) as executors:
        # the clean answers tell what else does not fit; those of a single model come first anyway
        for name, plan in plans.items() if len(plans) > 1 else ():
            with Ledger(folders[name], write=True) as ledger:
                check_run(plan, ledger)
                prepare(plan, classifiers[name], pictures, labels, ledger)
        for number, (name, plan) in enumerate(plans.items()):

            def tell(at: Progress, name: str = name, number: int = number) -> None:
                if progress is not None:  # models have different numbers of attacks: each is an equal share
                    done = number + at.done / at.total
                    progress(round(SHARE * done), SHARE * len(plans), f"{name}, {at.attack}")

            with Ledger(folders[name], write=True) as ledger:
                run(
                    plan, classifiers[name], pictures, labels, ledger, progress=tell, probe=probe,
                    executor=executors(name),
                )  # fmt: skip
    return summarize(out)


def _run_folders(out: str | Path, models: Mapping[str, nn.Module]) -> dict[str, Path]:
    """The run folder of each model. Raises InputError where two that are not in one ledger have the same."""
    taken: dict[Path, str] = {}
    folders = {name: run_folder(out, name, classifier) for name, classifier in models.items()}
    for name, folder in folders.items():
        if folder in taken and folder != Path(out):
            raise InputError(
                f"the models {taken[folder]} and {name} would both go into {folder}: evaluate one of them into another "
                "output folder"
            )
        taken[folder] = name
    return folders


def _check_data(out: str | Path, loaded: tuple[Tensor, Tensor, str, str]) -> None:
    """Raise InputError where runs in or below ``out`` are on other images and labels: one report tells of them all."""
    pictures, labels, name, _ = loaded
    digest = data.digest(pictures, labels)
    for folder in ledger_folders([out]) if holds_evaluation(out) else ():
        with Ledger(folder) as ledger:
            facts = ledger.facts()
        if facts.get("data_digest", digest) != digest:
            known = facts.get("data", "unknown")
            given = f"data {name!r}" if known != name else "other images of that name"
            raise InputError(
                f"{folder} holds an evaluation with data {known!r}, this one has {given}: give another output folder"
            )


@contextmanager
def _executors(
    cluster: str | None, models: Sequence[str], weights: str | Path | None, root: str | Path | None
) -> Iterator[Callable[[str], Executor | None]]:
    """What computes the batches of each model by name: this process where ``cluster`` is None."""
    if cluster is None:
        yield lambda name: None
        return
    from absynth import distributed  # here: nothing else needs Ray

    with distributed.connect(cluster, models=models) as connected:
        yield lambda name: connected.executor(name, weights=weights, root=root)


def certify_model(
    model: str,
    dataset: str | Path = "mnist",
    *,
    norms: Sequence[str] = ("l0", "l1", "l2", "linf"),
    images: int = 1000,
    out: str | Path = "runs/certificates",
    radius: float | None = None,
    estimates: bool = False,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Told | None = None,
) -> dict[str, Certified]:
    """``absynth.evaluation.certify`` for a model by name, in the folder that its attacks go into.

    Raises InputError for a ``radius`` that would stand for several norms: 1.5 is a little in L1 and all in L-infinity.
    """
    norms = listed(*norms)
    check_request(norms, radius)  # before the model is loaded, which takes seconds
    if radius is not None and len(set(norms)) > 1:
        raise InputError(
            f"radius is {radius:g} for {', '.join(norms)} alike, which measure different things: give --norm with "
            "--radius, one of them"
        )
    _check_data(out, load_split(dataset, "test", root))
    classifier = load_any(model, weights=weights, root=root)
    return certify(
        classifier, dataset, norms=norms, images=images, out=run_folder(out, model, classifier), radius=radius,
        estimates=estimates, name=model, root=root, progress=progress,
    )  # fmt: skip


def run_folder(out: str | Path, model: str, classifier: nn.Module) -> Path:
    """Where the evaluation of a model is kept: below ``out``, or there itself where its ledger has the model, as one
    that runs were merged into does."""
    stem = Path(model).stem if model.endswith(".safetensors") else model
    below = Path(out) / re.sub(r"[^\w.-]+", "-", stem)
    if not begun(below / FILE_NAME) and holds_model(out, model_digest(classifier)):
        return Path(out)
    return below


def verify_runs(
    *folders: str | Path,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """``absynth.evaluation.verify`` with the models taken from the folder ``weights``, or shipped where those there are
    not what was evaluated; the data set from ``root``."""
    wanted: dict[str, set[str]] = {}  # digests by name
    for folder in ledger_folders(folders):
        with Ledger(folder) as ledger:
            for record in ledger.models():
                wanted.setdefault(record.name, set()).add(record.digest)
    classifiers: dict[str, nn.Module] = {}
    for name, digests in sorted(wanted.items()):
        for place in dict.fromkeys((weights, None)):  # a ledger may have models of one name with the weights of both
            try:
                classifier = load_any(name, weights=place, root=root)
            except InputError:
                continue  # `verify` says which models are missing
            classifiers.setdefault(name, classifier)
            classifiers[model_digest(classifier)] = classifier
            if digests <= classifiers.keys():
                break
    return verify(*folders, models=classifiers, progress=progress, root=root)


def distal_images(
    models: Sequence[str],
    out: str | Path,
    *,
    dataset: str | Path = "mnist",
    target: int = 1,
    count: int = 5,
    steps: int = 10_000,
    seed: int = 0,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Told | None = None,
    device: str | torch.device = "cpu",
    unfit: Callable[[InputError], None] | None = None,
) -> dict[str, Distal]:
    """What each model calls class ``target`` with over 90 % although it began as noise; written into ``out``.

    Written after each model, so that the same call goes on after the last one that was finished. What is there of other
    models stays. Raises InputError, before anything is computed, where ``out`` holds images that were made another way,
    and for a model that none can be made for: it has no gradient, for one. ``unfit`` is told of such a model instead,
    and the others go on.
    """
    place = usable_device(device)
    check_seed(seed)
    way = _way(dataset, root, target=target, count=count, steps=steps, seed=seed)
    classifiers = {name: load_any(name, weights=weights, root=root).to(place) for name in models}
    digests = {name: model_digest(one) for name, one in classifiers.items()}
    there = _made_alike(out, way, digests)
    todo = [name for name in classifiers if name not in there]
    for number, name in enumerate(todo):
        reached = 0

        def tell(done: int, name: str = name, number: int = number) -> None:
            nonlocal reached
            reached = done
            if progress is not None:  # of all models: each is an equal share
                progress(number * steps + done, len(todo) * steps, name)

        try:
            one = distal(
                classifiers[name], target, count=count, shape=way["shape"], steps=steps, seed=seed,
                progress=lambda done, _total, tell=tell: tell(done),  # type: ignore[misc]
            )  # fmt: skip
        except InputError as error:
            problem = InputError(f"{name}: {error}")
            if unfit is None:
                raise problem from error
            unfit(problem)
            continue
        if reached < steps:
            tell(steps)  # most images take far fewer
        there[name] = one, f"{digests[name]} {json.dumps(way)}"
        names = [*(name for name in models if name in there), *(name for name in there if name not in models)]
        save_distal(out, {name: there[name][0] for name in names}, {name: there[name][1] for name in names})
    return {name: there[name][0] for name in models if name in there}


def _way(dataset: str | Path, root: str | Path | None, **options: int) -> dict[str, Any]:
    """How distal images are made: the ``options``, and the ``shape`` [C,S,S] of a data set's images."""
    return {**options, "shape": list(data.load(dataset, "test", root)[0].shape[1:])}


def _made_alike(out: str | Path, way: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, tuple[Distal, str]]:
    """The distal images in ``out`` by model, each with its model's digest and how it was made.

    Raises InputError where any was made another ``way``, or of another model than the one of its name in ``digests``:
    what is there would be lost, or stand beside what it cannot be compared with.
    """
    made = made_distal(out)
    for name in load_distal(out):
        digest, _, how = made[name][1].partition(" ") if name in made else ("", "", "")
        wanted = digests.get(name, digest)
        other = f"of another model, digest {digest[:12]}, this one is {wanted[:12]}" if digest != wanted else ""
        if differs := _difference(how, way) or other:
            raise InputError(
                f"{out} holds distal images of {name} {differs}: give another output folder, or move "
                f"{Path(out) / DISTAL_FILE} away"
            )
    return made


def _difference(how: str, way: Mapping[str, Any]) -> str:
    """What differs between how images were made, JSON, and the ``way`` that is asked for; empty where nothing does."""
    try:
        known = dict(json.loads(how))
    except (ValueError, TypeError):
        return "that do not say how they were made"
    differing = [key for key, value in way.items() if known.get(key) != value]
    then, now = (", ".join(f"{key} {one.get(key)}" for key in differing) for one in (known, way))
    return f"with {then}, these would be with {now}" if differing else ""


def reproduce(
    models: Sequence[str],
    out: str | Path,
    *,
    dataset: str | Path = "mnist",
    images: int = 100,
    suite: str = "paper,strong",
    seed: int = 0,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    progress: Told | None = None,
    cluster: str | None = None,
    device: str | torch.device = "cpu",
    unfit: Callable[[InputError], None] | None = None,
) -> Report:
    """The paper's evidence: every model under the paper's attacks and the strong ones, distal images, the report.

    A model that no distal images can be made for is left out there; ``unfit`` is told of it.
    ``cluster`` is the address of a Ray cluster for the attacks, see ``absynth.distributed.connect``.
    """
    _made_alike(out, _way(dataset, root, target=1, count=5, steps=10_000, seed=seed), {})  # before days of attacks
    evaluate_models(
        models, dataset, suite=suite, images=images, out=out, seed=seed, weights=weights, root=root, progress=progress,
        cluster=cluster, device=device,
    )  # fmt: skip
    distal_images(
        models, out, dataset=dataset, seed=seed, weights=weights, root=root, progress=progress, device=device,
        unfit=unfit or (lambda _: None),
    )  # fmt: skip
    return report(out)
