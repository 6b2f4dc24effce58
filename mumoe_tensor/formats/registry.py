"""The registry of formats: lookup by name, and conversion to and from config entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mumoe_tensor.arguments import arguments_of, as_json
from mumoe_tensor.formats.base import MOST_LEVELS, Format

#: A format, its name, or its config entry: a dict with its name and the arguments of its class.
AnyFormat = str | Mapping[str, Any] | Format

_registry: dict[str, Format] = {}
#: Classes of formats composed of others: they have a name in configs, but need arguments.
_composed: dict[str, type[Format]] = {}


def register(format: type[Format]) -> type[Format]:
    """Make a format available by its name. Use it as a class decorator.

    Parameters
    ----------
    format : type
        A class derived from `Format`, whose instances need no arguments.

    Raises
    ------
    ValueError
        If another format has the same name, or the declaration is not a valid tensor network for some number
        of levels up to 16: each mode must be an index of a factor, and each bond must join at least two
        factors and must not have a name reserved by the library.
    TypeError
        If `format` is not a subclass of `Format`, or has no name or no title.
    """
    if not (isinstance(format, type) and issubclass(format, Format)):
        raise TypeError(
            f"register must decorate or be called with a class derived from Format, got {format!r}."
        )
    try:
        declared = format()
    except TypeError as error:
        raise TypeError(
            f"a format must not require arguments; {format.__name__}() raises TypeError: {error}"
        ) from error
    get_format(declared)
    for what in ("name", "title"):
        text = getattr(declared, what, None)
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"a format must have a {what}, a string; {format.__name__} has {text!r}.")
    # The package's formats are checked by its tests instead, so that the package is imported quickly.
    if not format.__module__.startswith(f"{__package__}."):
        for levels in range(MOST_LEVELS + 1):
            declared.declaration(levels)
    taken = _composed.get(declared.name) or type(_registry.get(declared.name, declared))
    if (taken.__module__, taken.__qualname__) != (format.__module__, format.__qualname__):
        raise ValueError(
            f"the name of a format must be unique; {declared.name!r} is {taken.__qualname__} of "
            f"{taken.__module__}."
        )
    _registry[declared.name] = declared
    return format


def composed(format: type[Format]) -> type[Format]:
    """Make a format composed of others available by name in configs. Use it as a class decorator."""
    _composed[format.name] = format
    return format


def formats() -> dict[str, Format]:
    """All registered formats by name, in order of registration."""
    return dict(_registry)


def get_format(format: AnyFormat) -> Format:
    """Look up a format by its name; a `Format` is returned unchanged.

    Parameters
    ----------
    format : str, dict or Format
        A dict is the config entry of a format with settings: its name and the arguments of its class.

    Raises
    ------
    ValueError, TypeError
        If no registered format and no entry point of the group ``mumoe_tensor.formats`` has this name, the
        class does not have these arguments, or a setting is not hashable.
    """
    if isinstance(format, Format):
        format.check_settings()
        return format
    if not isinstance(format, (str, Mapping)):
        raise TypeError(
            f"a format must be a name, a dict with a name and settings, or a Format, got {format!r}."
        )
    settings: dict[str, Any] = {"name": format} if isinstance(format, str) else dict(format)
    name = settings.pop("name", None)
    if not isinstance(name, str) or (name not in {**_registry, **_composed} and not _is_installed(name)):
        raise ValueError(
            f"unknown format {name!r}; the formats are {', '.join(map(repr, _registry))}. Register "
            "other formats first; in commands, use --import."
        )
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
    """Whether an installed package has a format with this name; if so, it is then registered."""
    from mumoe_tensor.formats.elsewhere import load_entry_points  # rarely needed

    for problem in load_entry_points(name):
        raise ValueError(problem)
    return name in _registry


def config_entry(format: Format) -> str | dict[str, Any]:
    """The config entry of a format: its name, or a dict with its name and its non-default settings."""
    registered = _registry.get(format.name)
    if type(registered) is not type(format) and _composed.get(format.name) is not type(format):
        raise ValueError(f"format must be registered to be stored in a config, got {format!r}.")
    settings = _arguments(format)
    if registered is not None:
        default = _arguments(registered)
        settings = {key: value for key, value in settings.items() if value != default[key]}
    entry = {"name": format.name, **settings} if settings or registered is None else format.name
    if get_format(entry) != format:
        raise ValueError(
            "a format must store the arguments of its class unchanged to be stored in a config; "
            f"{entry!r} does not reproduce {format!r}."
        )
    return entry


def _arguments(format: Format) -> dict[str, Any]:
    """Settings of a format as JSON types, and its splits even if they are not an argument of its class."""
    arguments = arguments_of(format, "format", left_out=("splits",), as_json=_as_json)
    if format.name in _registry:
        arguments["splits"] = as_json(format.splits)
    return arguments


def _as_json(value: Any) -> Any:
    if isinstance(value, Format):
        return config_entry(value)
    return [_as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else as_json(value)


def label(format: Format) -> str | Format:
    """The name of a format if it is registered, otherwise the format, for reprs and errors."""
    return format.name if _registry.get(format.name) == format else format


def _as_tuples(value: Any) -> Any:
    """Convert lists, which JSON uses for tuples, to tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
