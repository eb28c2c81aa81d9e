"""An image file as RGB with eight bits a channel."""

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ekgfx.errors import DataError

_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose grey values of mode I are on [0, 65535]; of others nobody says what is white."""


def decode(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """The image in RGB. Raises DataError, naming it, for what cannot be read."""
    try:
        with Image.open(file) as image:
            return in_rgb(image)
    except Exception as error:  # Pillow has many decoders, and what they make of damaged bytes may be anything
        raise DataError(f"cannot read the image {name}: {' '.join(str(error).split())[:300]}") from error


def in_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, as Pillow converts it; but 16 bits are scaled to 8, where Pillow would cut them off
    at 255, which leaves white.

    Raises:
        ValueError: pixels whose white is unknown (32 bits, floating point).
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, and nothing says which is white; save it with 8 or 16 bits")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")  # it goes as all transparency does
        return image.convert("RGB")
