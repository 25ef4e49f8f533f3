"""Pixel responses: what is done to every pixel before the analysis. One place, so that models, gradients, attacks and
certificates all see the same function.

A response maps images (B,C,S,S) in [0,1] to images of the same shape in [0,1], pixel by pixel.
"""

from __future__ import annotations

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


class Ramp(nn.Module):
    """clip((x - a) / (1 - 2a), 0, 1): flat near black and near white, steep between. a = 0 is the identity."""

    def __init__(self, a: float) -> None:
        super().__init__()
        if not 0 <= a < 0.5:
            raise InputError(f"a is {a}; it must lie in [0, 0.5): use Threshold for the limit of 0.5")
        self.a = a

    def forward(self, images: Tensor) -> Tensor:
        return torch.clamp((images - self.a) / (1 - 2 * self.a), 0, 1)

    def extra_repr(self) -> str:
        return f"a={self.a}"
