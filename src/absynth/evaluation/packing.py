"""Tensors as the ledger stores them: zlib-compressed little-endian float32, the shape beside it as text."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def shape_text(image: Tensor) -> str:
    """(1, 28, 28) -> "1x28x28"."""
    return "x".join(map(str, image.shape))


def pack(values: Tensor) -> bytes:
    """The blob of a tensor."""
    return zlib.compress(values.detach().cpu().contiguous().numpy().astype("<f4").tobytes())


def unpack(blob: bytes, shape: str | None) -> Tensor:
    """The tensor of a blob, flat without a shape; a blob of the wrong size comes back flat for ``verify`` to report."""
    try:
        values = np.frombuffer(zlib.decompress(blob), dtype="<f4").copy()
    except (zlib.error, ValueError):
        return torch.full((0,), torch.nan)
    flat = torch.from_numpy(values)
    try:
        return flat.view([int(size) for size in shape.split("x")]) if shape else flat
    except (ValueError, RuntimeError):
        return flat
