"""Limits of axes, and fronts of points."""

from __future__ import annotations

from mumoe_tensor.study.chart import Panel, Point, Series, front, limits


def test_the_front_has_what_nothing_beats() -> None:
    points = [Point(1, 5), Point(2, 4), Point(2, 7), Point(3, 7), Point(0.5, 1)]
    assert front(points) == [Point(0.5, 1), Point(1, 5), Point(2, 7)]
    assert front(points, lowest=True) == [Point(0.5, 1)]
    assert front(points[:4], lowest=True) == [Point(1, 5), Point(2, 4)]


def test_axes_have_room() -> None:
    series = [Series("cp", "CP", [Point(10.0, 1.0, 0.5, 4.0), Point(1000.0, 2.0)])]
    panel = Panel("", "", "", series, reference=8.0)
    low, high = limits(panel, "x")
    assert low < 10 and high > 1000
    low, high = limits(panel, "y")
    assert low < 0.5 and high > 8
