"""Tiny models and data for the tests of the evaluation; also reachable as ``evaluation_models:two_squares``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 3


class Linear(nn.Module):
    """Logits that are linear in the pixels, with fixed random weights."""

    def __init__(self, seed: int = 0, pixels: int = 64, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(pixels, classes, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight


def images(count: int = 12, seed: int = 1) -> Tensor:
    """Random images (count,1,8,8) in [0,1]."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labeled(model: nn.Module, count: int = 12, wrong: int = 2) -> tuple[Tensor, Tensor]:
    """Images with the labels the model gives them, the first ``wrong`` of them false."""
    pictures = images(count)
    with torch.no_grad():
        labels = model(pictures).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES
    return pictures, labels


def linear() -> nn.Module:
    """A factory."""
    return Linear()


def no_module() -> str:
    """A factory that is none."""
    return "nothing"


def broken() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no weights\nhere")
