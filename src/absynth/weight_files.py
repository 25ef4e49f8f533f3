"""Weight files: safetensors with one JSON object in the header under "absynth".

It holds model, configuration, data, data digest, seed, accuracy, version, command, and the SHA-256 of the tensors,
which is checked when the file is read. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from absynth import __version__
from absynth.errors import InputError


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file: ``tensors`` by name, and the ``header``."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.header["digest"])


def read(path: str | Path) -> WeightFile:
    """The content of a weight file, its digest checked. Raises InputError if it is missing, none of
    absynth, damaged or altered."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weight file at {path}: train it with 'absynth train {path.stem} --out {path.parent}'")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("absynth")
            if text is None:
                raise InputError(
                    f"{path} is no weight file of absynth: its header has no 'absynth', which 'absynth train' writes; "
                    "give one that it wrote"
                )
            header = dict(json.loads(text))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"weight file {path} is unreadable or truncated ({error}): replace it by an intact copy"
        ) from error
    if header.get("digest") != tensor_digest(tensors):
        raise InputError(f"weight file {path} does not match the digest in its header: replace it by an intact copy")
    return WeightFile(tensors, header)


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a weight file, whole or not at all; ``version`` and ``digest`` are added to the header."""
    path = Path(path)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full = {**header, "version": __version__, "digest": tensor_digest(stored)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(safetensors.torch.save(stored, {"absynth": json.dumps(full, sort_keys=True)}))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # the folder may be none
            temporary.unlink()
        raise InputError(
            f"cannot write weights to {path}: {error.strerror or error}; choose a writable folder"
        ) from error


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
