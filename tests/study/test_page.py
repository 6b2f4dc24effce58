"""The page works in a browser, whatever characters names have."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mumoe_tensor import study as studies
from mumoe_tensor.formats import formats, get_format
from mumoe_tensor.study import plots
from mumoe_tensor.study.charts import NAMES, charts

Made = tuple[studies.Plan, studies.Results]


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_names_and_figures_appear_as_they_are(
    visit: Any,
    made_up: Made,
    hostile: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mumoe_tensor.study.page import page

    names = list(formats())
    for k, name in enumerate(names):
        title = " ".join(text for text in hostile[k :: len(names)] if len(text) < 100)
        monkeypatch.setattr(type(get_format(name)), "title", title)
    planned, results = made_up
    everything = " ".join(hostile)
    layer = replace(planned.setting.layer, title=everything)
    planned = replace(planned, setting=replace(planned.setting, layer=layer, data=everything))
    # The same figures, and of every quantity and subject some that are none.
    rows = [
        replace(row, title=next((s.title for s in planned.subjects if s.name == row.subject), row.title))
        for row in results
    ]
    cycle = (nan, inf, -inf, 1.0)
    for k, row in enumerate(rows):
        if k % 3 == 0 and row.value is not None:
            low, value, high = (cycle[(k // 3 + n) % 4] for n in range(3))
            changed = dict(value=value, low=low, high=high)
            if row.ratio is not None:
                changed |= dict(ratio=value, ratio_low=low, ratio_high=high)
            rows[k] = replace(row, **changed)
    strange = studies.Results()
    strange.add(rows, {"machine": everything})
    drawn = charts(planned, strange)
    path = tmp_path / "report.html"
    path.write_bytes(page(planned, strange, drawn).encode())
    shown = "selector => [...document.querySelectorAll(selector)].map(element => element.textContent)"
    named = {subject.name for subject in planned.subjects if subject.spec.experts == (4,)} & set(formats())
    titles = {formats()[name].title for name in named - {"dense"}}
    for width in (1280, 420):
        tab, errors = visit(path, width)
        panels = tab.evaluate("panels.length")
        tab.wait_for_function("document.querySelectorAll('.plot.js-plotly-plot .main-svg').length > 0")
        assert panels >= 15 and tab.locator(".plot.js-plotly-plot").count() == panels
        assert tab.evaluate(shown, "h1") == [str(layer)]
        assert everything in tab.evaluate(shown, "footer")[0]
        for place in ("nav label", "td:first-child", "#beside-dense .ytick text"):
            assert titles <= set(tab.evaluate(shown, place)), place
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("window.hacked") is None and errors == []
    # The pictures are drawn, too.
    for picture in plots.write_plots(drawn[:2], tmp_path):
        assert picture.suffix == ".png" or ElementTree.parse(picture)


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_works_in_a_browser(
    visit: Any, study: tuple[studies.Plan, studies.Results, Path], width: int
) -> None:
    _, _, out = study
    page, errors = visit(out / "report.html", width)
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    panels = page.evaluate("panels.length")
    assert panels >= 15 and page.locator(".plot.js-plotly-plot").count() == panels
    assert [page.locator(f"#{name} .plot").count() > 0 for name in NAMES] == [True] * len(NAMES)
    # Nothing sticks out, and every panel has points that are drawn.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("plots.every(p => p.querySelectorAll('.point').length > 0)")
    assert page.evaluate("Math.min(...plots.map(p => p.getBoundingClientRect().width))") >= 200
    sizes = page.evaluate(
        "[...document.querySelectorAll('.plot text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
    )
    assert min(sizes) >= 8
    # The cells of a column are aligned alike.
    classes = "[...document.querySelectorAll('table')].flatMap(t => [...t.rows[1].cells].map((_, k) => "
    classes += "new Set([...t.rows].slice(1).map(row => row.cells[k].className)).size))"
    assert set(page.evaluate(classes)) == {1}

    def visible() -> list[Any]:
        return page.evaluate("plots.flatMap(p => p.data.filter(t => t.meta === 'cp').map(t => t.visible))")

    box = page.locator('input[data-subject="cp"]')
    box.uncheck()
    assert set(visible()) == {False}
    box.check()
    assert set(visible()) == {True}
    kinds = "plots.map(p => p.layout.xaxis.type).filter(t => t !== 'category')"
    assert set(page.evaluate(kinds)) == {"log"}
    page.locator("#log").uncheck()
    assert set(page.evaluate(kinds)) == {"linear"}
    assert errors == []
