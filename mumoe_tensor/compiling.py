"""A decorator for functions that `torch.compile` must not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_under_compile(function: Function) -> Function:
    """Make `torch.compile` call a function at compile time and treat its result as a constant."""
    # The same as torch.compiler.assume_constant_result, without importing torch.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
