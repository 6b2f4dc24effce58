"""Labels as arrays have them: integers of any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def as_integers(values: Tensor, what: str) -> Tensor:
    """Integers of any dtype as int64; False and True are 0 and 1.

    Raises
    ------
    TypeError
        If they are no integers.
    """
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{what} must be integers, got {values.dtype}.")
    return values.to(torch.int64)


def read_labels(labels: Tensor, classes: int | None = None, what: str = "labels") -> Tensor:
    """Labels of any integer dtype as int64.

    Parameters
    ----------
    labels : Tensor
    classes : int, optional
        Labels are less than this.
    what : str, default "labels"
        What they are called in errors.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If a label is negative, or `classes` or more.
    """
    numbers = as_integers(labels, what)
    if not numbers.numel():
        return numbers
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or (classes is not None and most >= classes):
        limit = "" if classes is None else f" and less than {classes}"
        raise ValueError(f"{what} must be at least 0{limit}, got {least} to {most}.")
    return numbers
