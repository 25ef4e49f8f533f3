"""The commands about what there is: ``data``, ``models``, and ``train``, which makes more of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from absynth.cli.options import Device, Json, Root, Weights
from absynth.cli.output import emit, kept, note, percent, progress, table
from absynth.errors import InputError


def data(
    name: Annotated[
        str | None, typer.Argument(help="mnist, fashion-mnist, kmnist, digits, or a folder of pictures. Default: all.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not at hand.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Which data sets are at hand, where, with how many images."""
    from absynth import data as datasets
    from absynth.inventory import describe_dataset

    if name is None and download:
        raise InputError(
            f"name the data set to download: absynth data NAME --download, one of {', '.join(datasets.NAMES)}"
        )
    found = [describe_dataset(one, root=root, download=download) for one in ([name] if name else datasets.NAMES)]
    if json:
        emit({"datasets": {one.name: asdict(one) for one in found}})
        return
    rows = []
    for one in found:
        for part in one.splits:
            shape = "×".join(str(size) for size in part.shape)
            rows.append(
                (one.name, part.split, f"{part.images:,}", shape, str(part.classes), part.digest[:12], part.where)
            )
        if one.problem:
            rows.append((one.name, "–", "–", "–", "–", "–", one.problem))
    table(("data set", "split", "images", "shape", "classes", "digest", "where"), rows, right=("images", "classes"))


def models(weights: Weights = None, root: Root = None, json: Json = False) -> None:
    """The models: parameters, digest, clean accuracy."""
    from absynth import zoo
    from absynth.inventory import describe_model, problems

    found = [describe_model(name, folder=weights, root=root) for name in zoo.names()]
    if json:
        emit({"models": {one.name: asdict(one) for one in found}})
        return
    rows = [
        (
            one.name,
            f"{one.parameters:,}" if one.parameters is not None else "–",
            (one.digest or "–")[:12],
            percent(one.clean_accuracy),
            one.data or "–",
            one.description,
        )
        for one in found
    ]
    table(("model", "parameters", "digest", "clean", "data", ""), rows, right=("parameters", "clean"))
    for line in problems(found):
        note(line)


def train(
    name: Annotated[str, typer.Argument(help="The model: see 'absynth models'.")],
    data: Annotated[str, typer.Option(help="Data set, or a folder of pictures with one subfolder a class.")] = "mnist",
    out: Annotated[Path, typer.Option(help="Folder for the weight file.")] = Path("weights"),
    seed: Annotated[int, typer.Option(help="Seed of all randomness.")] = 0,
    effort: Annotated[
        float,
        typer.Option(help="Factor on the training steps; 1: as shipped, but abs: a quarter of an hour, 3: as shipped."),
    ] = 1.0,
    device: Device = "cpu",
    root: Root = None,
    json: Json = False,
) -> None:
    """Train a model.

    Stopped at any moment, the same command continues."""
    from absynth.checks import check_seed
    from absynth.inventory import check_trainable
    from absynth.training.recipes import train as run
    from absynth.training.run import what_goes_on
    from absynth.weight_files import read

    check_seed(seed)
    check_trainable(name, out)
    if line := what_goes_on(name, out):
        note(line)
    with kept("what was trained is", out / f"{name}.training"), progress(f"training {name}") as report:
        path = run(name, data, out=out, seed=seed, root=root, effort=effort, progress=report, device=device)
    header = read(path).header
    if json:
        emit(
            {
                "file": str(path),
                "clean_accuracy": header["accuracy"],
                "digest": header["digest"],
                "data": header["data"],
            }
        )
        return
    print(f"{path}: {percent(header['accuracy'])} of the test images right, digest {header['digest'][:12]}")
