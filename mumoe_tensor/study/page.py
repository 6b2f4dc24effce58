"""A study as one page without a network: charts with hover, switches for subjects and axes (plotly)."""

from __future__ import annotations

from html import escape
from math import log10
from typing import Any

from mumoe_tensor.html import html_text, script_json
from mumoe_tensor.study.chart import Chart, Panel, Place, Series, limits
from mumoe_tensor.study.plots import colour, marker, short
from mumoe_tensor.study.results import Results
from mumoe_tensor.study.summary import notes, paragraph
from mumoe_tensor.study.sweep import Plan
from mumoe_tensor.study.table import cells

#: Plotly's names of matplotlib's markers.
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
FONT = "system-ui, 'Helvetica Neue', Arial, sans-serif"

STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 {FONT}; color: #1a1a1a; margin: 0 auto; max-width: 1200px; padding: 0 16px 48px;
        overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 24px 0 4px; }}
h2 {{ font-size: 1.2rem; margin: 40px 0 4px; }}
h3 {{ font-size: 1rem; margin: 8px 0 0; }}
p {{ max-width: 75ch; }}
.setting, figcaption, footer {{ color: #555; font-size: .9rem; }}
nav {{ position: sticky; top: 0; z-index: 5; background: #fffffff2; border-bottom: 1px solid #ddd;
       padding: 8px 0; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .9rem; }}
nav label {{ display: inline-flex; align-items: center; gap: 6px; cursor: pointer; }}
nav i {{ display: inline-block; flex: none; width: 12px; height: 12px; border-radius: 3px; }}
figure {{ margin: 0; }}
.panels {{ display: grid; gap: 8px 16px;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }}
.panels.labelled {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr)); }}
.panels.one {{ grid-template-columns: 1fr; }}
.panels > div {{ min-width: 0; }}
.plot {{ width: 100%; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }}
th:first-child, td:first-child {{ text-align: left; }}
thead th {{ border-bottom: 1px solid #999; }}
"""

#: Draws every panel, and lets the switches act on all of them.
SCRIPT = """
const plots = [...document.querySelectorAll('.plot')];
const panels = JSON.parse(document.getElementById('panels').textContent);
plots.forEach((div, k) => Plotly.newPlot(div, panels[k].data, structuredClone(panels[k].layout),
  {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d']}));
document.querySelectorAll('nav input[data-subject]').forEach(box => box.addEventListener('change', () => {
  plots.forEach(div => {
    const traces = div.data.map((t, k) => t.meta === box.dataset.subject ? k : -1).filter(k => k >= 0);
    if (traces.length) Plotly.restyle(div, {visible: box.checked}, traces);
  });
}));
// A logarithmic axis keeps its ticks; a linear one makes new ones.
const linear = axis => ({...axis, type: 'linear', autorange: true, tickformat: '~s',
  range: undefined, dtick: undefined, tickvals: undefined, ticktext: undefined});
document.getElementById('log').addEventListener('change', event => plots.forEach((div, k) => {
  const change = {};
  for (const name of ['xaxis', 'yaxis']) {
    const axis = panels[k].layout[name];
    if (axis.type === 'log') change[name] = event.target.checked ? {...axis} : linear(axis);
  }
  if (Object.keys(change).length) Plotly.relayout(div, change);
}));
"""


def page(planned: Plan, results: Results, charts: list[Chart]) -> str:
    """The page of a study.

    Returns
    -------
    str
        HTML with all scripts in it, about 5 MB.
    """
    from plotly.offline import get_plotlyjs

    titles = {name: title for chart in charts for name, title in chart.titles.items()}
    figures = [_figure(panel) for chart in charts for panel in chart.panels]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html_text(planned.setting.layer.title)}: a study of mixtures of experts</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{html_text(str(planned.setting.layer))}</h1>",
        f'<p class="setting">{html_text(planned.setting.title)}</p>',
        f"<p>{html_text(' '.join(paragraph(planned, results)))}</p>",
        f"<nav>{_switches(titles)}</nav>",
        *(_section(chart) for chart in charts),
        *(
            f'<h2>{html_text(title)}</h2><div class="wide">{_table(headings, rows)}</div>'
            for title, headings, rows in cells(planned, results)
        ),
        '<p class="setting">Every figure, with its spread: results.csv, beside this page.</p>',
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{html_text(note)}</li>" for note in notes(planned, results)) + "</ul>",
        f"<footer>{_environments(results)}</footer>",
        f'<script id="panels" type="application/json">{script_json(figures)}</script>',
        f"<script>{get_plotlyjs()}</script>",
        f"<script>{SCRIPT}</script>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _switches(titles: dict[str, str]) -> str:
    boxes = [
        f'<label><input type="checkbox" data-subject="{html_text(name)}" checked>'
        f'<i style="background:{colour(name)}"></i>{html_text(title)}</label>'
        for name, title in titles.items()
    ]
    return "".join([*boxes, '<label><input type="checkbox" id="log" checked>logarithmic axes</label>'])


def _section(chart: Chart) -> str:
    plots = "".join(
        f"<div>{f'<h3>{html_text(panel.title)}</h3>' if panel.title else ''}"
        f'<div class="wide"><div class="plot" style="{_size(panel)}"></div></div></div>'
        for panel in chart.panels
    )
    look = " one" if len(chart.panels) == 1 else " labelled" if chart.panels[0].ys else ""
    return (
        f'<section id="{chart.name}"><h2>{html_text(chart.title)}</h2>'
        f'<figure><div class="panels{look}">{plots}</div>'
        f"<figcaption>{html_text(chart.caption)}</figcaption></figure></section>"
    )


def _size(panel: Panel) -> str:
    """Style of the element of a panel. A map has columns to read: on a narrow page it scrolls."""
    height = 90 + (44 if panel.is_map else 26) * len(panel.ys) if panel.ys else 300
    return f"height:{height}px" + (f";min-width:{160 + 52 * len(panel.xs)}px" if panel.is_map else "")


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html_text(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html_text(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _environments(results: Results) -> str:
    lines = ("; ".join(f"{k} {v}" for k, v in about.items() if v) for about in results.environments)
    return "<br>".join(html_text(line) for line in lines)


def _place(place: Place) -> Place:
    """A number as it is; text such that plotly, which reads tags, entities and TeX, shows it as it is."""
    return escape(place, quote=False).replace("$", "&#36;") if isinstance(place, str) else place


def _figure(panel: Panel) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "showlegend": False,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": FONT, "size": 12, "color": "#1a1a1a"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "xaxis": _axis(panel, "x"),
        "yaxis": _axis(panel, "y"),
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }
    if panel.reference:
        axis, value = panel.reference
        other = "y" if axis == "x" else "x"
        layout["shapes"] = [
            {
                "type": "line", f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1,
                f"{other}ref": "paper", "line": {"color": "#aaa", "width": 1}, "layer": "below",
            }
        ]  # fmt: skip
    data = [_trace(panel, series) for series in panel.series]
    if panel.front:
        data.append(
            {
                "type": "scatter", "mode": "lines", "x": [p.x for p in panel.front],
                "y": [p.y for p in panel.front], "hoverinfo": "skip",
                "line": {"color": "#999", "width": 1, "dash": "dash", "shape": "hv"},
            }
        )  # fmt: skip
    return {"data": data, "layout": layout}


def _axis(panel: Panel, axis: str) -> dict[str, Any]:
    categories, is_log, label = (
        (panel.xs, panel.xlog, panel.xlabel) if axis == "x" else (panel.ys, panel.ylog, panel.ylabel)
    )
    layout: dict[str, Any] = {
        "title": {"text": _place(label), "standoff": 6}, "automargin": True, "gridcolor": "#eee",
        "zeroline": False, "fixedrange": False,
    }  # fmt: skip
    if categories:
        # Plotly counts categories from below.
        order = [_place(x) for x in (categories if axis == "x" else reversed(categories))]
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
        # As of the pictures: every second decade, every decade, or 1, 2, 5 within each.
        return layout | {"dtick": "D2" if decades < 1.8 else 1 if decades < 2.5 else 2}
    return layout | {"type": "linear", "range": [low, high], "nticks": 6}


def _trace(panel: Panel, series: Series) -> dict[str, Any]:
    shade = colour(series.subject)
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
    if series.hollow:
        trace["marker"] |= {"color": "white", "line": {"color": shade, "width": 1.5}}
        trace["line"] |= {"dash": "dot"}
    if panel.is_map:
        trace["mode"] = "markers+text"
        trace["marker"] = {"symbol": "square", "size": 32, "color": shade, "opacity": 0.35}
        trace["text"] = [text.replace(", ", "<br>") for text in trace["text"]]
    elif panel.shown:
        trace |= {"mode": "markers+text", "textposition": "middle right", "cliponaxis": False}
    if any(p.low is not None for p in points):
        centres = [float(p.x if panel.errors == "x" else p.y) for p in points]
        trace[f"error_{panel.errors}"] = {
            "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": shade,
            "array": [max((p.high or c) - c, 0.0) for c, p in zip(centres, points, strict=True)],
            "arrayminus": [max(c - (p.low or c), 0.0) for c, p in zip(centres, points, strict=True)],
        }  # fmt: skip
    return trace
