"""What goes over the wire between the page and the server: typed, validated, bounded.

Images are base64 of their 28×28 values, float32 little-endian in [0,1], row by row: an adversarial image must arrive as
the very numbers that fooled the model. What is only looked at (reconstructions) is base64 of bytes.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from absynth.errors import InputError

SIDE = 28
_BYTES = SIDE * SIDE * 4
_ENCODED = 4 * -(-_BYTES // 3)
MOST_INK = 280  # pixels a side of a drawing

Pixels = Annotated[str, Field(min_length=_ENCODED, max_length=_ENCODED, description="base64 of 28×28 float32")]
ModelName = Annotated[str, Field(min_length=1, max_length=64)]


class Strict(BaseModel):
    """What a client sends: no field that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ink(Strict):
    """A drawing before it is scaled and centered: ``data`` is base64 of height × width bytes, 255 is full ink."""

    width: Annotated[int, Field(ge=1, le=MOST_INK)]
    height: Annotated[int, Field(ge=1, le=MOST_INK)]
    data: Annotated[str, Field(max_length=4 * -(-(MOST_INK**2) // 3))]


class LookRequest(Strict):
    """Ask one model about an image, or about a drawing."""

    model: ModelName
    image: Pixels | None = None
    ink: Ink | None = None


class AnswersRequest(Strict):
    """Ask every model about an image."""

    image: Pixels


class AttackRequest(Strict):
    """Ask for the smallest adversarial; ``target`` None: any other label will do."""

    model: ModelName
    image: Pixels
    norm: Literal["l0", "l1", "l2", "linf"]
    target: Annotated[int, Field(ge=0, le=999)] | None = None


class Answer(BaseModel):
    """What a model says about an image.

    ``label``: the likeliest class; ``refused``: nothing explains the image; ``can_refuse``: whether the model could say
    so at all. ``probabilities``: of every class; ``names``: what the classes are called.
    """

    model: str
    label: int
    refused: bool
    can_refuse: bool
    probabilities: list[float]
    names: list[str]


class Explanation(BaseModel):
    """For every class its energy and the best image its model can make, base64 of bytes."""

    energies: list[float]
    reconstructions: list[str]


class Look(BaseModel):
    """An answer with all that is behind it; None where a model has no such thing.

    ``image``: what the model saw. ``certified``: by norm, the radius within which no image gets another label.
    """

    image: str
    answer: Answer
    explanation: Explanation | None
    certified: dict[str, float] | None
    seconds: float


class Picture(BaseModel):
    """An image to look at: from a file, from the test set (with ``index`` and true ``label``), or a sample."""

    image: str
    title: str
    index: int | None = None
    label: str | None = None


class Listed(BaseModel):
    """A model of the zoo. ``state``: idle (loaded when first asked), loading, or ready."""

    name: str
    description: str
    state: Literal["idle", "loading", "ready"]


class State(BaseModel):
    """What the page needs to know when it opens."""

    version: str
    models: list[Listed]
    samples: list[str]
    attack_seconds: float


class TestSet(BaseModel):
    """The test images: ``count`` of the data set ``name``."""

    name: str
    count: int
    names: list[str]


class Searching(BaseModel):
    """An attack at work; ``image`` and ``distance`` of the smallest adversarial so far come when it got smaller."""

    event: Literal["searching"] = "searching"
    seconds: float
    queries: int
    image: str | None = None
    distance: float | None = None


class Found(BaseModel):
    """The end of an attack. ``image`` None: no adversarial was found. ``stopped``: the time was up."""

    event: Literal["done"] = "done"
    seconds: float
    queries: int
    label: int
    stopped: bool
    attacks: list[str]
    image: str | None
    distance: float | None
    adversarial_label: int | None


class Asking(BaseModel):
    """A model that is about to answer; the first answer of a model waits until it is loaded."""

    event: Literal["asking"] = "asking"
    model: str
    loading: bool


class Answered(BaseModel):
    """A model's answer, in a stream of them."""

    event: Literal["answer"] = "answer"
    answer: Answer


class Failed(BaseModel):
    """What went wrong, in one line; in a stream of answers with the ``model`` it happened to."""

    event: Literal["error"] = "error"
    error: str
    model: str | None = None


def encode(image: Tensor) -> str:
    """(1,28,28) in [0,1] -> base64 of its float32 values."""
    return base64.b64encode(image.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def encode_bytes(image: Tensor) -> str:
    """(1,28,28) in [0,1] -> base64 of its values as bytes."""
    return base64.b64encode((image.detach().cpu() * 255).round().byte().numpy().tobytes()).decode()


def decode(text: str) -> Tensor:
    """What ``encode`` made -> (1,28,28). Raises InputError for anything else."""
    values = np.frombuffer(_base64(text, "image", _BYTES), "<f4").astype(np.float32)
    if not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails too
        raise InputError("the image has values outside [0,1]: send 28×28 float32 values from 0 to 1")
    return torch.from_numpy(values).view(1, SIDE, SIDE)


def decode_ink(ink: Ink) -> Tensor:
    """A drawing -> (height, width) in [0,1]. Raises InputError where the data do not fit, or nothing is drawn."""
    raw = np.frombuffer(_base64(ink.data, "drawing", ink.width * ink.height), np.uint8)
    if not raw.any():
        raise InputError("nothing is drawn: draw a digit first")
    return torch.from_numpy(raw.astype(np.float32) / np.float32(255)).view(ink.height, ink.width)


def _base64(text: str, what: str, size: int) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the {what} is not base64 ({error}): send base64 of {size} bytes") from error
    if len(raw) != size:
        raise InputError(f"the {what} has {len(raw)} bytes, expected {size}: send all of its pixels")
    return raw
