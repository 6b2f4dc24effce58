"""Constructor arguments of an object as JSON types, so that a config can store the object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from math import isfinite
from typing import Any


def as_json(value: Any) -> Any:
    """Convert a value to JSON types; numbers of NumPy and torch become Python numbers."""
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
    """The constructor arguments of an instance, read from its attributes, except those in `left_out`.

    Each argument must be an attribute whose value has a JSON type. `what` names the instance in error
    messages.
    """
    kind = type(instance)
    arguments: dict[str, Any] = {}
    for name, parameter in signature(kind).parameters.items():
        if name in left_out:
            continue
        is_named = parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        if not is_named or name == "name" or not hasattr(instance, name):
            raise ValueError(
                f"{what} must have every constructor argument as an attribute to be stored in a config; "
                f"{kind.__name__} has no such attribute for {name!r}."
            )
        value = getattr(instance, name)
        try:
            arguments[name] = as_json(value)
        except (TypeError, RuntimeError):  # a tensor on the meta device has no value
            raise ValueError(
                f"{what} must have arguments of JSON types to be stored in a config; {kind.__name__} has "
                f"{name}={value!r}."
            ) from None
    return arguments
