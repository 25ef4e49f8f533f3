"""What every model checks of the images it is given, and what is checked of its answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from absynth.errors import InputError


def check_images(images: Tensor, *, channels: int = 1, size: int | None = 28) -> None:
    """Raise InputError unless ``images`` is a non-empty float32 batch (B, channels, size, size) with values in [0, 1].

    ``size=None`` takes any height and width. Costs one pass over the values (their minimum and maximum; NaN shows up
    in either) and, on an accelerator, one synchronization.
    """
    side = "size" if size is None else size
    expected = f"a float32 batch (B, {channels}, {side}, {side}) with values in [0, 1]"
    if not isinstance(images, Tensor):
        raise InputError(f"images is a {type(images).__name__}, expected {expected}: use torch.as_tensor(images)")
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = (
            "add the missing axes, e.g. images[None] or images[:, None]"
            if images.ndim < 4
            else "flatten the batch axes"
        )
        raise InputError(f"images has shape {shape}, expected {expected}: {hint}")
    if shape[0] == 0:
        raise InputError(f"images is an empty batch of shape {shape}: give at least one image")
    if shape[1] != channels:
        hint = "images.permute(0, 3, 1, 2)" if shape[3] == channels else "convert the pictures first"
        raise InputError(f"images has shape {shape} and so {shape[1]} channels, expected {expected}: {hint}")
    if shape[2] == 0 or shape[3] == 0 or (size is not None and shape[2:] != (size, size)):
        raise InputError(
            f"images has shape {shape}, expected {expected}: resize them, or use absynth.data.load_picture"
        )
    if images.dtype != torch.float32:
        hint = (
            "images.float()" if images.dtype.is_floating_point else "images.float() / 255 if they are 8-bit gray values"
        )
        raise InputError(f"images has dtype {images.dtype}, expected {expected}: {hint}")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if low != low or high != high:
        raise InputError(f"images contains NaN, expected {expected}: remove or repair those images")
    if low < 0 or high > 1:
        if low >= 0 and high <= 255 and high > 2:
            hint = "divide by 255"
        elif low >= -1 and high <= 1:
            hint = "if they were scaled to [-1, 1], use (images + 1) / 2"
        else:
            hint = "undo any normalization, or use images.clamp(0, 1)"
        raise InputError(f"images has values from {low:.4g} to {high:.4g}, expected {expected}: {hint}")


def check_logits(answer: object, count: int, classes: int | None = None) -> Tensor:
    """``answer`` in float32, if it is logits (``count``, K), K at least 2, and ``classes`` where that is given. Raises
    InputError otherwise."""
    expected = f"expected logits ({count}, K) with K at least 2"
    if not isinstance(answer, Tensor):
        raise InputError(f"the model returned a {type(answer).__name__} for {count} images: {expected}")
    if answer.ndim != 2 or len(answer) != count or answer.shape[1] < 2:
        raise InputError(f"the model returned shape {tuple(answer.shape)} for {count} images: {expected}")
    if classes is not None and answer.shape[1] != classes:
        raise InputError(
            f"the model returned {answer.shape[1]} classes, before it was {classes}: expected the same each time"
        )
    return answer.float()


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a model answers to images (B,C,H,W), if these are logits (B,K), finite numbers. Raises InputError for any
    other answer, and for a model that fails."""
    try:
        logits = model(images)
    except InputError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"the model raised {text} on images {tuple(images.shape)}: it has to answer float32 images (B,C,H,W) in "
            "[0,1] with logits (B,K)"
        ) from error
    checked = check_logits(logits, len(images))
    bad = int((~checked.isfinite()).any(1).sum())
    if bad:
        what = "NaN" if checked.isnan().any() else "infinity"
        raise InputError(
            f"the model returned {what} for {bad} of {len(images)} images: expected logits that are finite numbers"
        )
    return checked


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name, e.g. "cpu" or "cuda". Raises InputError for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:  # whose message lists twenty kinds of devices
        raise InputError(
            f"unknown device {str(name)!r}: expected cpu, cuda or cuda:N; use cpu, or cuda where there is a GPU"
        ) from error
    try:
        torch.zeros(1, device=device).item()  # the device "meta" has room for nothing, and so no item
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}): use cpu, or cuda where there is a GPU"
        ) from error
    return device


def check_seed(seed: int) -> None:
    """Raise InputError for a number that is no seed: negative, or with more than 63 bits."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; expected a whole number from 0 to {2**63 - 1}: give another one")
