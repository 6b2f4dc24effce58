"""Formats by name: what a config writes of a format, and which format a name or a config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mumoe_tensor.arguments import arguments_of, as_json
from mumoe_tensor.formats.base import MOST_LEVELS, Format

#: A format, its name, or what a config writes of it: a dict of its name and arguments of its class.
AnyFormat = str | Mapping[str, Any] | Format

_registry: dict[str, Format] = {}
#: Formats that are made of others: they have a name in configs, but arguments without defaults.
_composed: dict[str, type[Format]] = {}


def register(format: type[Format]) -> type[Format]:
    """Make a format available by its name. Works as a class decorator.

    Parameters
    ----------
    format : type
        A class derived from `Format`, whose instances need no arguments.

    Raises
    ------
    ValueError
        If the name is taken by another format, or the declaration is not a tensor network at some number of
        levels up to 16: each mode must be an index of some factor, and each bond must join at least two
        factors and have a name that the library does not use itself.
    TypeError
        If it is no class of formats, or lacks a name or a title.
    """
    if not (isinstance(format, type) and issubclass(format, Format)):
        raise TypeError(f"register takes a class derived from Format, got {format!r}; use it as a decorator.")
    try:
        declared = format()
    except TypeError as error:
        raise TypeError(
            f"a format must be made without arguments; {format.__name__}() raises TypeError: {error}"
        ) from error
    get_format(declared)
    for what in ("name", "title"):
        text = getattr(declared, what, None)
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"a format must have a {what}, a string; {format.__name__} has {text!r}.")
    # (Those of the package are checked by its tests, so that it is imported quickly.)
    if not format.__module__.startswith(f"{__package__}."):
        for levels in range(MOST_LEVELS + 1):
            declared.declaration(levels)
    taken = _composed.get(declared.name) or type(_registry.get(declared.name, declared))
    if (taken.__module__, taken.__qualname__) != (format.__module__, format.__qualname__):
        raise ValueError(
            f"a format's name must be its own; {declared.name!r} is {taken.__qualname__} of "
            f"{taken.__module__}."
        )
    _registry[declared.name] = declared
    return format


def composed(format: type[Format]) -> type[Format]:
    """Let configs write a format that is made of others by its name. A class decorator."""
    _composed[format.name] = format
    return format


def formats() -> dict[str, Format]:
    """All registered formats by name, in the order of their registration."""
    return dict(_registry)


def get_format(format: AnyFormat) -> Format:
    """Look a format up by its name; a `Format` is returned as it is.

    Parameters
    ----------
    format : str, dict or Format
        A dict is what a config writes of a format with settings: its name, and arguments of its class.

    Raises
    ------
    ValueError, TypeError
        If no format has that name, here or in the group ``mumoe_tensor.formats`` of the entry points of
        installed packages, or its class no such arguments, or if a setting cannot be hashed.
    """
    if isinstance(format, Format):
        format.check_settings()
        return format
    if not isinstance(format, (str, Mapping)):
        raise TypeError(f"a format is a name, a dict of its name and settings, or a Format, got {format!r}.")
    settings: dict[str, Any] = {"name": format} if isinstance(format, str) else dict(format)
    name = settings.pop("name", None)
    if not isinstance(name, str) or (name not in {**_registry, **_composed} and not _is_installed(name)):
        raise ValueError(f"unknown format {name!r}; the formats are {', '.join(map(repr, _registry))}.")
    if not settings and name in _registry:
        return _registry[name]
    kind = _composed.get(name) or type(_registry[name])
    arguments = {key: _as_tuples(value) for key, value in settings.items() if key != "splits"}
    try:
        made = kind(**arguments)
        made = made if settings.get("splits") is None else made.with_splits(settings["splits"])
    except TypeError as error:
        why = str(error).removesuffix(".")
        raise ValueError(f"format {name!r} cannot be made with {settings}: {why}.") from None
    return get_format(made)


def _is_installed(name: str) -> bool:
    """Register the format of that name of an installed package, if there is one."""
    from mumoe_tensor.formats.elsewhere import load_entry_points  # reads what is installed: rarely needed

    for problem in load_entry_points(name):
        raise ValueError(problem)
    return name in _registry


def config_entry(format: Format) -> str | dict[str, Any]:
    """What a config writes of a format: its name, or its name with the settings that are not the default."""
    registered = _registry.get(format.name)
    if type(registered) is not type(format) and _composed.get(format.name) is not type(format):
        raise ValueError(f"format must be registered to be written in a config, got {format!r}.")
    settings = _arguments(format)
    if registered is not None:
        default = _arguments(registered)
        settings = {key: value for key, value in settings.items() if value != default[key]}
    entry = {"name": format.name, **settings} if settings or registered is None else format.name
    if get_format(entry) != format:
        raise ValueError(
            f"a format must keep the arguments of its class as they are to be written in a config; {entry!r} "
            f"does not make {format!r} again."
        )
    return entry


def _arguments(format: Format) -> dict[str, Any]:
    """Its settings in types of JSON, and its splits, also where its class takes none as an argument."""
    arguments = arguments_of(format, "format", left_out=("splits",), as_json=_as_json)
    if format.name in _registry:
        arguments["splits"] = as_json(format.splits)
    return arguments


def _as_json(value: Any) -> Any:
    if isinstance(value, Format):
        return config_entry(value)
    return [_as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else as_json(value)


def label(format: Format) -> str | Format:
    """What stands for a format in a repr: its name, if that is registered for it, or the format itself."""
    return format.name if _registry.get(format.name) == format else format


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON has for tuples, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
