"""Charts as data: `plots` makes pictures of them, `page` draws them in a browser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

#: A place on an axis, or the name of a category.
Place = float | str
#: Ticks of an axis that has them where something was measured.
MOST_TICKS = 4


class Point(NamedTuple):
    """A point, the ends of its error bar if it has one, and its text."""

    x: Place
    y: Place
    low: float | None = None
    high: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one subject.

    Attributes
    ----------
    subject, title : str
        The subject decides the colour.
    points : list of Point
    line : bool
        Whether points are joined.
    """

    subject: str
    title: str
    points: list[Point]
    line: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes
    ----------
    title, xlabel, ylabel : str
    series : list of Series
    xlog, ylog : bool
    ys : tuple of str
        Categories in the place of numbers of y, from top to bottom. Then texts are written beside the points.
    reference : float, optional
        Where on `values` a line stands.
    measured : bool
        Whether the ticks of x are where something was measured.
    front : list of Point
        Joined by a line of steps.
    """

    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    xlog: bool = True
    ylog: bool = False
    ys: tuple[str, ...] = ()
    reference: float | None = None
    measured: bool = False
    front: Sequence[Point] = ()

    @property
    def values(self) -> str:
        """The axis of what was measured, with its error bars: "y", or "x" where that has categories."""
        return "x" if self.ys else "y"

    @property
    def points(self) -> list[Point]:
        """Those of all series."""
        return [point for series in self.series for point in series.points]

    @property
    def xticks(self) -> list[float]:
        """Ticks of x if they are where something was measured, thinned out to a few."""
        places = sorted({float(point.x) for point in self.points}) if self.measured else []
        return places[:: -(-len(places) // MOST_TICKS)] if places else []


@dataclass(frozen=True)
class Chart:
    """A plot of one or several panels.

    Attributes
    ----------
    name : str
        Of its files.
    title, caption : str
    panels : list of Panel
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]

    @property
    def titles(self) -> dict[str, str]:
        """Title of every subject, in the order they appear."""
        return {series.subject: series.title for panel in self.panels for series in panel.series}


def limits(panel: Panel, axis: str) -> tuple[float, float]:
    """Ends of an axis of numbers on which all points, their errors and their texts have room."""
    values = [float(point.x if axis == "x" else point.y) for point in panel.points]
    if panel.values == axis:
        values += [end for point in panel.points for end in (point.low, point.high) if end is not None]
    is_log = panel.xlog if axis == "x" else panel.ylog
    if panel.reference and panel.values == axis:
        values += [panel.reference * factor for factor in (0.8, 1.25)]
    values = [value for value in values if isfinite(value) and (value > 0 or not is_log)] or [1.0]
    low, high = min(values), max(values)
    room = 0.45 if panel.ys and axis == "x" else 0.08
    if is_log:
        span = max(high / low, 2.0)
        return low / span**0.08, max(high, low * 1.1) * span**room
    if low == high:
        return low - 0.1 * (abs(low) or 1.0), high + (abs(high) or 1.0)
    return low - 0.08 * (high - low), high + room * (high - low)


def front(points: Iterable[Point], lowest: bool = False) -> list[Point]:
    """The points for which no other one has less x and more y, with `lowest` less y, from left to right."""
    sign = -1 if lowest else 1
    best: list[Point] = []
    measured = [point for point in points if isfinite(float(point.x)) and isfinite(float(point.y))]
    for point in sorted(measured, key=lambda point: (float(point.x), -sign * float(point.y))):
        if not best or sign * float(point.y) > sign * float(best[-1].y):
            best.append(point)
    return best
