"""Check that a model fits into memory before it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from mumoe_tensor.nn.size import num_parameters

M = TypeVar("M", bound=nn.Module)


def parameters_of(make: Callable[[], nn.Module]) -> int:
    """The number of parameters of a model, which is made on ``meta``.

    Parameters
    ----------
    make : callable

    Raises
    ------
    ValueError
        If there are more than torch can count.
    """
    try:
        return num_parameters(make())
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"a model must fit into memory: {error}.") from None


def made(make: Callable[[], M]) -> M:
    """Make a model; running out of memory raises a ValueError.

    Parameters
    ----------
    make : callable

    Raises
    ------
    ValueError
    """
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise ValueError(f"a model must fit into memory: {error}.") from None


def check_memory(parameters: int) -> None:
    """Reject a model whose parameters, in float32, need more than the memory of this machine.

    Parameters
    ----------
    parameters : int

    Raises
    ------
    ValueError
    """
    import psutil  # a dependency of accelerate

    needed, there = 4 * parameters, psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"a model must fit into memory; got {parameters:,} parameters of {needed / 2**30:,.1f} GiB, and "
            f"{there / 2**30:,.1f} GiB of memory."
        )
