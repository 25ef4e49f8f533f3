"""The IDX files of MNIST and its relatives: where they are, what they must contain, how they are fetched.

IDX: two zero bytes, 8 (for unsigned bytes), the number of axes, their lengths as big-endian 32-bit
integers, the values.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import struct
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from absynth.errors import InputError

TIMEOUT = 30.0  # seconds without a byte before a mirror is given up
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class DataUnavailable(InputError):
    """The data set is not at hand and could not be downloaded."""


@dataclass(frozen=True)
class Source:
    """Where a data set is published and what identifies its files.

    ``sha256`` maps a file's name to its published checksum: of the gzip file where the name ends in ``.gz``, of the
    unpacked content otherwise.
    """

    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    count: Mapping[str, int] = field(default_factory=lambda: {"train": 60_000, "test": 10_000})


SOURCES: dict[str, Source] = {
    "mnist": Source(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion-mnist": Source(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "kmnist": Source(
        ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        {
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
    ),
}


def cache_folder(name: str) -> Path:
    """Where a downloaded data set is kept: in the user's cache folder (on Linux, XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("absynth", appauthor=False) / name


def read_split(name: str, split: str, root: Path | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images (N,28,28) and labels (N,) of one split as bytes, from disk or else downloaded."""
    count = SOURCES[name].count[split]
    image_file, label_file = FILES[split]
    image_path, image_bytes = find(name, image_file, root) or download(name, image_file)
    label_path, label_bytes = find(name, label_file, root) or download(name, label_file)
    images = parse(image_path, image_bytes, (count, 28, 28))
    labels = parse(label_path, label_bytes, (count,))
    if int(labels.max()) > 9:
        raise InputError(f"{label_path} holds the label {int(labels.max())}, expected 0 to 9: {_replace(label_path)}")
    return images, labels


def find(name: str, file: str, root: Path | None) -> tuple[Path, bytes] | None:
    """The path and unpacked content of ``file`` where ``name`` has it on disk, checked; None where it does not.

    Looked for in ``root``, the folder ABSYNTH_DATA, in each also in a subfolder named as the data set, and in the
    user's cache folder; gzipped or not. All data sets use the same four file names, so a file whose checksum says that
    it is another data set's is passed over. Raises InputError if a file is damaged, or has neither this data set's
    checksum nor another's. (Of unpacked Fashion-MNIST and KMNIST files no checksum is published: their structure is
    checked, nothing more.)
    """
    for folder in _folders(name, root):
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file() and (content := _read(name, file, path)) is not None:
                return path, content
    return None


def _read(name: str, file: str, path: Path) -> bytes | None:
    """The unpacked, checked content of ``path``; None if it is another data set's file of the same name."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; make it readable") from error
    content = unpack(path, raw)
    origin = _origin(file, raw, content)
    if origin is None:
        if _verifiable(name, path.name):
            raise InputError(f"{path} is not the published {name} file (SHA-256 differs): {_replace(path)}")
        parse(path, content, None)
        return content
    return content if origin == name else None


def _folders(name: str, root: Path | None) -> Iterator[Path]:
    if root is not None:
        yield from (root, root / name)
    if os.environ.get("ABSYNTH_DATA"):
        folder = Path(os.environ["ABSYNTH_DATA"]).expanduser()
        yield from (folder, folder / name)
    yield cache_folder(name)


def _origin(file: str, raw: bytes, content: bytes) -> str | None:
    """The data set that published this file, by its checksum; None if none did."""
    digests = {hashlib.sha256(data).hexdigest() for data in ((raw,) if raw is content else (raw, content))}
    for name, source in SOURCES.items():
        if digests & {source.sha256.get(file), source.sha256.get(f"{file}.gz")}:
            return name
    return None


def _verifiable(name: str, file_name: str) -> bool:
    """Whether a published checksum covers a file of this name: its own, or its unpacked content's."""
    known = SOURCES[name].sha256
    return file_name in known or file_name.removesuffix(".gz") in known


def _replace(path: Path) -> str:
    return f"delete {path.name} and run again to fetch a fresh copy"


def unpack(path: Path, raw: bytes) -> bytes:
    """The content of a file that is gzipped or not. Raises InputError if it is a truncated or damaged gzip file."""
    if path.suffix != ".gz" and not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a truncated or damaged gzip file ({error}): {_replace(path)}") from error


def parse(path: Path, content: bytes, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """The array in the IDX file ``content`` read from ``path``; InputError if it is none, or not of this shape."""
    axes = content[3] if len(content) >= 4 else 0
    header = 4 + 4 * axes
    if content[:3] != b"\x00\x00\x08" or not 1 <= axes <= 3 or len(content) < header:
        raise InputError(f"{path} is not an IDX file of bytes (it starts with {content[:4]!r}): {_replace(path)}")
    found = struct.unpack(f">{axes}I", content[4:header])
    size = int(np.prod(found, dtype=np.int64))
    if len(content) - header != size:
        raise InputError(
            f"{path} is damaged: its header {found} announces {size:,} bytes, it holds {len(content) - header:,}: "
            f"{_replace(path)}"
        )
    if shape is not None and found != shape:
        raise InputError(f"{path} holds an array {found}, expected {shape}: {_replace(path)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(found)


def download(name: str, file: str) -> tuple[Path, bytes]:
    """Fetch ``file`` of ``name`` into the cache folder from the first mirror that has it: (path, unpacked content).

    Written to a temporary file that is renamed once its checksum holds: whatever happens in between, no half file ever
    has the final name. A progress bar goes to stderr. Raises DataUnavailable if no mirror has it, InputError if the
    cache folder cannot be written (read-only, disk full).
    """
    folder = cache_folder(name)
    path = folder / f"{file}.gz"
    # The process id keeps two downloads at once apart. What a killed one left behind is removed after the rename below.
    temporary = folder / f"{file}.gz.{os.getpid()}.part"
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for mirror in SOURCES[name].mirrors:
            try:
                with open(temporary, "wb") as out:
                    for chunk in _fetch(f"{mirror}{file}.gz"):
                        out.write(chunk)
                raw = temporary.read_bytes()
                content = unpack(temporary, raw)
                if _origin(file, raw, content) != name:
                    raise InputError("SHA-256 differs from the published one")
            except (_MirrorError, InputError) as error:
                failures.append(f"{mirror}: {error}")
                continue
            temporary.replace(path)
            for leftover in folder.glob(f"{file}.gz.*.part"):
                leftover.unlink(missing_ok=True)
            return path, content
    except OSError as error:
        # Another process may have been faster, and have taken our temporary file for a leftover.
        if path.is_file() and (stored := _read(name, file, path)) is not None:
            return path, stored
        raise InputError(
            f"cannot store {name} in {folder}: {error.strerror or error}; free some space there or make it writable, "
            "or put the files into a folder and set ABSYNTH_DATA to it"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; or the folder is no folder
            temporary.unlink()
    raise DataUnavailable(
        f"{name} is not at hand and could not be downloaded ({'; '.join(failures)}): connect to the network, or put "
        f"{file}.gz into a folder and set ABSYNTH_DATA to it; the data set 'digits' needs no network"
    )


class _MirrorError(Exception):
    """A mirror did not deliver; unlike an OSError of the local disk, the next mirror may help."""


def _fetch(url: str) -> Iterator[bytes]:
    """The bytes behind ``url`` in chunks, with a progress bar on stderr."""
    # here: a tenth of a second that only downloads need
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            length = response.headers.get("Content-Length")
            task = progress.add_task(url.rsplit("/", 1)[-1], total=int(length) if length else None)
            while chunk := response.read(1 << 16):
                yield chunk
                progress.advance(task, len(chunk))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _MirrorError(getattr(error, "reason", None) or error) from error
