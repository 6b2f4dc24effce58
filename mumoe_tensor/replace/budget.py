"""Layers of equal numbers of parameters, which a comparison of them needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import nn

from mumoe_tensor.checks import check_choice
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.spec import Rounding, size_for


def solve(
    make: Callable[[int], nn.Module],
    parameters: int,
    rounding: Rounding = "nearest",
    least: int = 1,
    smallest: str = "",
) -> int:
    """The size with which a layer has a number of parameters.

    Parameters
    ----------
    make : callable
        Takes a size and returns the layer, best on the meta device. It has more parameters the larger the
        size is.
    parameters : int
    rounding : {"up", "down", "nearest"}, default "nearest"
        See `.LayerSpec.fitted`.
    least : int, default 1
        The smallest size.
    smallest : str, optional
        What errors call it.

    Raises
    ------
    ValueError
        If the layer of the smallest size has more parameters, or none has as many.
    """
    check_choice(rounding, ("up", "down", "nearest"), "rounding")

    @cache
    def total(size: int) -> int:
        return num_parameters(make(size))

    if total(least) > parameters:
        raise ValueError(
            f"the smallest layer must fit the budget of {parameters:,} parameters; with {smallest or least} "
            f"it has {total(least):,}."
        )
    size = size_for(total, parameters, rounding, least)
    if total(size) < parameters and total(size + 1) == total(size) and rounding != "down":
        raise ValueError(
            f"some size must reach the budget of {parameters:,} parameters; the largest layer has "
            f"{total(size):,}."
        )
    return size
