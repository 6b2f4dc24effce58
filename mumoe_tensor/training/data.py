"""Readers of labelled data and of text."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.selections import Selection, read_selection

#: The types of entries that the IDX format knows, by their code; all big-endian.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Rows(Protocol):
    """What can be trained on: a number of rows, from which batches are taken."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some rows.

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
    """Inputs and their labels.

    Attributes
    ----------
    x : Tensor of float32 of shape (rows, ...)
    y : Tensor of int64 of shape (rows,)
        From 0 to classes − 1.

    Raises
    ------
    ValueError
        If there is no row, there are not as many labels as inputs, or a label is negative.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.x.shape[:1] != self.y.shape or not len(self.y):
            raise ValueError(
                f"there must be inputs, and one label for each; got inputs of shape {tuple(self.x.shape)}, "
                f"labels of {tuple(self.y.shape)}."
            )
        if int(self.y.min()) < 0:
            raise ValueError(f"labels are counted from 0, got {int(self.y.min())}.")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(self.y.max()) + 1

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some rows.

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


def split(data: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Part rows at random.

    Parameters
    ----------
    data : Dataset
    share : float
        Share of the rows that go into the second part, between 0 and 1.
    seed : int, default 0

    Returns
    -------
    Dataset, Dataset

    Raises
    ------
    ValueError
        If a part would be empty.
    """
    second = round(share * len(data))
    if not 0 < second < len(data):
        raise ValueError(f"both parts must have rows; a share of {share} of {len(data)} gives {second}.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.rows(order[second:]), data.rows(order[:second])


def digits() -> Dataset:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn: inputs of shape (64,) from 0 to 1.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    return Dataset(torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target))


def read_npz(path: str | Path) -> Dataset:
    """Read arrays ``x`` and ``y`` from a NumPy archive, such as features of a frozen network.

    Parameters
    ----------
    path : str or Path
        Of an ``.npz`` file with ``x`` of shape (rows, ...) and ``y``, integers, of shape (rows,).

    Raises
    ------
    ValueError
        If an array is missing, holds objects, is no number or not finite, or they do not fit together.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = {"x", "y"} - set(archive.files)
            if missing:
                raise ValueError(f"{path} must have arrays x and y; it has {sorted(archive.files)}.")
            x, y = archive["x"], archive["y"]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"an .npz file must be whole; {path} is not: {error}.") from None
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be integers; y of {path} is {y.dtype}.")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(
            f"inputs must be finite; x of {path} has {int((~np.isfinite(x)).sum())} that are not."
        )
    return Dataset(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))


def read_idx(images: str | Path, labels: str | Path) -> Dataset:
    """Read images and labels in the IDX format, as those of MNIST are.

    Parameters
    ----------
    images, labels : str or Path
        Gzipped if the name ends in ``.gz``.

    Returns
    -------
    Dataset
        Bytes of images become numbers from 0 to 1.

    Raises
    ------
    ValueError
        If a file is no IDX file, is cut off, or they do not fit together.
    """
    x, y = _idx(Path(images)), _idx(Path(labels))
    scale = 255 if x.dtype == np.uint8 else 1
    return Dataset(torch.from_numpy(x.astype(np.float32) / scale), torch.from_numpy(y.astype(np.int64)))


def _idx(path: Path) -> np.ndarray[Any, Any]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"a file named .gz must be gzipped and whole; {path} is not: {error}.") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError(f"an IDX file starts with two zero bytes and a type; {path} with {content[:4]!r}.")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"the sizes of {axes} axes take {start} bytes; {path} has {len(content)}.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    dtype = np.dtype(IDX_TYPES[content[2]])
    expected = start + prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"an IDX file of shape {shape} has {expected} bytes; {path} has {len(content)}.")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_text(path: str | Path) -> str:
    """Read a text in UTF-8.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        If it is empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a text must be UTF-8; {path} is not: {error}.") from None
    if not text:
        raise ValueError(f"a text must have characters; {path} is empty.")
    return text
