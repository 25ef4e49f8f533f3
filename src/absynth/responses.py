"""Pixel responses: what is done to every pixel before the analysis. One place, so that models, gradients, attacks and
certificates all see the same function.

A response maps images (B,C,S,S) in [0,1] to images of the same shape in [0,1], pixel by pixel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from absynth.errors import InputError


class Identity(nn.Module):
    """The pixel as it is: ABS."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Threshold(nn.Module):
    """1 where a pixel is at least ``level``, else 0: the binary models of the paper.

    The forward pass is exact. The true gradient is zero almost everywhere; autograd is given the straight-through one,
    that of the identity, so that gradient attacks have a direction to follow.
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        if not 0 < level < 1:
            raise InputError(f"threshold is {level}; it must lie between 0 and 1, like the pixels: use 0.5")
        self.level = level

    def forward(self, images: Tensor) -> Tensor:
        binary = (images >= self.level).to(images.dtype)
        if not images.requires_grad:
            return binary
        return binary + (images - images.detach())  # the difference is exactly 0 and has gradient 1

    def extra_repr(self) -> str:
        return f"level={self.level}"


def different(binary: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first of each group of equal images of 0 and 1 (B,C,S,S), of one ``owner`` (B,) int64 where owners are given:
    indices (U,); and the group of each (B,)."""
    keys = np.packbits(binary.flatten(1).bool().cpu().numpy(), axis=1)  # (B,N) -> (B,N/8)
    if owner is not None:
        keys = np.concatenate([keys, owner.cpu().numpy()[:, None].view(np.uint8)], axis=1)
    first: dict[bytes, int] = {}
    groups = [first.setdefault(key.tobytes(), len(first)) for key in keys]
    firsts = np.unique(groups, return_index=True)[1] if groups else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(firsts).to(binary.device), torch.tensor(groups, device=binary.device)


class Ramp(nn.Module):
    """t(x) = clip((x - a) / (1 - 2a), 0, 1): flat near black and near white, steep between. a = 0 is the identity.

    Between ABS (a = 0) and Binary ABS (the limit of a = 1/2). The gradient is that of t, exactly: ``slope`` on the ramp
    and 0 on the flat parts.

    To gain by moving a pixel an attacker first has to bring it onto the ramp, which costs ``entry`` and gains nothing,
    and may then move it by ``length`` until it saturates, each unit of which changes t by ``slope`` (``moves``).
    """

    def __init__(self, a: float) -> None:
        super().__init__()
        if not 0 <= a < 0.5:
            raise InputError(f"a is {a}; it must lie in [0, 0.5): use Threshold for the limit of 0.5")
        self.a = a

    @property
    def slope(self) -> float:
        """By how much t changes for each unit of a pixel on the ramp."""
        return 1 / (1 - 2 * self.a)

    @property
    def rounding(self) -> float:
        """At least the error of t in float32, for any pixel in [0,1]: of a, of the difference, of 1 - 2a, of the
        quotient, each at most 2^-24 of its size (two operations where a device multiplies by the reciprocal)."""
        return 2.0**-22 * (1 + self.slope)

    def forward(self, images: Tensor) -> Tensor:
        return torch.clamp((images - self.a) / (1 - 2 * self.a), 0, 1)

    def inverse(self, seen: Tensor) -> Tensor:
        """The pixels on the ramp, in [a, 1-a], whose response is ``seen`` in [0,1]."""
        return self.a + (1 - 2 * self.a) * seen

    def nearest(self, clean: Tensor, seen: Tensor) -> Tensor:
        """The pixels nearest to ``clean`` whose response is ``seen``, both in [0,1] and of one shape; ``clean`` itself
        where it has that response already."""
        moved = torch.where(seen <= 0, clean.clamp(max=self.a), self.inverse(seen))
        moved = torch.where(seen >= 1, clean.clamp(min=self._end(clean.dtype)), moved)
        return torch.where(seen == self(clean), clean, moved)

    def _end(self, dtype: torch.dtype) -> float:
        """The smallest pixel, of about 1 - a, whose response is 1 in this type."""
        end = torch.tensor(1 - self.a, dtype=dtype)
        while self(end) < 1:  # a few last digits
            end = torch.nextafter(end, end + 1)
        return float(end)

    def moves(self, pixels: Tensor, *, up: bool) -> tuple[Tensor, Tensor]:
        """Entry and length, in the pixel's own units, of moving ``pixels`` in [0,1] up or down; where the response
        cannot go that way the length is 0. A pixel moved by entry + s, s at most length, changes its t by s * slope."""
        place = pixels if up else 1 - pixels  # the ramp is symmetric
        length = (1 - self.a - place.clamp(min=self.a)).clamp(min=0)
        return torch.where(length > 0, self.a - place, 0.0).clamp(min=0), length

    def extra_repr(self) -> str:
        return f"a={self.a}"


#: Half the width of the ramp that stands for a threshold: less than a gray level of 256, so no such pixel lies on it.
STEEP = 2.0**-10


def ramp_like(classifier: object) -> Ramp | None:
    """The classifier's ramp, or a steep one in place of its threshold at one half; None for any other."""
    response = getattr(classifier, "response", None)
    if isinstance(response, Threshold) and response.level == 0.5:
        return Ramp(0.5 - STEEP)
    return ramp_of(classifier)


def threshold_of(classifier: object) -> float | None:
    """Where ``classifier``, or its response, says it thresholds the pixels; None for any other."""
    found = getattr(classifier, "threshold", getattr(getattr(classifier, "response", None), "level", None))
    return found if isinstance(found, float) else None


def ramp_of(classifier: object) -> Ramp | None:
    """The ramp that ``classifier`` says it puts its pixels through (``classifier.response``); None for any other."""
    response = getattr(classifier, "response", None)
    return response if isinstance(response, Ramp) else None
