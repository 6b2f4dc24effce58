"""The table on the screen shows every text as it is."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mumoe_tensor import study as studies
from mumoe_tensor.formats import get_format


def test_titles_with_brackets_are_shown(
    made_up: tuple[studies.Plan, studies.Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, results = made_up
    monkeypatch.setattr(type(get_format("cp")), "title", "CP [b]")
    layer = replace(planned.setting.layer, title="A layer [red] :x:")
    planned = replace(planned, setting=replace(planned.setting, layer=layer))
    console = Console(file=StringIO(), width=300)
    console.print(*studies.tables(planned, results))
    shown = console.file.getvalue()
    assert "A layer [red] :x:, 24 → 40 → 20" in shown and shown.count("CP [b]") == 4
