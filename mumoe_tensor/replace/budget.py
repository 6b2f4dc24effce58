"""Layers with a given number of parameters, for fair comparisons."""

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
    """Solve for the size with which a layer has a given number of parameters.

    Parameters
    ----------
    make : callable
        Takes a size and returns the layer, preferably on the meta device. The number of parameters must
        increase with the size.
    rounding : {"up", "down", "nearest"}, default "nearest"
        See `.LayerSpec.fitted`.
    least : int, default 1
        The smallest size.
    smallest : str, optional
        Description of the smallest size in error messages.

    Raises
    ------
    ValueError
        If the smallest layer already has more parameters, or no size has as many.
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
