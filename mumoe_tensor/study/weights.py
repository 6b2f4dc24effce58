"""The weight of a layer of the user's own and the inputs of that layer, read from files."""

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

#: Rows whose products are summed in one go.
CHUNK = 4096


@cache
def read_weight(source: str, transposed: bool = False) -> Any:
    """The weight of a layer, or the weights of several experts or layers of one shape, as a stack.

    Parameters
    ----------
    source : str
        A file of safetensors, of NumPy or of ``torch.save``, or a folder of safetensors, and the name of a
        tensor in it, as ``model.safetensors:layers.3.mlp.up_proj.weight``. Of several names that match a
        pattern, each is one expert, in the order of the numbers in their names.
    transposed : bool, default False
        Whether the file has (..., in, out), as the ``Conv1D`` of GPT-2 and the arrays of this library; by
        default it has (..., out, in), as `torch.nn.Linear`.

    Returns
    -------
    ndarray of float32 of shape (experts..., in, out)

    Raises
    ------
    ValueError
        If a file is damaged, no name matches, or the tensors are no matrices or stacks of one shape, empty,
        not finite, or all zero.
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
            f"weights of one stack must have one shape, got {sorted(shapes)} for {source!r}. Select tensors "
            "by name, as FILE:NAME."
        )
    weight = torch.stack([tensor.float() for tensor in tensors.values()])
    if not weight.isfinite().all() or not weight.any():
        raise ValueError(f"a weight must be finite and not all zero; {source!r} is not.")
    weight = weight.squeeze(0) if len(tensors) == 1 else weight
    return np.ascontiguousarray((weight if transposed else weight.mT).numpy())


@cache
def read_covariance(source: str, in_features: int) -> Any:
    """The mean of ``x xᵀ`` over inputs of a layer, not centred.

    Parameters
    ----------
    source : str
        As of `read_weight`, of tensors of shape (..., in_features); all of their rows count.

    Returns
    -------
    ndarray of float64 of shape (in_features, in_features)

    Raises
    ------
    ValueError
        If a file is damaged, no name matches, or the tensors have no rows of inputs.
    OSError
        If a file cannot be read.
    """
    total, count = torch.zeros((in_features, in_features), dtype=torch.float64), 0
    for name, tensor in tensors_of(source):
        if tensor.ndim < 2 or tensor.shape[-1] != in_features or not tensor.numel():
            raise ValueError(
                f"inputs must have the {in_features:,} features of the weight; {name} is of shape "
                f"{tuple(tensor.shape)}. (A weight that is stored as in x out is transposed.)"
            )
        for rows in tensor.reshape(-1, in_features).split(CHUNK):
            total += rows.double().T @ rows.double()
            count += len(rows)
    if not total.isfinite().all() or not total.any():
        raise ValueError(f"inputs must be finite and not all zero; {source!r} is not.")
    return (total / count).numpy()


def tensors_of(source: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names, from ``FILE``, ``FILE:NAME`` or ``FOLDER:NAME``.

    Parameters
    ----------
    source : str
        The file is of safetensors, of NumPy (``.npy``, ``.npz``) or of ``torch.save``; of a folder all
        files of safetensors are read. The name may be a pattern with ``*``, which matches dots, too;
        without one, all are read.

    Raises
    ------
    ValueError
        If a file is damaged, no name matches, or two files have a tensor of one name.
    OSError
        If a file cannot be read.
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
        raise ValueError(f"files of a folder must have different tensors; {path} has {twice[0]} twice.")
    yield from sorted(matching, key=lambda item: _in_order(item[0]))


def _in_order(name: str) -> list[Any]:
    """Numbers in names count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".npy", ".npz"):
        return read_weights(path)
    with reading(path):
        content: Any = np.load(path, allow_pickle=False)
        arrays = {path.stem: content} if path.suffix == ".npy" else dict(content)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
