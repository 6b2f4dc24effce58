"""Text and data as they stand in the pages: nothing in them becomes markup or code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from math import isfinite, isnan
from typing import Any

#: Characters that end a script element, open a comment in it, or end a line of JavaScript.
_ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def html_text(text: object) -> str:
    """Text for an element or a quoted attribute; what UTF-8 cannot hold becomes a question mark."""
    return escape(str(text)).encode("utf-8", "replace").decode()


def script_json(value: Any) -> str:
    """JSON for a script element.

    JSON has no NaN and no infinity: they become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``,
    which JavaScript's ``Number`` reads.
    """
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).translate(_ESCAPED)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
