"""Labels as tensors of any integer dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def as_integers(values: Tensor, what: str) -> Tensor:
    """Convert integers of any dtype to int64 (False and True become 0 and 1); TypeError for other dtypes."""
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{what} must be integers, got {values.dtype}.")
    return values.to(torch.int64)


def read_labels(labels: Tensor, classes: int | None = None, what: str = "labels") -> Tensor:
    """Convert labels of any integer dtype to int64.

    `what` is the name of the labels in error messages.

    Raises
    ------
    TypeError
        If the labels are not integers.
    ValueError
        If a label is negative, or not less than `classes`.
    """
    numbers = as_integers(labels, what)
    if not numbers.numel():
        return numbers
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or (classes is not None and most >= classes):
        limit = "" if classes is None else f" and less than {classes}"
        raise ValueError(f"{what} must be at least 0{limit}, got {least} to {most}.")
    return numbers
