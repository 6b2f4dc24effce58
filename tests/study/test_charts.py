"""Charts show what was measured."""

from __future__ import annotations

import pytest
from samples import RATIOS

from mumoe_tensor import study as studies
from mumoe_tensor.study.charts import NAMES, Chart, Panel, Point, Series, charts, front
from mumoe_tensor.study.subjects import BASELINE

Made = tuple[studies.Plan, studies.Results]


def by_name(made: Made) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts(*made)}


def points_of(panel: Panel) -> dict[str, list[Point]]:
    return {series.subject: series.points for series in panel.series}


def test_all_charts_are_there(made_up: Made) -> None:
    assert tuple(by_name(made_up)) == NAMES
    for chart in charts(*made_up):
        assert chart.panels and all(points_of(panel) for panel in chart.panels), chart.name


def test_beside_the_dense_layer(made_up: Made) -> None:
    planned, _ = made_up
    panels = {panel.title: panel for panel in by_name(made_up)["beside-dense"].panels}
    assert list(panels) == [
        "FLOPs", "Saved for backward", "Forward, cpu", "Step, cpu", "Step peak, cpu",
    ]  # fmt: skip
    for name, (point,) in points_of(panels["Step, cpu"]).items():
        ratio = RATIOS.get(name, 1.0)
        assert (point.x, point.low, point.high) == (ratio, 0.9 * ratio, 1.2 * ratio)
    subjects = {s.name: s for s in planned.subjects if s.spec.experts in ((), (4,))}
    dense, cp = (subjects[name].figures(8) for name in ("baseline", "cp"))
    assert points_of(panels["FLOPs"])["cp"][0].x == cp["FLOPs"] / dense["FLOPs"]
    assert points_of(panels["Step peak, cpu"])["tucker"][0].text == "3.00"


def test_lines_over_experts_batches_and_sizes(made_up: Made) -> None:
    drawn = by_name(made_up)
    forward, step, rank, saved = drawn["over-experts"].panels
    assert [p.x for p in points_of(step)["tr"]] == [4, 6] and points_of(forward)["tr"][0].y == 1.5
    assert [p.x for p in points_of(rank)["cp"]] == [4, 6] and points_of(saved)["cp"][0].y > 0
    throughput, ratios = drawn["over-batches"].panels
    assert [(p.x, round(float(p.y))) for p in points_of(throughput)[BASELINE]] == [
        (1, 1000), (4, 4000), (8, 8000),
    ]  # fmt: skip
    low, high = points_of(throughput)["tr"][0].low, points_of(throughput)["tr"][0].high
    assert low == pytest.approx(1 / 1.2e-3 / 1.5) and high == pytest.approx(1 / 0.9e-3 / 1.5)
    assert BASELINE not in points_of(ratios)


def test_quality_over_what_it_costs(made_up: Made) -> None:
    """Without a weight it is the rank of an expert."""
    planned, _ = made_up
    panels = {panel.title: panel for panel in by_name(made_up)["pareto"].panels}
    assert list(panels) == ["Parameters", "FLOPs", "Forward", "Step", "Memory"]
    for subject in planned.main:
        figures = subject.figures(8)
        (point,) = points_of(panels["FLOPs"])[subject.name]
        assert (point.x, point.y) == (figures["FLOPs"], figures["expert rank"])
    for panel in panels.values():
        assert panel.front and set(panel.front) <= {p for points in points_of(panel).values() for p in points}


def test_heads_over_what_they_cost(made_up: Made) -> None:
    planned, _ = made_up
    parameters, flops, latency = by_name(made_up)["heads"].panels
    cp = points_of(parameters)["cp"]
    assert [p.y for p in cp] == [pytest.approx(95.5)] * 2
    assert sorted(p.x for p in cp) == sorted(
        head.figures(2)["parameters"] for head in planned.heads if head.name == "cp"
    )
    assert points_of(latency)["tr"][0].x == pytest.approx(1500)
    assert {s.subject for s in flops.series} == {s.subject for s in parameters.series}
    assert [float(p.y) for p in latency.front] == sorted(float(p.y) for p in latency.front)
    assert all(
        0 <= p.low <= p.y <= p.high <= 100
        for panel in (parameters, flops)
        for ps in points_of(panel).values()
        for p in ps
    )


def test_without_data_there_are_no_heads(made_up: Made) -> None:
    planned, results = made_up
    planned = studies.Plan(planned.setting, planned.subjects, [], {}, [])
    assert [chart.name for chart in charts(planned, results)] == [name for name in NAMES if name != "heads"]


def test_the_front_has_what_nothing_beats() -> None:
    points = [Point(1, 5), Point(2, 4), Point(2, 7), Point(3, 7), Point(0.5, 1)]
    assert front(points) == [Point(0.5, 1), Point(1, 5), Point(2, 7)]
    assert front(points, lowest=True) == [Point(0.5, 1)]
    assert front(points[:4], lowest=True) == [Point(1, 5), Point(2, 4)]


def test_axes_have_room() -> None:
    series = [Series("cp", "CP", [Point(10.0, 1.0, 0.5, 4.0), Point(1000.0, 2.0)])]
    panel = Panel("", "", "", series, reference=8.0)
    low, high, is_log = panel.limits("x")
    assert low < 10 and high > 1000 and is_log
    low, high, is_log = panel.limits("y")
    assert low < 0.5 and high > 8 and not is_log
    # Texts beside the points need more.
    assert Panel("", "", "", series, ys=("CP",)).limits("x")[1] > 10_000
