"""Parse the text of options."""

from __future__ import annotations

import json
from typing import Any

from mumoe_tensor.configs.head import LINEAR
from mumoe_tensor.contraction.machine import AnyMachine, as_machine
from mumoe_tensor.formats.registry import config_entry
from mumoe_tensor.formats.text import read_format


def read_experts(text: str) -> tuple[int, ...]:
    """Numbers of experts per level, from ``64``, ``8x8`` or ``none``."""
    if text == "none":
        return ()
    try:
        return tuple(int(n) for n in text.split("x"))
    except ValueError:
        rule = "--experts must be a number, levels such as 64x64, or none"
        raise ValueError(f"{rule}, got {text!r}.") from None


def read_several(text: str) -> list[tuple[int, ...]]:
    """Comma-separated numbers of experts, each as in `read_experts`."""
    return [read_experts(levels.strip()) for levels in text.split(",")]


def read_integers(text: str) -> list[int]:
    """Comma-separated integers."""
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(f"values must be comma-separated integers, got {text!r}.") from None


def read_jobs(text: str) -> int | str:
    """A number of processes, or the address of a Dask scheduler."""
    if "://" in text:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--jobs must be positive, or the address of a Dask scheduler, got {text!r}.")
    return int(text)


def read_list(text: str) -> list[Any]:
    """Comma-separated names, a JSON list, or one JSON object."""
    if not text.lstrip().startswith(("[", "{")):
        return [name.strip() for name in text.split(",")]
    listed = _json(text, "names must be comma-separated or JSON")
    return listed if isinstance(listed, list) else [listed]


def read_rank(text: str) -> tuple[int | None, ...]:
    """Entries of a rank; None for an entry to solve for."""
    try:
        return tuple(None if r.strip() == "?" else int(r) for r in text.split(","))
    except ValueError:
        rule = "--rank must be comma-separated numbers, e.g. 64,128,128; for fit one may be ?"
        raise ValueError(f"{rule}; got {text!r}.") from None


def read_entry(text: str) -> str | dict[str, Any]:
    """The config entry of a format from its name or from JSON; also accepts linear."""
    return text if text == LINEAR else config_entry(read_format(text))


def read_machine(text: str) -> AnyMachine:
    """The name of a machine, or its attributes from JSON."""
    if not text.lstrip().startswith("{"):
        return text
    return as_machine(_json(text, "a machine must be a name or JSON"))


def read_budget(text: str) -> Any:
    """A number of parameters; ``match`` and multiples are returned as text."""
    number = text.replace(",", "").replace("_", "")
    return int(number) if number.isdecimal() else text


def _json(text: str, rule: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{rule}, got {text!r}: {error}.") from None
