"""Options of a command from the attributes of a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, Signature, getdoc, signature
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from mumoe_tensor.cli.console import bad_input
from mumoe_tensor.cli.values import (
    read_budget,
    read_entry,
    read_experts,
    read_integers,
    read_list,
    read_machine,
    read_rank,
    read_several,
)
from mumoe_tensor.configs.kinds import Budget, FormatEntry, Levels, MachineText, Rank

#: Parsers of options, by the type of the attribute; typer parses the other types.
READERS: dict[Any, Callable[[str], Any]] = {
    tuple[int, ...]: read_integers,
    tuple[str, ...]: read_list,
    Levels: read_experts,
    tuple[Levels, ...]: read_several,
    Rank | None: read_rank,
    Budget | None: read_budget,
    FormatEntry: read_entry,
    MachineText: read_machine,
}
Command = Callable[..., None]


def options_of(
    parameter: str,
    config: type,
    names: Collection[str] = (),
    *,
    required: bool = False,
    quick: Mapping[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """Replace a parameter of a command by options for the attributes of a config.

    Name, type and default of an option are those of the attribute, and its help is the text of the docstring.
    The command receives a dict of the given options; the config supplies the other defaults.

    Parameters
    ----------
    parameter : str
        Name of a keyword-only parameter.
    config : type
        A dataclass.
    names : collection of str, optional
        Attributes to turn into options; by default all.
    required : bool, default False
        Whether attributes without a default must be given.
    quick : mapping, optional
        Defaults under `--quick`, for the help.
    """
    hints = get_type_hints(config, include_extras=True)
    texts = dict(re.findall(r"^(\w+)(?: : .*)?\n((?: {4}.+\n?)+)", getdoc(config) or "", re.MULTILINE))
    attributes = [field for field in fields(config) if field.name in (names or hints)]

    def option(attribute: Field[Any], place: Parameter) -> Parameter:
        name, default = attribute.name, attribute.default
        is_text = hints[name] in READERS or get_origin(hints[name]) is Literal  # older typer has no choices
        hint: Any = str if is_text else hints[name]
        shown = "" if default in (MISSING, None) or hint is bool else _text(default)
        if quick and name in quick:
            shown += f"; quick {_text(quick[name])}"
        flag = ("--" + name.replace("_", "-"),) if hint is bool else ()  # without its opposite
        help = " ".join(texts.get(name, "").split())
        kind = Annotated[hint | None, typer.Option(*flag, help=help, show_default=shown or False)]
        is_required = required and default is MISSING
        return place.replace(name=name, annotation=kind, default=Parameter.empty if is_required else None)

    def decorated(command: Command) -> Command:
        @wraps(command)
        def called(**values: Any) -> None:
            given = {a.name: values.pop(a.name) for a in attributes}
            with bad_input():
                values[parameter] = {
                    name: READERS.get(hints[name], lambda value: value)(value)
                    for name, value in given.items()
                    if value is not None
                }
            command(**values)

        parameters: list[Parameter] = []
        for place in signature(command, eval_str=True).parameters.values():
            parameters += [option(a, place) for a in attributes] if place.name == parameter else [place]
        called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorated


def _text(value: Any, separator: str = ",") -> str:
    """A value in command-line notation."""
    return separator.join(_text(v, "x") for v in value) if isinstance(value, tuple) else str(value)
