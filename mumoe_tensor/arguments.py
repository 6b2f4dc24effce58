"""How configs write an object of a class: by the arguments that make it again, in types of JSON."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from math import isfinite
from typing import Any


def as_json(value: Any) -> Any:
    """A value in types that JSON has; numbers of NumPy and torch become Python's."""
    if getattr(value, "ndim", None) == 0:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(entry) for key, entry in value.items()}
    if type(value) in (bool, int, str, type(None)) or (type(value) is float and isfinite(value)):
        return value
    raise TypeError


def arguments_of(
    instance: Any,
    what: str,
    left_out: Collection[str] = (),
    as_json: Callable[[Any], Any] = as_json,
) -> dict[str, Any]:
    """The arguments an instance was made with, but for those `left_out`: its attributes of the same names.

    Each must be an attribute, and of a type that JSON has. `what` is the word for instances in errors.
    """
    kind = type(instance)
    arguments: dict[str, Any] = {}
    for name, parameter in signature(kind).parameters.items():
        if name in left_out:
            continue
        is_named = parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        if not is_named or name == "name" or not hasattr(instance, name):
            raise ValueError(
                f"{what} must have every argument of its class as an attribute to be written in a "
                f"config; {kind.__name__} has no such attribute for {name!r}."
            )
        value = getattr(instance, name)
        try:
            arguments[name] = as_json(value)
        except (TypeError, RuntimeError):  # (a tensor on the meta device has no value)
            raise ValueError(
                f"{what} must have arguments of types that JSON has to be written in a config; "
                f"{kind.__name__} has {name}={value!r}."
            ) from None
    return arguments
