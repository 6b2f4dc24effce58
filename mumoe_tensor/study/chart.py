"""Charts as data: `plots` draws them with matplotlib, `page` in a browser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

#: A position on an axis, or the name of a category.
Place = float | str
#: Number of ticks on an axis whose ticks are at measured values.
MOST_TICKS = 4


class Point(NamedTuple):
    """A point, the ends of its error bar, if any, and its text."""

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
        The subject determines the colour.
    points : list of Point
    line : bool
        Whether points are joined by a line.
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
        Categories of a categorical y axis, from top to bottom. The texts are then written beside the points.
    reference : float, optional
        Position of a reference line on the axis `values`.
    measured : bool
        Whether the ticks of x are at measured values.
    front : list of Point
        Points joined by a step line.
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
        """The axis of the measured values and their error bars: "y", or "x" if y has categories."""
        return "x" if self.ys else "y"

    @property
    def points(self) -> list[Point]:
        """The points of all series."""
        return [point for series in self.series for point in series.points]

    @property
    def xticks(self) -> list[float]:
        """Ticks at measured values of x, reduced to a few."""
        places = sorted({float(point.x) for point in self.points}) if self.measured else []
        return places[:: -(-len(places) // MOST_TICKS)] if places else []


@dataclass(frozen=True)
class Chart:
    """A plot with one or several panels.

    Attributes
    ----------
    name : str
        Stem of its file names.
    title, caption : str
    panels : list of Panel
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]

    @property
    def titles(self) -> dict[str, str]:
        """Title of every subject, in the order of appearance."""
        return {series.subject: series.title for panel in self.panels for series in panel.series}


def limits(panel: Panel, axis: str) -> tuple[float, float]:
    """Limits of a numeric axis that leave room for all points, error bars and texts."""
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
    """The Pareto front of small x and large y, or small y with `lowest`, from left to right."""
    sign = -1 if lowest else 1
    best: list[Point] = []
    measured = [point for point in points if isfinite(float(point.x)) and isfinite(float(point.y))]
    for point in sorted(measured, key=lambda point: (float(point.x), -sign * float(point.y))):
        if not best or sign * float(point.y) > sign * float(best[-1].y):
            best.append(point)
    return best
