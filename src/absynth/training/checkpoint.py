"""Checkpoints of a training in progress: one safetensors file, written whole or not at all.

The file holds named tensors (weights, optimizer state) and one JSON object (epoch, configuration, data digest).
It is written to a temporary file beside its final name and renamed, so that a process killed at any instant leaves
either the previous checkpoint or the new one, never a half. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from absynth.errors import InputError

_HEADER_KEY = "absynth_checkpoint"


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path`` by these tensors and this JSON-serializable ``meta``, atomically.

    Raises InputError if the file cannot be written (read-only folder, full disk); an earlier checkpoint is then intact.
    """
    path = Path(path)
    # Copies, because safetensors refuses tensors that share memory
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(stored, {_HEADER_KEY: json.dumps(dict(meta), sort_keys=True)})
    # The process id keeps two trainings that were given the same path from writing into one temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content is on disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write checkpoint {path}: {error.strerror or error}; choose a writable folder with free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone after the rename; left over after a failure or Ctrl-C


def load_checkpoint(
    path: str | Path, *, expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The (tensors, meta) that ``save_checkpoint`` wrote to ``path``, on the CPU; None if there is no such file.

    ``expect`` names entries that meta must hold with these values, e.g. the configuration and the data digest, so that
    a training is never continued from another one's checkpoint. Raises InputError if one differs, and if the file is
    no checkpoint, is truncated or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return None
    fix = "delete it to start over, or give another path"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        meta = json.loads(header[_HEADER_KEY])
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = "no checkpoint of a training" if isinstance(error, KeyError) else f"unreadable ({error})"
        raise InputError(f"checkpoint {path} is {reason}: {fix}") from error
    # Through JSON and back, so that a tuple in the configuration compares equal to the list it was stored as.
    for key, value in json.loads(json.dumps(dict(expect or {}))).items():
        if meta.get(key) != value:
            raise InputError(f"checkpoint {path} has {key} {meta.get(key)!r}, this training has {value!r}: {fix}")
    return tensors, meta
