"""Small random changes of a batch of images, affine and elastic, each image with its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ELASTIC_KNOTS = 5  # a side: the displacement is drawn on so coarse a grid and interpolated


@dataclass(frozen=True)
class Augmentation:
    """Largest change of each kind; an image's own is uniform between minus and plus it. All zero: no change."""

    rotation: float = 10.0  # degrees
    zoom: float = 0.1  # 0.1: between 0.9 and 1.1 times the size
    shear: float = 6.0  # degrees
    shift: float = 1.5  # pixels, in each direction
    elastic: float = 0.0  # pixels: standard deviation of a smooth random displacement
    bicubic: bool = False  # keeps strokes crisp, where bilinear interpolation blurs them


def augment(images: Tensor, amount: Augmentation, generator: torch.Generator) -> Tensor:
    """Images (B,C,S,S) in [0,1] -> the same images moved, (B,C,S,S) in [0,1], black beyond the border.

    Draws from ``generator`` (on the CPU) alone, so that the same state gives the same images.
    """
    if not any((amount.rotation, amount.zoom, amount.shear, amount.shift, amount.elastic)):
        return images
    uniform = torch.rand(len(images), 5, generator=generator).mul(2).sub(1).to(images.device)  # (B,5) in [-1,1]
    angle = uniform[:, 0] * math.radians(amount.rotation)
    shear = torch.tan(uniform[:, 1] * math.radians(amount.shear))
    scale = 1 / (1 + uniform[:, 2] * amount.zoom)  # the grid says where to look, so it shrinks as the image grows
    shift = uniform[:, 3:] * (2 * amount.shift / images.shape[-1])  # (B,2), in units of half the image
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cosine, shear * cosine - sine, shift[:, 0], sine, shear * sine + cosine, shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)  # (B,2,3) -> (B,S,S,2)
    if amount.elastic:
        knots = torch.randn(len(images), 2, ELASTIC_KNOTS, ELASTIC_KNOTS, generator=generator).to(images.device)
        bends = F.interpolate(knots, size=images.shape[-2:], mode="bicubic", align_corners=True)  # (B,2,S,S)
        grid = grid + bends.permute(0, 2, 3, 1) * (2 * amount.elastic / images.shape[-1])
    mode = "bicubic" if amount.bicubic else "bilinear"
    return F.grid_sample(images, grid, mode=mode, align_corners=False).clamp(0, 1)  # bicubic overshoots, rounding too
