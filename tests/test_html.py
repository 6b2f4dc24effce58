"""Text and data for the pages: harmless in HTML, and read back as they were."""

from __future__ import annotations

import json
from html import unescape
from math import inf, nan

import pytest

from mumoe_tensor.html import html_text, script_json


def test_json_has_no_character_that_a_script_element_reads(hostile: list[str]) -> None:
    for text in hostile:
        written = script_json({text: [text]})
        assert not set(written) & set("<>&\u2028\u2029") and written.isascii()
        assert json.loads(written) == {text: [text]}


@pytest.mark.parametrize(("value", "name"), [(nan, "NaN"), (inf, "Infinity"), (-inf, "-Infinity")])
def test_figures_that_json_lacks_become_strings(value: float, name: str) -> None:
    written = script_json({"a": [value, (1.5, value)], "b": {"c": value}, "d": value})
    assert json.loads(written) == {"a": [name, [1.5, name]], "b": {"c": name}, "d": name}


def test_text_has_no_markup(hostile: list[str]) -> None:
    for text in hostile:
        assert not set(html_text(text)) & set("<>\"'")
        assert unescape(html_text(text)) == text
    assert html_text("file \udcff") == "file ?"
