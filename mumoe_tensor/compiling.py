"""What `torch.compile` must not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_under_compile(function: Function) -> Function:
    """Have `torch.compile` call a function while it compiles and keep the result, not trace its code."""
    # What torch.compiler.assume_constant_result sets; set here because torch must not be imported for it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
