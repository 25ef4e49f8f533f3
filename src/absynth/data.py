"""Data sets by name, as float32 images (N, 1, 28, 28) in [0, 1] and int64 labels (N,)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from absynth import idx, pictures
from absynth.errors import InputError, unknown_name
from absynth.idx import DataUnavailable
from absynth.pictures import load_picture

__all__ = [
    "NAMES",
    "SPLITS",
    "DataUnavailable",
    "at_hand",
    "class_names",
    "digest",
    "holdout",
    "load",
    "load_folder",
    "load_picture",
]

NAMES = (*idx.SOURCES, "digits")
SPLITS = ("train", "test")
DIGITS_TRAIN = 1_297  # of the 1,797 embedded digits, in their published order; the last 500 are the test split

_DECIMALS = tuple("0123456789")
_CLASS_NAMES = {
    "mnist": _DECIMALS,
    "digits": _DECIMALS,
    "fashion-mnist": (
        *("T-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}


def load(name: str | Path, split: str, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """The images, float32 (N, 1, 28, 28) in [0, 1], and labels, int64 (N,), of one split of a data set.

    ``name`` is one of

    * ``mnist``, ``fashion-mnist``, ``kmnist``: IDX files, gzipped or not, looked for in ``root``, then the folder
      ABSYNTH_DATA, in each also in a subfolder named as the data set, then in the user's cache folder; what is not
      found is downloaded into the cache from the published mirrors. Checked against the published SHA-256 (the
      unpacked files of ``fashion-mnist`` and ``kmnist`` have none: their structure is checked).
    * ``digits``: the 1,797 handwritten digits of 8×8 pixels inside scikit-learn (UCI optical recognition of
      handwritten digits), enlarged to 20×20 and centered by mass in 28×28 as MNIST's are. The first 1,297 are the
      training split, the last 500 the test split. Needs no network.
    * the path of a folder of pictures with one subfolder a class (see ``load_folder``), or with the subfolders
      ``train`` and ``test``, each of that form. Without these two, every fifth of each class is the test split, drawn
      with a fixed seed.

    ``split`` is ``train`` or ``test``.

    Raises InputError for an unknown name or split and for damaged files; DataUnavailable, an InputError, if the
    data are neither at hand nor can be downloaded.
    """
    if not isinstance(name, str | Path):
        raise unknown_name("data set", name, NAMES)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if name == "digits":
        return _digits(split)
    if name in idx.SOURCES:
        images, labels = idx.read_split(str(name), split, None if root is None else Path(root).expanduser())
        # (N,28,28) bytes -> (N,1,28,28) floats
        return torch.tensor(images, dtype=torch.float32)[:, None].div_(255), torch.tensor(labels, dtype=torch.int64)
    return _folder_split(_folder(name), split)


def at_hand(name: str, split: str = "test", root: str | Path | None = None) -> bool:
    """Whether ``load`` needs no download for this data set."""
    if name not in idx.SOURCES:
        return name == "digits" or Path(name).expanduser().is_dir()
    folder = None if root is None else Path(root).expanduser()
    return all(idx.find(name, file, folder) is not None for file in idx.FILES[split])


def class_names(name: str | Path) -> tuple[str, ...]:
    """What the labels 0, 1, ... of a data set stand for; for a folder, its subfolders' names in order."""
    if name in NAMES:
        return _CLASS_NAMES[str(name)]
    folder = _folder(name)
    return tuple(sub.name for sub in _class_folders(folder / "train" if _is_split(folder) else folder))


def load_folder(path: str | Path, image_size: int = 28) -> tuple[Tensor, Tensor]:
    """The pictures in a folder with one subfolder a class: float32 (N, 1, S, S) in [0, 1] and int64 labels (N,).

    Label i is the i-th subfolder in order of names, of numbers where all names are numbers. Every picture is brought
    to MNIST's form by ``load_picture``. Names that begin with a dot are left out, and what Windows adds (Thumbs.db).

    Raises InputError if there is no such folder, if it has fewer than two classes or a class without pictures, and
    if a file in it is not a picture.
    """
    images, labels = [], []
    for label, folder in enumerate(_class_folders(Path(path).expanduser())):
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and not _is_added(file)]
        if not files:
            raise InputError(f"the class folder {folder} has no pictures: add some, or remove the folder")
        images += [_picture_of_class(file, image_size) for file in files]
        labels += [label] * len(files)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _is_added(file: Path) -> bool:
    """Whether a file is one that systems put beside pictures by themselves."""
    return file.name.startswith(".") or file.name.lower() in ("thumbs.db", "desktop.ini")


def _picture_of_class(file: Path, image_size: int) -> Tensor:
    """A picture in a class folder, where a file that is none has no business."""
    try:
        return load_picture(file, image_size)
    except InputError as error:
        raise InputError(f"{error}; a class folder takes pictures alone: remove this file or convert it") from error


def digest(*tensors: Tensor) -> str:
    """SHA-256, in hexadecimal, of the shapes, types and values of the tensors: names the data of a training."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def holdout(
    images: Tensor, labels: Tensor, size: int, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Set ``size`` images aside: ((training images, labels), (held-out images, labels)), both in the original order.

    The held-out part has equally many of each class (one more of the first classes where ``size`` is no multiple of
    their number), drawn with ``seed``: the same call gives the same parts. Every choice about a model is made on it,
    never on the test split. Raises InputError if a class is too small to leave a training image.
    """
    classes, members = labels.unique(return_counts=True)
    if size < 1:
        raise InputError(f"the held-out size is {size}, expected at least 1")
    share = [size // len(classes) + (rank < size % len(classes)) for rank in range(len(classes))]
    for label, count, wanted in zip(classes.tolist(), members.tolist(), share, strict=True):
        if wanted >= count:
            raise InputError(
                f"cannot hold out {size} images: {wanted} would be taken of the {count} of class {label}; choose fewer"
            )
    return _set_aside(images, labels, share, seed)


def _set_aside(
    images: Tensor, labels: Tensor, share: list[int], seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split off ``share[i]`` images, drawn with ``seed``, of the i-th class that occurs."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in zip(labels.unique().tolist(), share, strict=True):
        members = (labels.cpu() == label).nonzero()[:, 0]
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    held = held.to(labels.device)
    return (images[~held], labels[~held]), (images[held], labels[held])


def _digits(split: str) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here: it takes a second to import, and only this data set needs it

    bunch = load_digits()
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    small = torch.tensor(bunch.images[part], dtype=torch.float32)[:, None] / 16  # (N,1,8,8)
    enlarged = F.interpolate(small, (20, 20), mode="bilinear", align_corners=False)
    images = torch.stack([pictures.center(ink) for ink in enlarged[:, 0]])[:, None]  # (N,1,28,28)
    return images, torch.tensor(bunch.target[part], dtype=torch.int64)


def _folder(name: str | Path) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name, str) and os.sep not in name:
        raise unknown_name("data set", name, NAMES)
    raise InputError(
        f"no folder at {name}: give one with a subfolder of pictures a class, or one of {', '.join(NAMES)}"
    )


def _is_split(folder: Path) -> bool:
    return all((folder / split).is_dir() for split in SPLITS)


def _folder_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    if _is_split(folder):
        train, test = ([sub.name for sub in _class_folders(folder / part)] for part in SPLITS)
        if train != test:
            raise InputError(f"{folder}: train has the classes {train}, test has {test}; they must be the same")
        return load_folder(folder / split)
    images, labels = load_folder(folder)
    counts = labels.bincount()
    if int(counts.min()) < 2:
        small = _class_folders(folder)[int(counts.argmin())]
        raise InputError(
            f"the class folder {small} has one picture, expected at least 2 to train and to test: add some"
        )
    share = [max(1, count // 5) for count in counts.tolist()]
    train_part, test_part = _set_aside(images, labels, share, seed=0)
    return train_part if split == "train" else test_part


def _class_folders(folder: Path) -> list[Path]:
    """The subfolders, one a class, in order of label."""
    if not folder.is_dir():
        raise InputError(f"no folder at {folder}: give one with a subfolder of pictures a class")
    folders = [sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
    if len(folders) < 2:
        found = "none" if not folders else f"only {folders[0].name}"
        raise InputError(f"{folder} needs a subfolder of pictures for each of at least 2 classes, has {found}")
    numbers = all(sub.name.isdecimal() for sub in folders)
    return sorted(folders, key=lambda sub: (int(sub.name) if numbers else 0, sub.name))
