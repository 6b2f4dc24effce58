"""Formats from outside the package: from entry points of other packages, and from a user's file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from mumoe_tensor.formats.registry import formats, register

#: The group of entry points. An entry point has the name of its format; its value is the class.
GROUP = "mumoe_tensor.formats"


def load_entry_points(name: str | None = None) -> Iterator[str]:
    """Register the formats of installed packages: one by name, or by default all that are not registered yet.

    Yields an error message for each format that cannot be registered.
    """
    entries = entry_points(group=GROUP) if name is None else entry_points(group=GROUP, name=name)
    for entry in entries:
        if entry.name not in formats():
            try:
                _register(entry)
            except Exception as error:  # a package may raise anything
                yield (
                    f"format {entry.name!r} of the entry point {entry.value!r} cannot be loaded: "
                    f"{type(error).__name__}: {error}"
                )


def _register(entry: EntryPoint) -> None:
    kind = register(entry.load())
    if kind.name != entry.name:
        raise ValueError(f"an entry point must have the name of its format, which is {kind.name!r}.")


def import_file(path: Path) -> None:
    """Import a Python file that registers formats; its folder is added to ``sys.path``.

    Raises
    ------
    ValueError
        If the file does not exist or raises an exception, or another module has the same name.
    """
    if not path.is_file():
        raise ValueError(f"--import must be the path of a Python file, got {str(path)!r}.")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = import_module(path.stem)
    except Exception as error:  # a user's file may raise anything
        raise ValueError(f"{path} must run without an error, got {type(error).__name__}: {error}") from error
    if Path(module.__file__ or "").resolve() != path:
        raise ValueError(f"{path} must not have the name of another module, got that of {module!r}.")
