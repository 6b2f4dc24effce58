"""Read the weight and the inputs of an existing layer from files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.nn.weights import read_weights
from mumoe_tensor.readers import reading

#: Rows per partial sum of products.
CHUNK = 4096


@cache
def read_weight(source: str, transposed: bool = False) -> Any:
    """Read the weight of a layer, or a stack of weights of one shape, such as those of experts.

    Parameters
    ----------
    source : str
        A file in the format of safetensors, NumPy or ``torch.save``, or a folder of safetensors files, and
        the name of a tensor, such as ``model.safetensors:layers.3.mlp.up_proj.weight``. If a pattern matches
        several names, each is one expert, in the order of the numbers in their names.
    transposed : bool, default False
        Whether the weight has shape (..., in, out), as in the ``Conv1D`` of GPT-2 and the arrays of this
        library; by default (..., out, in), as in `torch.nn.Linear`.

    Returns
    -------
    ndarray of float32 of shape (experts..., in, out)

    Raises
    ------
    ValueError
        If a file is corrupt, no name matches, or the tensors are not matrices, or stacks, of one shape, or
        are empty, not finite, or all zero.
    OSError
        If a file cannot be read.
    """
    tensors = dict(tensors_of(source))
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel():
            raise ValueError(
                f"a weight must be a matrix of floats, or a stack of them, and not empty; {name} is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}. Select tensors by name, as FILE:NAME."
            )
    if len(shapes := {tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        raise ValueError(
            f"weights of a stack must have the same shape, got {sorted(shapes)} for {source!r}. Select "
            "tensors by name, as FILE:NAME."
        )
    weight = torch.stack([tensor.float() for tensor in tensors.values()])
    if not weight.isfinite().all() or not weight.any():
        raise ValueError(f"a weight must be finite and not all zero; {source!r} is not.")
    weight = weight.squeeze(0) if len(tensors) == 1 else weight
    return np.ascontiguousarray((weight if transposed else weight.mT).numpy())


@cache
def read_covariance(source: str, in_features: int) -> Any:
    """The uncentred mean of ``x xᵀ`` over inputs of a layer.

    Parameters
    ----------
    source : str
        As in `read_weight`, for tensors of shape (..., in_features); all rows are used.

    Returns
    -------
    ndarray of float64 of shape (in_features, in_features)

    Raises
    ------
    ValueError
        If a file is corrupt, no name matches, or the tensors have no rows of inputs.
    OSError
        If a file cannot be read.
    """
    total, count = torch.zeros((in_features, in_features), dtype=torch.float64), 0
    for name, tensor in tensors_of(source):
        if tensor.ndim < 2 or tensor.shape[-1] != in_features or not tensor.numel():
            raise ValueError(
                f"inputs must have the {in_features:,} features of the weight; {name} has shape "
                f"{tuple(tensor.shape)}. (If the weight is stored as in x out, use the option transposed.)"
            )
        for rows in tensor.reshape(-1, in_features).split(CHUNK):
            total += rows.double().T @ rows.double()
            count += len(rows)
    if not total.isfinite().all() or not total.any():
        raise ValueError(f"inputs must be finite and not all zero; those in {source!r} are not.")
    return (total / count).numpy()


def tensors_of(source: str) -> Iterator[tuple[str, Tensor]]:
    """Read tensors with their names from ``FILE``, ``FILE:NAME`` or ``FOLDER:NAME``; see `read_weight`.

    The name may be a pattern with ``*``, which also matches dots; without a name, all tensors are read.
    """
    path, colon, pattern = source.rpartition(":")
    if not colon or Path(source).exists():
        path, pattern = source, "*"
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    everything = [(name, tensor) for file in files for name, tensor in _read(file).items()]
    matching = [(name, tensor) for name, tensor in everything if fnmatchcase(name, pattern)]
    if not matching:
        names = sorted({name for name, _ in everything}, key=_in_order)
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ValueError(f"{path} must have a tensor {pattern!r}; it has {len(names):,}: {some or 'none'}.")
    if twice := [name for name, count in Counter(name for name, _ in matching).items() if count > 1]:
        raise ValueError(f"the files of a folder must not share tensor names; {path} has {twice[0]} twice.")
    yield from sorted(matching, key=lambda item: _in_order(item[0]))


def _in_order(name: str) -> list[Any]:
    """A sort key that compares numbers in names by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".npy", ".npz"):
        return read_weights(path)
    with reading(path):
        content: Any = np.load(path, allow_pickle=False)
        arrays = {path.stem: content} if path.suffix == ".npy" else dict(content)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
