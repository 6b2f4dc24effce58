"""The samples to show for inputs: images, or texts as tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mumoe_tensor.selections import read_number

#: Maximum side of an image on the page, in pixels.
SIDE = 64


@dataclass(frozen=True)
class Images:
    """Images, one per input.

    Attributes
    ----------
    pixels : array of shape (rows, height, width) or (rows, height, width, 3)
        Bytes, or floats from 0 to 1.

    Raises
    ------
    ValueError
        If the shape is different.
    """

    pixels: Any

    def __post_init__(self) -> None:
        shape = np.shape(self.pixels)
        if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise ValueError(
                f"images must have shape (rows, height, width) or (rows, height, width, 3), got {shape}."
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def shown(self, index: int) -> str:
        """One image as a PNG data URI.

        Parameters
        ----------
        index : int
        """
        from PIL import Image

        pixels = np.asarray(self.pixels[read_number(index, len(self), "index")])
        if pixels.dtype != np.uint8:
            pixels = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Texts:
    """Texts as lists of tokens, one text per input.

    Attributes
    ----------
    tokens : sequence of sequence of str
    """

    tokens: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.tokens)

    def shown(self, index: int) -> list[str]:
        """The tokens of one text.

        Parameters
        ----------
        index : int
        """
        return list(self.tokens[read_number(index, len(self), "index")])
