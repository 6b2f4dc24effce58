"""Text and data in the pages: harmless in HTML, and read back as they were."""

from __future__ import annotations

import json
import re
from html import unescape
from math import inf, nan
from typing import Any

import pytest

pytest.importorskip("jinja2")

from jinja2 import DictLoader, UndefinedError

from mumoe_tensor import pages

TEMPLATE = '<p title="{{ text }}">{{ text }}</p><script type="application/json">{{ value | tojson }}</script>'


@pytest.fixture(autouse=True)
def templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages._environment(), "loader", DictLoader({"page": TEMPLATE}))


def written(value: Any) -> str:
    match = re.search("json.>(.*)</script>", pages.render("page", text="", value=value), re.DOTALL)
    assert match
    return match[1]


def test_values_are_text_and_data(hostile: list[str]) -> None:
    for text in hostile:
        json_text = written({text: [text]})
        assert not set(json_text) & set("<>&\u2028\u2029") and json_text.isascii()
        assert json.loads(json_text) == {text: [text]}
        start = pages.render("page", text=text, value=0).partition("</p>")[0]
        match = re.fullmatch('<p title="([^"]*)">([^<]*)', start, re.DOTALL)
        assert match and unescape(match[1]) == unescape(match[2]) == text


@pytest.mark.parametrize(("value", "name"), [(nan, "NaN"), (inf, "Infinity"), (-inf, "-Infinity")])
def test_figures_that_json_lacks_become_strings(value: float, name: str) -> None:
    values = json.loads(written({"a": [value, (1.5, value)], "b": {"c": value}, "d": value}))
    assert values == {"a": [name, [1.5, name]], "b": {"c": name}, "d": name}


def test_what_utf8_cannot_hold_and_what_is_missing() -> None:
    assert ">file ?<" in pages.render("page", text="file \udcff", value=0)
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        pages.render("page", value=0)
