"""Self-contained HTML pages: jinja2 templates with inlined styles and scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from math import isfinite, isnan
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Render a template.

    Values are escaped. Within a script, ``{{ value | tojson }}`` is JSON that can neither end the script nor
    open a comment. JSON has no NaN and no infinity: they become the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which JavaScript's ``Number`` parses.

    Parameters
    ----------
    template : str
        Name of a file in ``templates``. In it, ``{{ asset(name) }}`` inserts a file of ``assets``.
    **values
        Variables of the template.

    Returns
    -------
    str
        HTML; characters that UTF-8 cannot encode are replaced by question marks.
    """
    return _environment().get_template(template).render(values).encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals["asset"] = _asset
    environment.policies["json.dumps_function"] = _json
    environment.policies["json.dumps_kwargs"] = {}
    return environment


def _asset(name: str) -> Markup:
    return Markup((files(__name__) / "assets" / name).read_text(encoding="utf-8"))


def _json(value: Any) -> str:
    write = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    try:
        return write(value)
    except ValueError:  # rare; checking every number first would take longer than writing
        return write(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
