"""Images that are no digits: a scribble, noise, a letter. What a classifier should say of them is: no digit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from absynth.errors import unknown_name
from absynth.explorer.wire import SIDE
from absynth.pictures import frame

KINDS = ("scribble", "noise", "letter")
LETTERS = "AEFHKMNPRTWX"  # those that look like no digit
_CANVAS = 112  # drawn large, then scaled down: smooth edges


def sample(kind: str, seed: int) -> Tensor:
    """An image (1,28,28) in [0,1] of this kind. Raises InputError for an unknown kind."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return torch.from_numpy(rng.random((1, SIDE, SIDE), dtype=np.float32))
    if kind == "scribble":
        return frame(_scribble(rng), SIDE)[None]
    if kind == "letter":
        return frame(_letter(LETTERS[rng.integers(len(LETTERS))]), SIDE)[None]
    raise unknown_name("sample", kind, KINDS)


def _scribble(rng: np.random.Generator) -> Tensor:
    """One pen that wanders: a sum of a few waves in x and in y, (h,w) in [0,1]. As high as wide, or it may be a 1."""
    time = np.linspace(0, 2 * np.pi, 400)
    waves = np.arange(1, 6)
    points = np.zeros((400, 2))
    for axis in range(2):
        strength, phase = rng.normal(size=5) / waves**0.5, rng.uniform(0, 2 * np.pi, 5)
        points[:, axis] = (strength * np.sin(time[:, None] * waves + phase)).sum(1)
    points -= points.min(0)
    points *= (_CANVAS - 24) / points.max(0)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    path = [(float(x) + 12, float(y) + 12) for x, y in points]
    ImageDraw.Draw(canvas).line(path, fill=255, width=9, joint="curve")
    return _ink(canvas)


def _letter(letter: str) -> Tensor:
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    font = ImageFont.load_default(80)
    ImageDraw.Draw(canvas).text((20, 8), letter, fill=255, font=font, stroke_width=2)
    return _ink(canvas)


def _ink(canvas: Image.Image) -> Tensor:
    """The part of a drawing that holds ink, (h,w) in [0,1]."""
    values = torch.from_numpy(np.asarray(canvas.crop(canvas.getbbox()), dtype=np.float32) / 255)
    return values
