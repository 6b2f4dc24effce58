"""Charts as image files (matplotlib)."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mumoe_tensor.files import whole_file
from mumoe_tensor.study.charts import Chart, Panel, Series
from mumoe_tensor.study.subjects import BASELINE, SPARSE

#: Colour, matplotlib marker and plotly symbol of each subject, the same in every chart. The colours are Okabe
#: and Ito's, safe for all kinds of colour vision, and for formats with split modes Tol's muted ones.
LOOKS: dict[str, tuple[str, Any, str]] = {
    BASELINE: ("#000000", "o", "circle"),
    SPARSE: ("#999933", "*", "star"),
    "cp": ("#0072B2", "s", "square"),
    "tr": ("#D55E00", "v", "triangle-down"),
    "tt": ("#E69F00", "D", "diamond"),
    "tucker": ("#009E73", "P", "cross"),
    "hadamard": ("#CC79A7", "X", "x"),
    "dense": ("#56B4E9", "^", "triangle-up"),
    "btt": ("#332288", "<", "triangle-left"),
    "cp-matrix": ("#88CCEE", "8", "octagon"),
    "kron": ("#882255", ">", "triangle-right"),
    "lowrank": ("#CC6677", "p", "pentagon"),
    "monarch": ("#117733", "h", "hexagon"),
    "shared-expert": ("#AA4499", "d", "diamond-tall"),
    "tt-matrix": ("#DDCC77", "H", "hexagon2"),
    "tucker-matrix": ("#44AA99", (4, 1, 0), "star-diamond"),
}
#: Those of other formats, and of formats with settings.
FURTHER: list[tuple[str, Any, str]] = [
    ("#7F7F7F", (3, 1, 0), "star-triangle-up"),
    ("#8C564B", (6, 1, 0), "hexagram"),
    ("#BCBD22", (3, 1, 0), "star-triangle-up"),
    ("#4B0082", (6, 1, 0), "hexagram"),
    ("#FF7F0E", (3, 1, 0), "star-triangle-up"),
]
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
#: Page width in inches, and number of panels and of legend entries in a row.
WIDTH, COLUMNS = 7.2, 4


def look(name: str) -> tuple[str, Any, str]:
    """Colour, matplotlib marker and plotly symbol of a format or another subject."""
    return LOOKS.get(name) or FURTHER[crc32(name.encode()) % len(FURTHER)]


def colour(name: str) -> str:
    """Colour of a format or another subject, the same in every chart and study."""
    return look(name)[0]


def draw(chart: Chart) -> Figure:
    """Draw a chart, 7.2 inches wide."""
    panels, ys = chart.panels, chart.panels[0].ys
    columns = min(len(panels), 3 if ys else COLUMNS)
    lines = -(-len(panels) // columns)
    if ys:
        height = 0.3 + lines * (0.7 + 0.24 * len(ys))
    else:
        height = 0.4 + 0.2 * -(-len(chart.titles) // COLUMNS) + 2.1 * lines
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False, sharey="row" if ys else False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        handles = {}
        for ax, panel in zip(axes.flat, panels, strict=False):
            _frame(ax, panel)
            for series in panel.series:
                handles[series.subject] = _points(ax, panel, series)
        figure.suptitle(chart.title, x=0.01, ha="left", weight="bold")
        if not ys:
            labels = [chart.titles[name] for name in handles]
            figure.legend(
                list(handles.values()), labels, loc="outside lower center", ncols=COLUMNS, frameon=False
            )
    return figure


def write_plots(charts: list[Chart], folder: Path) -> list[Path]:
    """Write charts as PNG and SVG, each atomically."""
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
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    for axis in "x" if panel.ys else "xy":
        low, high, is_log = panel.limits(axis)
        if is_log:
            # At most about five ticks: every second decade, every decade, 1, 2, 5 within each, or a few
            # equidistant ones where fewer than two of these may lie between the limits.
            base, subs = (100 if high / low > 1e4 else 10), ((1.0,) if high / low > 60 else (1.0, 2.0, 5.0))
            ax.set(**{f"{axis}scale": "log"})
            locator = MaxNLocator(3) if high / low < 5 else LogLocator(base, subs)
            getattr(ax, f"{axis}axis").set(major_locator=locator)
        getattr(ax, f"{axis}axis").set(minor_locator=NullLocator(), major_formatter=FuncFormatter(_tick))
        ax.set(**{f"{axis}lim": (low, high)})
    if panel.ys:
        ax.set_yticks(range(len(panel.ys)), panel.ys)
        ax.set_ylim(len(panel.ys) - 0.4, -0.6)
        ax.yaxis.set_tick_params(length=0)
    if panel.reference is not None:
        draw_line = ax.axvline if panel.ys else ax.axhline
        draw_line(panel.reference, color="0.7", linewidth=0.8, zorder=0)
    if panel.front:
        x, y = [p.x for p in panel.front], [p.y for p in panel.front]
        ax.step(x, y, where="post", color="0.6", linewidth=0.8, linestyle="--", zorder=0)


def _points(ax: Any, panel: Panel, series: Series) -> Any:
    """Points with error bars, and the line that joins them, if any."""
    points = series.points
    x = [p.x for p in points]
    y = [panel.ys.index(str(p.y)) if panel.ys else float(p.y) for p in points]
    centres = x if panel.ys else y
    below = [c - (c if p.low is None else p.low) for c, p in zip(centres, points, strict=True)]
    above = [(c if p.high is None else p.high) - c for c, p in zip(centres, points, strict=True)]
    # A median of ratios may be outside the quartiles by a rounding error, and a figure may be infinite.
    errors = [[e if 0 < e < inf else 0.0 for e in es] for es in (below, above)]
    shade, shape, _ = look(series.subject)
    style = {"marker": shape, "color": shade, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}
    style |= {"linestyle": "-" if panel.lines else "", "xerr" if panel.ys else "yerr": errors}
    if panel.ys:
        for a, b, point in zip(x, y, points, strict=True):
            right = (max(a, point.high or a), b)
            ax.annotate(point.text, right, xytext=(5, 0), textcoords="offset points", va="center")
    return ax.errorbar(x, y, **style)


def _tick(value: float, _: object) -> str:
    """A tick label in a short form: 0.5, 2,048, 16k, 1M."""
    if value == int(value) and abs(value) < 1e4:
        return f"{value:,.0f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
