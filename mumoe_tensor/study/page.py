"""A study as one HTML page that needs no network: interactive charts (plotly)."""

from __future__ import annotations

from html import escape
from math import log10
from pathlib import Path
from typing import Any

from mumoe_tensor.pages import render
from mumoe_tensor.study.charts import Chart, Panel, Series
from mumoe_tensor.study.plots import look
from mumoe_tensor.study.results import Results
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import Plan
from mumoe_tensor.study.tables import cells, notes


def page(planned: Plan, results: Results, charts: list[Chart], compare: str | Path | None = None) -> str:
    """The page of a study, optionally compared with the study in another folder.

    Returns
    -------
    str
        HTML with all scripts, about 5 MB.
    """
    from plotly.offline import get_plotlyjs

    verdicts, *others = cells(planned, results, compare)
    return render(
        "study.html",
        layer=planned.setting.layer,
        setting=planned.setting.title,
        subjects={name: title for chart in charts for name, title in chart.titles.items()},
        colour=_colour,
        charts=charts,
        verdicts=verdicts,
        tables=others,
        notes=notes(planned, results),
        environments=results.environments,
        figures=[_figure(panel) for chart in charts for panel in chart.panels],
        plotly=get_plotlyjs(),
    )


def _colour(name: str) -> str:
    """Colour of a subject; black becomes the text colour of the page, which may be light."""
    return "var(--text)" if name == BASELINE else look(name)[0]


def _plain(text: str | float) -> str | float:
    """Escape text for plotly, which interprets tags, entities and TeX; numbers are unchanged."""
    return escape(text, quote=False).replace("$", "&#36;") if isinstance(text, str) else text


def _figure(panel: Panel) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "showlegend": False,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "xaxis": _axis(panel, "x", panel.xlabel),
    }
    if panel.ys:
        order = [_plain(y) for y in reversed(panel.ys)]  # plotly counts from below
        layout["yaxis"] = {"type": "category", "categoryorder": "array", "categoryarray": order}
        layout["yaxis"] |= {"showgrid": False, "range": [-0.6, len(order) - 0.4]}
    else:
        layout["yaxis"] = _axis(panel, "y", panel.ylabel)
    if panel.reference is not None:
        axis, other = ("x", "y") if panel.ys else ("y", "x")
        ends = {f"{axis}0": panel.reference, f"{axis}1": panel.reference, f"{other}0": 0, f"{other}1": 1}
        line = {"type": "line", f"{other}ref": "paper", "layer": "below", "line": _line()}
        layout["shapes"] = [ends | line]
    data = [_trace(panel, series) for series in panel.series]
    if panel.front:
        x, y = [p.x for p in panel.front], [p.y for p in panel.front]
        line = _line(dash="dash", shape="hv")
        data.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip", "line": line})
    return {"data": data, "layout": layout}


def _line(**more: str) -> dict[str, Any]:
    return {"color": "var(--line)", "width": 1, **more}


def _axis(panel: Panel, axis: str, label: str) -> dict[str, Any]:
    low, high, is_log = panel.limits(axis)
    title = {"text": _plain(label), "standoff": 6}
    layout = {"title": title, "tickformat": "~s" if high >= 1e3 else "~g", "tickangle": 0}
    if not is_log:
        return layout | {"type": "linear", "range": [low, high], "nticks": 6}
    ends = [log10(low), log10(high)]
    decades = ends[1] - ends[0]
    # As in the plots: every second decade, every decade, or 1, 2, 5 within each.
    step = "D2" if decades < 1.8 else 1 if decades < 2.5 else 2
    return layout | {"type": "log", "range": ends, "dtick": step}


def _trace(panel: Panel, series: Series) -> dict[str, Any]:
    points, shade = series.points, _colour(series.subject)
    trace: dict[str, Any] = {
        "type": "scatter",
        "meta": series.subject,
        "name": _plain(series.title),
        "x": [p.x for p in points],
        "y": [_plain(p.y) for p in points],
        "text": [_plain(p.text) for p in points],
        "hovertemplate": "<b>%{fullData.name}</b><br>%{text}<br>%{x}, %{y}<extra></extra>",
        "mode": "lines+markers" if panel.lines else "markers",
        "marker": {"symbol": look(series.subject)[2], "size": 8, "color": shade},
        "line": {"color": shade, "width": 1.8},
    }
    if panel.ys:
        trace |= {"mode": "markers+text", "textposition": "middle right", "cliponaxis": False}
    if any(p.low is not None for p in points):
        centres = [float(p.x if panel.ys else p.y) for p in points]
        trace["error_x" if panel.ys else "error_y"] = {
            "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": shade,
            "array": [max((p.high or c) - c, 0.0) for c, p in zip(centres, points, strict=True)],
            "arrayminus": [max(c - (p.low or c), 0.0) for c, p in zip(centres, points, strict=True)],
        }  # fmt: skip
    return trace
