"""Readers for labelled data."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.readers import read_arrays, reading
from mumoe_tensor.selections import Selection, read_selection

#: Labels must be below this number: dates or identifiers, taken for classes, would make a huge layer.
CLASSES = 1_000_000
#: The entry types of the IDX format, by code; all big-endian.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Rows(Protocol):
    """Data to train on: rows from which batches are taken."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and labels of selected rows.

        Parameters
        ----------
        rows : Tensor of int64 of shape (n,)

        Returns
        -------
        Tensor of shape (n, ...)
        Tensor of shape (n, ...)
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels.

    Attributes
    ----------
    x : Tensor of float32 of shape (rows, ...)
    y : Tensor of int64 of shape (rows,)
        From 0 to classes − 1. Labels of other integer dtypes are converted.

    Raises
    ------
    ValueError
        If there are no rows, the numbers of labels and inputs differ, or a label is negative.
    TypeError
        If labels are not integers.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.x.shape[:1] != self.y.shape or not len(self.y):
            raise ValueError(
                "data must have at least one input, and one label for each; got inputs of shape "
                f"{tuple(self.x.shape)}, labels of {tuple(self.y.shape)}."
            )
        object.__setattr__(self, "y", read_labels(self.y))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(self.y.max()) + 1

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """The inputs and labels of selected rows.

        Parameters
        ----------
        rows : sequence of int, or mask of shape (len(self),)
            A row may occur more than once.

        Returns
        -------
        Tensor of shape (n, ...)
        Tensor of shape (n,)
        """
        numbers = torch.tensor(read_selection(rows, len(self), "rows", repeats=True), dtype=torch.long)
        return self.x[numbers], self.y[numbers]

    def rows(self, index: Selection) -> Dataset:
        """Some of the rows.

        Parameters
        ----------
        index : sequence of int, slice, or mask of shape (len(self),)
            A row may occur more than once.
        """
        return Dataset(*self.batch(index))


class Divisible(Protocol):
    """Data that `split` can divide."""

    def __len__(self) -> int: ...

    def rows(self, index: Any) -> Self:
        """Some of the rows."""
        ...


Data = TypeVar("Data", bound=Divisible)


def split(data: Data, share: float, seed: int = 0) -> tuple[Data, Data]:
    """Split rows into two parts at random.

    Parameters
    ----------
    data : Dataset or ImageFiles
    share : float
        Fraction of the rows in the second part, between 0 and 1.
    seed : int, default 0

    Returns
    -------
    two of the type of `data`

    Raises
    ------
    ValueError
        If a part would be empty.
    """
    second = round(share * len(data))
    if not 0 < second < len(data):
        raise ValueError(
            f"both parts must have rows, but a fraction {share} of {len(data)} rows is {second}."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.rows(order[second:]), data.rows(order[:second])


def digits() -> Dataset:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn includes: inputs of shape (64,), from 0 to 1.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return Dataset(torch.tensor(loaded.data / 16, dtype=torch.float32), torch.tensor(loaded.target))


def read_npz(path: str | Path) -> Dataset:
    """Read the arrays ``x`` and ``y`` of a NumPy archive, such as features of a frozen network.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file with ``x``, real numbers of shape (rows, features, ...), and ``y``, integers of shape
        (rows,).

    Raises
    ------
    ValueError
        If an array is missing, has another type or shape or values that are not finite, or the file is
        corrupt.
    """
    x, y = read_arrays(path, ("x", "y"))
    with reading(path):
        if x.ndim < 2:
            raise ValueError(f"x must have shape (rows, features, ...), got {x.shape}.")
        return Dataset(as_features(x), as_labels(y))


def read_images(inputs: str | Path, labels: str | Path | None = None) -> Dataset:
    """Read images and their labels from a NumPy archive or from two IDX files.

    Parameters
    ----------
    inputs : str or Path
        An ``.npz`` file with ``x`` and ``y`` or, with `labels`, an IDX file, see `read_idx`. Integer pixels,
        from 0 to 255, are scaled to 0 to 1; float pixels must be between 0 and 1.
    labels : str or Path, optional

    Raises
    ------
    ValueError
        If pixels are out of range, or as in `read_npz` and `read_idx`.
    """
    if labels is not None:
        return read_idx(inputs, labels)
    x, y = read_arrays(inputs, ("x", "y"))
    with reading(inputs):
        return Dataset(as_pixels(x), as_labels(y))


def read_idx(images: str | Path, labels: str | Path) -> Dataset:
    """Read images and labels in the IDX format, the format of MNIST.

    Parameters
    ----------
    images, labels : str or Path
        Gzipped if the name ends in ``.gz``.

    Returns
    -------
    Dataset
        Integer pixels, from 0 to 255, are scaled to 0 to 1.

    Raises
    ------
    ValueError
        If a file is not in the IDX format or is truncated, the numbers of images and labels differ, or pixels
        or labels are out of range.
    """
    with reading(images):
        x = as_pixels(_idx(Path(images)))
    with reading(labels):
        y = as_labels(_idx(Path(labels)))
        return Dataset(x, y)


def as_pixels(x: np.ndarray[Any, Any]) -> Tensor:
    """Convert images to float32 from 0 to 1; integers from 0 to 255 are divided by 255."""
    top = 255 if x.dtype.kind in "iu" else 1
    if x.size and not (x.min() >= 0 and x.max() <= top):  # NaN compares as out of range
        raise ValueError(
            f"pixels must be integers from 0 to 255 or floats from 0 to 1; got {x.dtype} from "
            f"{x.min()} to {x.max()}."
        )
    pixels = x.astype(np.float32)
    pixels /= top
    return torch.from_numpy(pixels)


def as_features(x: np.ndarray[Any, Any]) -> Tensor:
    """Convert inputs to float32; they must be finite."""
    with np.errstate(over="ignore"):
        features = x.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(
            f"inputs must be finite in float32; x has {int((~np.isfinite(features)).sum())} that are not."
        )
    return torch.from_numpy(features)


def as_labels(y: np.ndarray[Any, Any]) -> Tensor:
    """Convert labels to int64; they must be integers from 0 and below `CLASSES`."""
    if y.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {y.dtype}.")
    if y.size and not (y.min() >= 0 and y.max() < CLASSES):
        raise ValueError(
            f"labels must be from 0 to {CLASSES - 1:,}, got {y.min() if y.min() < 0 else y.max()}."
        )
    return torch.from_numpy(y.astype(np.int64))


def _idx(path: Path) -> np.ndarray[Any, Any]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"a .gz file must be a complete gzip file: {error}.") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError(f"an IDX file must start with two zero bytes and a type code, got {content[:4]!r}.")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"an IDX header of {axes} axes must have {start} bytes, got {len(content)}.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    dtype = np.dtype(IDX_TYPES[content[2]])
    expected = start + prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"an IDX file of shape {shape} must have {expected} bytes, got {len(content)}.")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
