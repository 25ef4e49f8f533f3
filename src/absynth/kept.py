"""Decoded candidates, kept in the user's cache folder: a model that was loaded once loads in a tenth of the time.

What is kept follows from the weights. A file that is missing, damaged, of other weights or of another version of the
code is made anew; one that cannot be written is not missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from absynth import candidates, decoding
from absynth.candidates import Candidates
from absynth.decoding import FoldedDecoder
from absynth.errors import InputError
from absynth.threads import side_by_side
from absynth.weight_files import read, write

SAMPLES = 4  # candidates of each class that are decoded again to see that what was kept fits
CLOSE = 1e-4  # what a decoded pixel may differ by on another machine


def kept_file(digest: str) -> Path:
    """Where the decoded candidates of the weights of this digest are kept (on Linux, XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("absynth", appauthor=False) / "candidates" / f"{digest[:16]}.safetensors"


def candidates_of(
    decoders: Sequence[FoldedDecoder], latents: Tensor, beta: float, file: Path | None = None
) -> list[Candidates]:
    """The candidates of K classes, latents (K,M,D): from ``file`` if it fits, otherwise decoded, and kept there."""
    known = None if file is None else _restored(decoders, latents, beta, file)
    if known is not None:
        return known
    made = side_by_side(lambda pair: Candidates(*pair, beta), list(zip(decoders, latents, strict=True)))
    if file is not None:
        stored = {f"{number}.{name}": value for number, one in enumerate(made) for name, value in one.derived().items()}
        with suppress(InputError):  # a folder that cannot be written, a full disk: decoded again next time
            write(file, stored, {"model": "candidates", "beta": beta, "code": _code()})
    return made


@torch.no_grad()
def _restored(decoders: Sequence[FoldedDecoder], latents: Tensor, beta: float, file: Path) -> list[Candidates] | None:
    """What was kept, if it is of these decoders, latents and beta."""
    if not file.is_file() or latents.is_cuda:
        return None
    try:
        kept = read(file)
        if (kept.header["beta"], kept.header["code"]) != (beta, _code()):
            return None
        found = [
            Candidates(decoder, own, beta, {name: kept.tensors[f"{number}.{name}"] for name in Candidates.DERIVED})
            for number, (decoder, own) in enumerate(zip(decoders, latents, strict=True))
        ]
        fits = side_by_side(lambda pair: _fits(*pair), list(zip(decoders, found, strict=True)))
    except (InputError, KeyError, ValueError, RuntimeError):
        return None
    return found if all(fits) else None


@cache
def _code() -> str:
    """The version of what candidates are made with: the digest of its text."""
    return hashlib.sha256(b"".join(Path(str(one.__file__)).read_bytes() for one in (candidates, decoding))).hexdigest()


def _fits(decoder: FoldedDecoder, one: Candidates) -> bool:
    """Whether some candidates, decoded again, are as they were kept."""
    sample = torch.linspace(0, len(one.latents) - 1, SAMPLES).long()
    return torch.allclose(decoder(one.latents[sample]), one.points[sample], atol=CLOSE, rtol=0)
