"""A study as one HTML page that needs no network: interactive charts (plotly)."""

from __future__ import annotations

from html import escape
from math import log10
from pathlib import Path
from typing import Any

from mumoe_tensor.pages import render
from mumoe_tensor.study.chart import Chart, Panel, Place, Series, limits
from mumoe_tensor.study.plots import colour, marker, short
from mumoe_tensor.study.results import Results
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import Plan
from mumoe_tensor.study.table import cells, notes

#: Plotly's names for matplotlib's markers.
SYMBOLS: dict[Any, str] = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
    "8": "octagon",
    "p": "pentagon",
    "h": "hexagon",
    "H": "hexagon2",
    "d": "diamond-tall",
    (4, 1, 0): "star-diamond",
    (3, 1, 0): "star-triangle-up",
    (6, 1, 0): "hexagram",
    ".": "circle",
}


def page(planned: Plan, results: Results, charts: list[Chart], compare: str | Path | None = None) -> str:
    """The page of a study, optionally compared with the study in another folder.

    Returns
    -------
    str
        HTML with all scripts, about 5 MB.
    """
    from plotly.offline import get_plotlyjs

    verdicts, *tables = cells(planned, results, compare)
    return render(
        "study.html",
        layer=planned.setting.layer,
        setting=planned.setting.title,
        subjects={name: title for chart in charts for name, title in chart.titles.items()},
        colour=_colour,
        charts=charts,
        size=_size,
        verdicts=verdicts,
        tables=tables,
        notes=notes(planned, results),
        environments=results.environments,
        figures=[_figure(panel) for chart in charts for panel in chart.panels],
        plotly=get_plotlyjs(),
    )


def _colour(name: str) -> str:
    """Colour of a subject; black becomes the text colour of the page, which may be light."""
    return "var(--text)" if name == BASELINE else colour(name)


def _size(panel: Panel) -> str:
    """CSS style of a panel's element."""
    return f"height:{90 + 26 * len(panel.ys) if panel.ys else 300}px"


def _place(place: Place) -> Place:
    """Escape text for plotly, which interprets tags, entities and TeX; numbers are unchanged."""
    return escape(place, quote=False).replace("$", "&#36;") if isinstance(place, str) else place


def _figure(panel: Panel) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "showlegend": False,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "xaxis": _axis(panel, "x"),
        "yaxis": _axis(panel, "y"),
    }
    if (value := panel.reference) is not None:
        axis, other = ("x", "y") if panel.values == "x" else ("y", "x")
        layout["shapes"] = [
            {
                "type": "line", f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1,
                f"{other}ref": "paper", "line": {"color": "var(--line)", "width": 1}, "layer": "below",
            }
        ]  # fmt: skip
    data = [_trace(panel, series) for series in panel.series]
    if panel.front:
        data.append(
            {
                "type": "scatter", "mode": "lines", "x": [p.x for p in panel.front],
                "y": [p.y for p in panel.front], "hoverinfo": "skip",
                "line": {"color": "var(--line)", "width": 1, "dash": "dash", "shape": "hv"},
            }
        )  # fmt: skip
    return {"data": data, "layout": layout}


def _axis(panel: Panel, axis: str) -> dict[str, Any]:
    is_log, label = (panel.xlog, panel.xlabel) if axis == "x" else (panel.ylog, panel.ylabel)
    layout: dict[str, Any] = {"title": {"text": _place(label), "standoff": 6}}
    if axis == "y" and panel.ys:
        order = [_place(y) for y in reversed(panel.ys)]  # plotly counts from below
        return layout | {
            "type": "category", "categoryorder": "array", "categoryarray": order, "showgrid": False,
            "range": [-0.6, len(order) - 0.4],
        }  # fmt: skip
    low, high = limits(panel, axis)
    if is_log:
        ends = [log10(low), log10(high)]
        decades = ends[1] - ends[0]
        layout |= {"type": "log", "range": ends, "tickformat": "~s" if high >= 1e3 else "~g", "tickangle": 0}
        if axis == "x" and panel.xticks:
            return layout | {"tickvals": panel.xticks, "ticktext": [short(tick) for tick in panel.xticks]}
        # As in the plots: every second decade, every decade, or 1, 2, 5 within each.
        return layout | {"dtick": "D2" if decades < 1.8 else 1 if decades < 2.5 else 2}
    return layout | {"type": "linear", "range": [low, high], "nticks": 6}


def _trace(panel: Panel, series: Series) -> dict[str, Any]:
    shade = _colour(series.subject)
    points = series.points
    trace: dict[str, Any] = {
        "type": "scatter",
        "meta": series.subject,
        "name": _place(series.title),
        "x": [_place(p.x) for p in points],
        "y": [_place(p.y) for p in points],
        "text": [_place(p.text) for p in points],
        "hovertemplate": "<b>%{fullData.name}</b><br>%{text}<br>%{x}, %{y}<extra></extra>",
        "mode": "lines+markers" if series.line else "markers",
        "marker": {"symbol": SYMBOLS[marker(series.subject)], "size": 8, "color": shade},
        "line": {"color": shade, "width": 1.8},
    }
    if panel.ys:
        trace |= {"mode": "markers+text", "textposition": "middle right", "cliponaxis": False}
    if any(p.low is not None for p in points):
        centres = [float(p.x if panel.values == "x" else p.y) for p in points]
        trace[f"error_{panel.values}"] = {
            "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": shade,
            "array": [max((p.high or c) - c, 0.0) for c, p in zip(centres, points, strict=True)],
            "arrayminus": [max(c - (p.low or c), 0.0) for c, p in zip(centres, points, strict=True)],
        }  # fmt: skip
    return trace
