"""What is at hand: data sets, and models with their weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from absynth import data, idx, weight_files, zoo
from absynth.errors import InputError, unknown_name


@dataclass(frozen=True)
class Split:
    """One split of a data set: ``shape`` (C,S,S) of an image, ``digest`` as ``absynth.data.digest`` gives it."""

    split: str
    images: int
    shape: tuple[int, ...]
    classes: int
    digest: str
    where: str


@dataclass(frozen=True)
class Dataset:
    """A data set: its splits that are at hand, and in ``problem`` why any is not, with the fix; None if all are."""

    name: str
    splits: tuple[Split, ...]
    problem: str | None


@dataclass(frozen=True)
class Model:
    """A model of the zoo, from the header of its weight file.

    ``parameters``: trained numbers that its answer needs (for ABS the decoders'). ``problem``: why it cannot be loaded,
    with the fix; None if it can. Everything a header says is None for a model without a weight file.
    """

    name: str
    description: str
    file: str | None = None
    parameters: int | None = None
    digest: str | None = None
    clean_accuracy: float | None = None
    data: str | None = None
    seed: int | None = None
    problem: str | None = None


def describe_dataset(name: str, *, root: str | Path | None = None, download: bool = False) -> Dataset:
    """A data set's splits. One that is not at hand is fetched with ``download``, otherwise named in ``problem``.

    Raises InputError for an unknown name and, with ``download``, if the data cannot be fetched. Damaged files are a
    ``problem``.
    """
    if name not in data.NAMES and not Path(name).expanduser().is_dir():
        data.class_names(name)  # raises the error that names the nearest data sets
    splits: list[Split] = []
    problems = []
    for split in data.SPLITS:
        try:
            if not download and not data.at_hand(name, split, root):
                problems.append(f"{split} is not at hand: fetch it with 'absynth data {name} --download'")
                continue
            images, labels = data.load(name, split, root)
        except InputError as error:
            if download:
                raise
            problems.append(str(error))
            continue
        where = _place(name, split, root)
        classes = int(labels.max()) + 1
        splits.append(Split(split, len(images), tuple(images.shape[1:]), classes, data.digest(images, labels), where))
    if len(problems) == len(data.SPLITS) and len({text.split(" ", 1)[1] for text in problems}) == 1:
        problems = [problems[0].split(" ", 1)[1] if problems[0].startswith("train is") else problems[0]]
    return Dataset(name, tuple(splits), "; ".join(problems) or None)


def _place(name: str, split: str, root: str | Path | None) -> str:
    if name == "digits":
        return "inside scikit-learn"
    if name not in idx.SOURCES:
        return str(Path(name).expanduser())
    found = idx.find(name, idx.FILES[split][0], None if root is None else Path(root).expanduser())
    return str(found[0].parent) if found else "–"


def describe_model(name: str, *, folder: str | Path | None = None, root: str | Path | None = None) -> Model:
    """The model called ``name``, with weights from ``folder`` (default: shipped). Raises InputError if unknown."""
    path = zoo.path_of(name, folder)
    description = zoo.DESCRIPTIONS[name]
    if name == "nearest-neighbor" and folder is None and not path.exists():
        try:
            at_hand = data.at_hand("mnist", "train", root)
            problem = None if at_hand else "needs MNIST's training images: run 'absynth data mnist --download'"
        except InputError as error:  # damaged
            problem = str(error)
        return Model(name, description, parameters=0, data="mnist", problem=problem)
    if folder is None and not path.exists():
        return Model(name, description, problem="not shipped; train with 'absynth train NAME --out weights'")
    if not path.exists():  # the same words for all models: a folder with two of them is told in one line of the rest
        return Model(
            name, description, problem=f"no weight file in {folder}: train it with 'absynth train NAME --out {folder}'"
        )
    try:
        file = weight_files.read(path)
        parameters = count_parameters(file)
        if name == "binary-abs":
            parameters += count_parameters(weight_files.read(path.with_name("abs.safetensors")))
    except InputError as error:
        return Model(name, description, problem=str(error))
    header = file.header
    return Model(
        name,
        description,
        file=str(path),
        parameters=parameters,
        digest=file.digest,
        clean_accuracy=header.get("accuracy"),
        data=header.get("data"),
        seed=header.get("seed"),
    )


def problems(models: Iterable[Model]) -> list[str]:
    """Why models cannot be used, a line for each reason, with the names it holds for."""
    names: dict[str, list[str]] = {}
    for one in models:
        if one.problem is not None:
            names.setdefault(one.problem, []).append(one.name)
    return [f"{', '.join(those)}: {problem}" for problem, those in names.items()]


def count_parameters(file: weight_files.WeightFile) -> int:
    """Trained numbers in a weight file: weights and biases of layers, factors on the energies, prototypes' latents."""
    return sum(
        tensor.numel()
        for name, tensor in file.tensors.items()
        if name.rsplit(".", 1)[-1] in ("weight", "bias", "scales", "latents")
    )


def check_trainable(name: str, out: str | Path) -> None:
    """Raise InputError, before an hour is spent, for a model that is none and a folder that cannot be written."""
    if name not in zoo.DESCRIPTIONS:
        raise unknown_name("model", name, zoo.DESCRIPTIONS)
    check_writable(out)


def check_writable(folder: str | Path) -> None:
    """Make ``folder`` where it is missing; raise InputError if that fails or nothing can be written into it."""
    folder = Path(folder)
    probe = folder / f".absynth-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}; choose a writable folder") from error


def label_names(trained_on: str, classes: int) -> tuple[str, ...]:
    """What the labels of a model trained on this data set stand for; numbers if the data set does not say."""
    try:
        names = data.class_names(trained_on)
    except InputError:  # a folder of pictures that is no longer there
        names = ()
    return names if len(names) == classes else tuple(str(number) for number in range(classes))
