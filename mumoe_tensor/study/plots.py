"""Charts as image files (matplotlib)."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mumoe_tensor.files import whole_file
from mumoe_tensor.study.chart import Chart, Panel, Series, limits
from mumoe_tensor.study.subjects import BASELINE, SPARSE

#: Okabe and Ito's palette, safe for all kinds of colour vision. A format has the same colour everywhere.
COLOURS = {
    BASELINE: "#000000",
    SPARSE: "#999933",
    "cp": "#0072B2",
    "tr": "#D55E00",
    "tt": "#E69F00",
    "tucker": "#009E73",
    "hadamard": "#CC79A7",
    "dense": "#56B4E9",
    # Tol's muted colours; those of split formats are close to those of their unsplit formats.
    "btt": "#332288",
    "cp-matrix": "#88CCEE",
    "kron": "#882255",
    "lowrank": "#CC6677",
    "monarch": "#117733",
    "shared-expert": "#AA4499",
    "tt-matrix": "#DDCC77",
    "tucker-matrix": "#44AA99",
}
#: Colours of formats that are not in the library, and of formats with settings.
FURTHER_COLOURS = ("#7F7F7F", "#8C564B", "#BCBD22", "#4B0082", "#FF7F0E")

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "text.parse_math": False,  # names are plain text, also with a "$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.hashsalt": "mumoe_tensor",
}
#: Markers distinguish subjects where colours cannot.
MARKERS: dict[str, Any] = dict(zip(COLOURS, [*"o*svDPX^<8>phdH", (4, 1, 0)], strict=True))
#: Stars of three and of six points.
FURTHER_MARKERS = ((3, 1, 0), (6, 1, 0))
#: Page width in inches, and number of panels in a row.
WIDTH, MOST_COLUMNS = 7.2, 4
LEGEND_COLUMNS = 4


def colour(name: str) -> str:
    """Colour of a format or another subject, the same in every chart and study."""
    return COLOURS.get(name) or FURTHER_COLOURS[crc32(name.encode()) % len(FURTHER_COLOURS)]


def marker(name: str) -> Any:
    """Matplotlib marker of a format or another subject."""
    return MARKERS.get(name) or FURTHER_MARKERS[crc32(name.encode()) % len(FURTHER_MARKERS)]


def draw(chart: Chart) -> Figure:
    """Draw a chart.

    Returns
    -------
    matplotlib.figure.Figure
        7.2 inches wide, the page width.
    """
    first = chart.panels[0]
    columns = min(len(chart.panels), MOST_COLUMNS if len(chart.panels) > 3 and not first.ys else 3)
    lines = -(-len(chart.panels) // columns)
    height = 0.7 + 0.24 * len(first.ys) if first.ys else 2.1
    with matplotlib.rc_context(STYLE):
        margins = 0.3 if first.ys else 0.4 + 0.2 * -(-len(chart.titles) // LEGEND_COLUMNS)
        figure = Figure(figsize=(WIDTH, margins + lines * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False, sharey="row" if first.ys else False)
        for ax in axes.flat[len(chart.panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes.flat, chart.panels, strict=False):
            _frame(ax, panel)
            for series in panel.series:
                _points(ax, panel, series)
        figure.suptitle(chart.title, x=0.01, ha="left", weight="bold")
        if not first.ys:
            handles = [
                Line2D([], [], color=colour(name), marker=marker(name), markersize=4, linewidth=1.2)
                for name in chart.titles
            ]
            figure.legend(
                handles,
                list(chart.titles.values()),
                loc="outside lower center",
                ncols=LEGEND_COLUMNS,
                frameon=False,
            )
    return figure


def write_plots(charts: list[Chart], folder: Path) -> list[Path]:
    """Write charts as PNG and SVG, each atomically.

    Returns
    -------
    list of Path
    """
    paths = []
    for chart in charts:
        figure = draw(chart)
        for suffix in (".png", ".svg"):
            path = folder / f"{chart.name}{suffix}"
            # Without a date, identical figures give identical files.
            metadata = {"Date": None} if suffix == ".svg" else {}
            with matplotlib.rc_context(STYLE), whole_file(path) as file:
                figure.savefig(file, format=suffix[1:], dpi=200, metadata=metadata)
            paths.append(path)
    return paths


def _frame(ax: Any, panel: Panel) -> None:
    """Title, labels, scales and ticks."""
    ax.set_title(panel.title, loc="left")
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    for axis, is_log in ((ax.xaxis, panel.xlog), (ax.yaxis, panel.ylog)):
        name = axis.axis_name
        if name == "y" and panel.ys:
            ax.set_yticks(range(len(panel.ys)), panel.ys)
            ax.set_ylim(len(panel.ys) - 0.4, -0.6)
            axis.set_tick_params(length=0)
            continue
        low, high = limits(panel, name)
        if is_log:
            getattr(ax, f"set_{name}scale")("log")
            span = high / low
            # At most about five ticks: every second decade, every decade, or 1, 2, 5 within each.
            base, subs = (100, (1.0,)) if span > 1e4 else (10, (1.0,)) if span > 60 else (10, (1.0, 2.0, 5.0))
            axis.set_major_locator(LogLocator(base, subs=subs))
            axis.set_minor_locator(NullLocator())
            if name == "x" and panel.xticks:
                axis.set_major_locator(FixedLocator(panel.xticks))
        else:
            axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        getattr(ax, f"set_{name}lim")(low, high)
    if panel.reference is not None:
        draw_line = ax.axvline if panel.values == "x" else ax.axhline
        draw_line(panel.reference, color="0.7", linewidth=0.8, zorder=0)
    if panel.front:
        x, y = [float(p.x) for p in panel.front], [float(p.y) for p in panel.front]
        ax.step(x, y, where="post", color="0.6", linewidth=0.8, linestyle="--", zorder=0)


def _points(ax: Any, panel: Panel, series: Series) -> None:
    """Points with error bars, and the line that joins them, if any."""
    x = [float(p.x) for p in series.points]
    y = [panel.ys.index(str(p.y)) if panel.ys else float(p.y) for p in series.points]
    centres = x if panel.values == "x" else y
    below = [c - (p.low if p.low is not None else c) for c, p in zip(centres, series.points, strict=True)]
    above = [(p.high if p.high is not None else c) - c for c, p in zip(centres, series.points, strict=True)]
    ax.errorbar(
        x,
        y,
        # A median of ratios may be outside the quartiles by a rounding error, and a figure may be infinite.
        **{f"{panel.values}err": [[e if 0 < e < inf else 0.0 for e in es] for es in (below, above)]},
        marker=marker(series.subject),
        linestyle="-" if series.line else "",
        color=colour(series.subject),
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
    )
    if panel.ys:
        for a, b, point in zip(x, y, series.points, strict=True):
            right = max(a, point.high or a)
            ax.annotate(point.text, (right, b), xytext=(5, 0), textcoords="offset points", va="center")


def short(value: float) -> str:
    """A number in the short form of a tick label: 0.5, 2,048, 16k, 1M."""
    if value == int(value) and abs(value) < 1e4:
        return f"{value:,.0f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
