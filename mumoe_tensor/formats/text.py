"""Conversion of formats to and from text, for the command line and tables."""

from __future__ import annotations

import json

from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import config_entry, get_format
from mumoe_tensor.readers import parse_json


def read_format(text: str) -> Format:
    """Parse the name of a format, or its config entry as JSON: ``{"name": "btt", "splits": {"i": 3}}``.

    Raises
    ------
    ValueError
        If the text is neither.
    """
    if not text.lstrip().startswith("{"):
        return get_format(text)
    try:
        return get_format(parse_json(text))
    except (ValueError, TypeError) as error:
        rule = "a format with settings must be its config entry as JSON"
        raise ValueError(f"{rule}, got {text!r}: {error}") from None


def format_text(format: Format) -> str:
    """Convert a format to text without spaces that `read_format` can parse."""
    entry = config_entry(format)
    return entry if isinstance(entry, str) else json.dumps(entry, separators=(",", ":"))
