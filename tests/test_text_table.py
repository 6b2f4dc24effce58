"""Tables of plain text."""

from __future__ import annotations

import pytest

from mumoe_tensor.text_table import text_table


def test_columns_are_aligned_below_a_rule() -> None:
    rows = [("name", "n", "note"), ("a", "1,000", ""), ("long one", "7", "x")]
    assert text_table(rows, "<><").splitlines() == [
        "name          n  note",
        "---------------------",
        "a         1,000",
        "long one      7  x",
    ]


def test_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError):
        text_table([("a", "b"), ("1",)], "<<")
