"""The decoders that the paper's authors released, as a model for the command line.

    ABSYNTH_RELEASED=original_abs.safetensors absynth evaluate --model benchmarks.released:abs_model --suite strong

``ABSYNTH_RELEASED`` names their weights, converted to safetensors (keys "CLASS.Decoder.LAYER").
"""

from __future__ import annotations

import os

from absynth import zoo
from absynth.classifiers import ABS
from absynth.errors import InputError


def abs_model() -> ABS:
    """ABS with the released decoders and this project's search. Raises InputError without the file."""
    return zoo.from_released(_file())


def binary_abs_model() -> ABS:
    """Binary ABS with the released decoders and factors. Raises InputError without the file."""
    return zoo.from_released(_file(), binary=True)


def _file() -> str:
    file = os.environ.get("ABSYNTH_RELEASED")
    if not file:
        raise InputError("ABSYNTH_RELEASED is not set: give it the path of the released weights as safetensors")
    return file
