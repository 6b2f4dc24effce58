"""Formats from outside the package: of other packages by their entry points, and of a user's file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from mumoe_tensor.formats.registry import formats, register

#: The group of entry points. One has the name of its format, and the class as its value.
GROUP = "mumoe_tensor.formats"


def load_entry_points(name: str | None = None) -> Iterator[str]:
    """Register the formats of installed packages.

    Parameters
    ----------
    name : str, optional
        Of one format; by default all that are not registered yet.

    Yields
    ------
    str
        For each that cannot be registered a sentence that says why.
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
    """Run a Python file that registers formats, once, as the module of its name.

    Its folder is added to those that modules are imported from.

    Raises
    ------
    ValueError
        If there is no such file, it raises an exception, or another module has its name.
    """
    if not path.is_file():
        raise ValueError(f"--import takes a Python file, and there is none at {str(path)!r}.")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = import_module(path.stem)
    except Exception as error:  # a user's file may raise anything
        raise ValueError(f"{path} must run without an error; {type(error).__name__}: {error}") from error
    if Path(module.__file__ or "").resolve() != path:
        raise ValueError(f"{path} must have a name that no other module has, got that of {module!r}.")
