"""Formats as text, as commands take them and tables name them."""

from __future__ import annotations

import json

from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import config_entry, get_format
from mumoe_tensor.readers import parse_json


def read_format(text: str) -> Format:
    """A format from its name, or from its config entry as JSON, as ``{"name": "btt", "splits": {"i": 3}}``.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if not text.lstrip().startswith("{"):
        return get_format(text)
    try:
        return get_format(parse_json(text))
    except (ValueError, TypeError) as error:
        rule = "a format with settings must be its config entry as JSON"
        raise ValueError(f"{rule}, got {text!r}: {error}") from None


def format_text(format: Format) -> str:
    """The text that `read_format` reads as this format, without spaces."""
    entry = config_entry(format)
    return entry if isinstance(entry, str) else json.dumps(entry, separators=(",", ":"))
