"""Pictures of any size, mode and color, brought to the form of MNIST: white ink on black, centered by its mass.

MNIST's own preparation (LeCun et al. 1998): the digit is scaled, keeping its proportions, to fit a box of 20×20 pixels
and placed in the 28×28 image so that its center of mass is the image's center. S is the image's side in pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from absynth.errors import InputError

LEAST_CONTRAST = 0.06  # of white minus black: what differs less from the background than this is no ink
PAPER_NOISE = 0.1  # of the strongest ink: paper grain and compression artifacts stay below
BOX = 20 / 28  # the side of the box the ink is scaled to, as a part of the image's
MOST_PIXELS = 89_478_485  # Pillow's own bound: beyond it, a small file may fill the memory
# No other format is even tried: some of Pillow's readers start programs (EPS starts Ghostscript).
SIXTEEN_BITS = ("PNG", "PPM")  # whose pixels, where Pillow calls them 32 bits wide, are 16 bits
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def load_picture(path: str | Path | BinaryIO, image_size: int = 28, *, most_pixels: int = MOST_PIXELS) -> Tensor:
    """The picture in a file as float32 (1, S, S) in [0, 1], white ink on black, as MNIST's images are.

    ``path`` may also be an open binary file. A picture of more than ``most_pixels`` is not decoded.

    A gray picture of exactly S×S pixels is already framed: it is returned as it is (value / 255, of 16 bits / 65535,
    of 32 bits or floating point stretched from 0 to 1), or inverted if its border is bright. In any other picture, ink
    is what differs in color from the border, dark on bright or bright on dark: it is cropped, scaled to the box and
    centered by mass. Transparent pixels count as background. The picture should be evenly lit and show one digit and
    little else: a shadow, or a speck far from the digit, counts as ink too.

    Raises InputError if the file cannot be read, is no picture or too large, is blank or has too little contrast.
    """
    source = Path(path) if isinstance(path, str | Path) else path
    named = str(source) if isinstance(source, Path) else "the file"
    rgb = _read_rgb(source, named, most_pixels)
    height, width, _ = rgb.shape
    gray = bool((rgb == rgb[:, :, :1]).all())
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])  # (2·height + 2·width, 3)
    paper = np.median(border, axis=0)
    if gray and (height, width) == (image_size, image_size):
        _check_contrast(float(rgb.max() - rgb.min()), named)
        framed = torch.from_numpy(rgb[:, :, 0].copy())[None]
        return 1 - framed if paper[0] > 0.5 else framed

    ink = np.abs(rgb - paper.astype(np.float32)).max(axis=2)  # (height, width)
    strongest = float(ink.max())
    _check_contrast(strongest, named)
    ink = np.where(ink > PAPER_NOISE * strongest, ink / strongest, 0)
    return frame(torch.from_numpy(_crop(ink)), image_size)[None]


def _check_contrast(contrast: float, named: str) -> None:
    """Raise InputError for a picture that is blank, or nearly so."""
    if contrast == 0:
        raise InputError(f"{named} is blank: all of it is of one color; give a picture of one digit")
    if contrast < LEAST_CONTRAST:
        raise InputError(
            f"{named} has too little contrast: ink and paper differ by {contrast:.1%} of white minus black, at least "
            f"{LEAST_CONTRAST:.0%} are needed; raise its contrast"
        )


def frame(ink: Tensor, image_size: int = 28) -> Tensor:
    """Scale ``ink``, float32 (h, w) in [0, 1], to the box, its longer side first, and center it by mass in (S, S)."""
    box = round(BOX * image_size)
    height, width = ink.shape
    scale = box / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    small = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    small = small / small.max()  # a thin line grows faint when it is scaled down
    return center(small, image_size)


def center(ink: Tensor, image_size: int = 28) -> Tensor:
    """Place ``ink`` (h, w) in a black (S, S) image, its center of mass on pixel S/2, rounded, as MNIST does.

    ``ink`` must fit: h, w ≤ S.
    """
    canvas = ink.new_zeros(image_size, image_size)
    total = ink.sum().clamp_min(1e-12)
    corner = []
    for axis, length in enumerate(ink.shape):
        mean = float((ink.sum(dim=1 - axis) * torch.arange(length)).sum() / total)
        corner.append(min(max(round(image_size / 2 - mean), 0), image_size - length))  # all of the ink stays inside
    top, left = corner
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas


def _crop(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest rectangle that holds all ink."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return np.ascontiguousarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], dtype=np.float32)


def _read_rgb(source: Path | BinaryIO, named: str, most_pixels: int) -> NDArray[np.float32]:
    """The picture's colors, float32 (height, width, 3) in [0, 1], upright, its transparent parts filled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as file:
                if file.width * file.height > most_pixels:
                    raise Image.DecompressionBombError(f"{file.width} × {file.height}, at most {most_pixels:,}")
                file.load()
                wide = file.mode.startswith("I;16") or (file.mode == "I" and file.format in SIXTEEN_BITS)
                picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{named} has too many pixels ({error}): scale it down first") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{named} is not a picture: give a PNG, JPEG, GIF, BMP, TIFF or WebP file") from error
    except FileNotFoundError as error:
        raise InputError(f"no picture at {named}: check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{named} is a folder, not a picture: name the files in it, {named}/*.png for one") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reports broken files with all three
        raise InputError(f"cannot read the picture {named} ({error}): save it again as PNG") from error

    if wide:
        scaled = np.asarray(picture, dtype=np.float32) / np.float32(65_535)
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if picture.mode[0] in "IF":  # 32 bits a pixel, or floating point: white is not defined, only the contrast matters
        values = np.asarray(picture, dtype=np.float64)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise InputError(f"{named} contains NaN or infinite values: save it again as an 8-bit PNG")
        scaled = ((values - low) / max(high - low, 1e-12)).astype(np.float32)
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if picture.mode == "LAB":
        picture = picture.convert("RGB")
    rgba = np.asarray(picture.convert("RGBA")).astype(np.float32) / np.float32(255)
    rgb, alpha = rgba[:, :, :3], rgba[:, :, 3:]  # (height, width, 3), (height, width, 1)
    if bool((alpha == 1).all()):
        return rgb
    if not bool(alpha.any()):
        raise InputError(f"{named} is blank: all of it is transparent; give a picture of one digit")
    # What is transparent is background: put white below dark ink, black below bright ink.
    brightness = float((rgb.mean(axis=2, keepdims=True) * alpha).sum() / alpha.sum())
    background: NDArray[np.float32] = (1 - alpha) * np.float32(brightness < 0.5)
    return rgb * alpha + background
