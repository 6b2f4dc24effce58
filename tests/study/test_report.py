"""Charts show what was measured, pictures are legible, the page works in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text
from samples import RATIOS

from mumoe_tensor import study as studies
from mumoe_tensor.formats import formats, get_format
from mumoe_tensor.interval import interval
from mumoe_tensor.study import plots
from mumoe_tensor.study.chart import Chart, Panel, Point, Series, front, limits
from mumoe_tensor.study.charts import charts
from mumoe_tensor.study.subjects import BASELINE

Made = tuple[studies.Plan, studies.Results]
NAMES = [
    "pareto",
    "beside-dense",
    "which-format",
    "over-experts",
    "over-batches",
    "crossover",
    "specialisation",
]


def by_name(made: Made) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts(*made)}


def points_of(panel: Panel) -> dict[str, list[Point]]:
    return {series.subject: series.points for series in panel.series}


# ---- what charts show -------------------------------------------------------------------------------------


def test_all_charts_are_there(made_up: Made) -> None:
    assert list(by_name(made_up)) == NAMES
    for chart in charts(*made_up):
        assert chart.panels and all(panel.points for panel in chart.panels), chart.name


def test_beside_the_dense_layer(made_up: Made) -> None:
    planned, _ = made_up
    panels = {panel.title: panel for panel in by_name(made_up)["beside-dense"].panels}
    assert list(panels) == [
        "Parameters", "FLOPs", "Saved for backward", "Expert rank", "Forward, cpu", "Step, cpu",
        "Forward peak, cpu", "Step peak, cpu",
    ]  # fmt: skip
    for name, (point,) in points_of(panels["Step, cpu"]).items():
        ratio = RATIOS.get(name, 1.0)
        assert (point.x, point.low, point.high) == (ratio, 0.9 * ratio, 1.2 * ratio)
    dense, cp = (s.figures(8) for s in planned.subjects[:2])
    assert points_of(panels["Parameters"])["cp"][0].x == cp["parameters"] / dense["parameters"]
    assert points_of(panels["Step peak, cpu"])["tucker"][0].text == "3.00"


def test_the_best_format_of_each_measure(made_up: Made) -> None:
    planned, _ = made_up
    (panel,) = by_name(made_up)["which-format"].panels
    told = {(point.x, point.y): point.text for point in panel.points}
    # Of those at the budget: the dense mixture and Hadamard are not, the sparse one neither.
    assert told["4", "fastest step, cpu"] == "cp" and told["3 × 2", "fastest forward, cpu"] == "cp"
    assert told["4", "best accuracy*"] == "cp"
    at_budget = [s for s in planned.subjects if s.budget and s.spec.experts == (4,)]
    ranks = {subject.name: subject.figures(8)["expert rank"] for subject in at_budget}
    best = [name for name, rank in ranks.items() if rank >= 0.99 * max(ranks.values())]
    assert told["4", "highest rank"] == (", ".join(best) if len(best) < 3 else f"{len(best)} alike")
    assert panel.ys[0] == "fewest FLOPs" and panel.xs[0] == "3"


def test_lines_over_experts_batches_and_sizes(made_up: Made) -> None:
    found = by_name(made_up)
    forward, step, rank, saved = found["over-experts"].panels
    assert [p.x for p in points_of(step)["tr"]] == [4, 6] and points_of(forward)["tr"][0].y == 1.5
    assert [p.x for p in points_of(rank)["cp"]][:2] == [4, 8] and points_of(saved)["cp"][0].y > 0
    throughput, ratios = found["over-batches"].panels
    assert [(p.x, round(float(p.y))) for p in points_of(throughput)[BASELINE]] == [
        (1, 1000), (4, 4000), (8, 8000),
    ]  # fmt: skip
    low, high = points_of(throughput)["tr"][0].low, points_of(throughput)["tr"][0].high
    assert low == pytest.approx(1 / 1.2e-3 / 1.5) and high == pytest.approx(1 / 0.9e-3 / 1.5)
    assert BASELINE not in points_of(ratios) and throughput.xticks == [1, 4, 8]
    for panel, batch in zip(found["crossover"].panels, (1, 4), strict=True):
        assert panel.title == f"Batch {batch}, cpu"
        assert [(p.x, p.y) for p in points_of(panel)["cp"]] == [(16, 0.9), (24, 0.9)]


def test_heads_over_what_they_cost(made_up: Made) -> None:
    planned, _ = made_up
    parameters, flops, latency = by_name(made_up)["pareto"].panels
    cp = points_of(parameters)["cp"]
    assert [p.y for p in cp] == [pytest.approx(95.5)] * 2
    assert sorted(p.x for p in cp) == sorted(
        head.figures(2)["parameters"] for head in planned.heads if head.name == "cp"
    )
    assert points_of(latency)["tr"][0].x == pytest.approx(1500)
    assert {s.subject for s in flops.series} == {s.subject for s in parameters.series}
    assert [float(p.y) for p in latency.front] == sorted(float(p.y) for p in latency.front)
    poly, active, _ = by_name(made_up)["specialisation"].panels
    assert {(s.hollow, s.points[0].y) for s in poly.series if s.subject == "cp"} == {
        (False, 0.3),
        (True, 0.6),
    }
    assert points_of(active)["tr"][0].y == 50


def test_without_data_there_are_no_heads(made_up: Made) -> None:
    planned, results = made_up
    planned = studies.Plan(planned.setting, planned.subjects, [], planned.squares, {}, [])
    assert [chart.name for chart in charts(planned, results)] == [
        name for name in NAMES if name not in ("pareto", "specialisation")
    ]
    studies.paragraph(planned, results)


def test_the_front_has_what_nothing_beats() -> None:
    points = [Point(1, 5), Point(2, 4), Point(2, 7), Point(3, 7), Point(0.5, 1)]
    assert front(points) == [Point(0.5, 1), Point(1, 5), Point(2, 7)]


def test_intervals() -> None:
    assert interval([2.0]) == (2.0, None)
    # Student's t for two degrees of freedom: 4.30 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4841), abs=1e-4)
    # Eleven values have ten degrees of freedom: 2.2281, not the 1.96 of many.
    assert interval(range(11)) == pytest.approx((5.0, 2.2281), abs=1e-3)


def test_axes_have_room() -> None:
    series = [Series("cp", "CP", [Point(10.0, 1.0, 0.5, 4.0), Point(1000.0, 2.0)])]
    panel = Panel("", "", "", series, reference=("y", 8.0))
    low, high = limits(panel, "x")
    assert low < 10 and high > 1000
    low, high = limits(panel, "y")
    assert low < 0.5 and high > 8


def test_paragraph_says_what_was_measured(made_up: Made) -> None:
    told = " ".join(studies.paragraph(*made_up))
    assert "the fastest step on cpu is that of CP, 0.90 times the dense layer's (0.81–1.08)" in told
    assert "the slowest that of Tucker, 3.00 times the dense layer's" in told
    assert "the best on validation is CP" in told and ": 95.5 % ± 6.4, the dense head 90.5 %" in told
    assert "These intervals overlap" in told
    assert "With batch 4 on cpu a square layer is within 10% of nn.Linear from size 16 on (CP)." in told


def test_crossover_needs_all_larger_sizes(made_up: Made) -> None:
    from dataclasses import replace

    planned, results = made_up
    changed = studies.Results()
    changed.add(
        [
            replace(row, ratio=1.5 if row.sizes == "24x24" else 1.0)
            if row.sizes in ("16x16", "24x24") and row.ratio is not None
            else row
            for row in results
        ],
        {},
    )
    told = " ".join(studies.paragraph(planned, changed))
    assert "With batch 4 on cpu no square layer looked at comes within 10% of nn.Linear" in told


# ---- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_legible(made_up: Made, name: str) -> None:
    figure = plots.draw(by_name(made_up)[name])
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
    for ax in figure.axes:
        if not ax.axison:
            continue
        low, high = sorted(ax.get_xlim())
        labels = [t.label1 for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        assert labels, ax.get_title()
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda b: b.x0)
        assert all(one.x1 <= other.x0 for one, other in pairwise(boxes)), ax.get_title()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    titles += [ax._left_title.get_window_extent() for ax in figure.axes]
    wide = [b for b in titles if b.width > 1]
    assert not any(one.overlaps(other) for one, other in pairwise(wide))


def test_the_same_study_gives_the_same_files(made_up: Made, tmp_path: Path) -> None:
    drawn = charts(*made_up)[:2]
    one, other = (plots.write_plots(drawn, tmp_path / name) for name in "ab")
    assert [p.name for p in one] == ["pareto.png", "pareto.svg", "beside-dense.png", "beside-dense.svg"]
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert ElementTree.parse(one[1]).getroot().tag.endswith("svg")


def test_colours_and_markers_tell_subjects_apart(made_up: Made) -> None:
    for chart in charts(*made_up):
        assert len({plots.colour(name) for name in chart.titles}) == len(chart.titles)
        assert len({plots.marker(name) for name in chart.titles}) == len(chart.titles)


# ---- the page ---------------------------------------------------------------------------------------------


def test_the_folder_has_everything(study: tuple[studies.Plan, studies.Results, Path]) -> None:
    _, _, out = study
    expected = ["report.html", "results.csv", "study.json"]
    expected += [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    page = (out / "report.html").read_text()
    assert not re.search(r"<[^>]+ (src|href)=", page.split('<script id="panels"')[0])
    for title in ("Dense MLP", "Tensor Ring", "Sparse mixture, top 2", "Which format"):
        assert title in page


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
@pytest.mark.parametrize("width", [1280, 420])
def test_names_and_figures_appear_as_they_are(
    visit: Any,
    made_up: Made,
    hostile: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
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
    tab, told = visit(path, width)
    panels = tab.evaluate("panels.length")
    tab.wait_for_function("document.querySelectorAll('.plot.js-plotly-plot .main-svg').length > 0")
    assert panels > 20 and tab.locator(".plot.js-plotly-plot").count() == panels
    shown = "selector => [...document.querySelectorAll(selector)].map(element => element.textContent)"
    assert tab.evaluate(shown, "h1") == [str(layer)]
    assert everything in tab.evaluate(shown, "footer")[0]
    titles = {get_format(name).title for name in names if name != "dense"}
    for place in ("nav label", "td:first-child", "#beside-dense .ytick text"):
        assert titles <= set(tab.evaluate(shown, place)), place
    assert not re.search("(nan|inf) times", " ".join(tab.evaluate(shown, "p")))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.hacked") is None and told == []
    # The pictures are drawn, too.
    for picture in plots.write_plots(drawn[:2], tmp_path):
        assert picture.suffix == ".png" or ElementTree.parse(picture)


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_works_in_a_browser(
    visit: Any, study: tuple[studies.Plan, studies.Results, Path], width: int
) -> None:
    _, _, out = study
    page, told = visit(out / "report.html", width)
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    panels = page.evaluate("panels.length")
    assert panels > 20 and page.locator(".plot.js-plotly-plot").count() == panels
    assert [page.locator(f"#{name} .plot").count() > 0 for name in NAMES] == [True] * len(NAMES)
    # Nothing sticks out, and every panel has points that are drawn.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("plots.every(p => p.querySelectorAll('.point').length > 0)")
    assert page.evaluate("Math.min(...plots.map(p => p.getBoundingClientRect().width))") >= 200
    sizes = page.evaluate(
        "[...document.querySelectorAll('.plot text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
    )
    assert min(sizes) >= 8

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
    assert told == []
