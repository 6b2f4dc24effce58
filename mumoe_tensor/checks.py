"""Checks of arguments: numbers from any library become Python numbers, and errors state the rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from math import inf, isfinite
from operator import index
from typing import Any


def as_integer(value: Any, what: str) -> int:
    """Convert an integer from any library to an int, or raise a TypeError that names `what`."""
    if type(value) is int:  # torch.compile cannot trace the rest
        return value
    number = as_python(value)
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{what} must be an integer, got {value!r}.")
    return index(number)


def as_positive(value: Any, what: str) -> int:
    """Like `as_integer`, but the number must be positive."""
    number = as_integer(value, what)
    if number < 1:
        raise ValueError(f"{what} must be positive, got {number}.")
    return number


def as_finite(value: Any, what: str) -> float:
    """Convert a finite number from any library to a float, or raise an error that names `what`."""
    if type(value) is float and -inf < value < inf:  # torch.compile cannot trace the rest
        return value
    number = as_python(value)
    if isinstance(number, (bool, str)) or not hasattr(number, "__float__"):
        raise TypeError(f"{what} must be a number, got {value!r}.")
    if not isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}.")
    return float(number)


def as_fraction(value: Any, what: str) -> float:
    """Like `as_finite`, but the number must be at least 0 and less than 1."""
    number = as_finite(value, what)
    if not 0 <= number < 1:
        raise ValueError(f"{what} must be at least 0 and less than 1, got {number}.")
    return number


def as_entries(value: Any, what: str) -> tuple[Any, ...]:
    """The entries of a sequence or an array; a number becomes a single entry. An iterator is consumed."""
    value = as_python(value)
    if isinstance(value, (str, bytes, Mapping, AbstractSet)):
        raise TypeError(f"{what} must be an integer or a sequence of integers, got {value!r}.")
    return tuple(value) if isinstance(value, Iterable) else (value,)


def as_python(value: Any) -> Any:
    """Convert numbers and arrays from any library to Python numbers and lists; leave other values alone."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_flag(value: Any, what: str) -> None:
    """Raise a TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r}.")


def check_choice(value: Any, choices: Iterable[Any], what: str) -> Any:
    """Return the choice that `value` equals, or raise a ValueError that lists the choices."""
    choices = list(choices)
    for choice in choices:
        if isinstance(value, type(choice)) and value == choice:
            return choice
    raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
