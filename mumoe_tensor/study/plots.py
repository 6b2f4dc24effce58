"""The picture of a study: every format beside the dense layer it takes the place of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mumoe_tensor.contraction.plan import ITEMSIZE
from mumoe_tensor.formats import formats
from mumoe_tensor.study.report import BACKENDS, whole_file
from mumoe_tensor.study.sweep import BASELINE, DTYPE, Row, Study

#: Okabe and Ito's colours, told apart by every kind of colour vision. A format keeps its colour everywhere.
COLOURS = {
    BASELINE: "#000000",
    "cp": "#0072B2",
    "tr": "#D55E00",
    "tt": "#E69F00",
    "tucker": "#009E73",
    "hadamard": "#CC79A7",
    "dense": "#56B4E9",
}
#: For formats that are not in the library, in the order of their registration.
FURTHER_COLOURS = ("#7F7F7F", "#8C564B", "#BCBD22", "#4B0082")

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.hashsalt": "mumoe_tensor",
}
#: Full and hollow markers of the backends, in their order.
MARKERS = ("o", "s")


def colour(name: str) -> str:
    """Colour of a format, or of the dense layer."""
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in formats() if other not in COLOURS]
    return FURTHER_COLOURS[others.index(name) % len(FURTHER_COLOURS)]


def draw(study: Study) -> Figure:
    """Draw cost, expert rank and measured time of every format against the dense layer.

    Parameters
    ----------
    study : Study

    Returns
    -------
    matplotlib.figure.Figure
        7.2 inches wide, the width of a page.
    """
    subjects = study.sweep.subjects
    rows = [next(iter(study.of(subject.name).values())) for subject in subjects]
    # The dense layer keeps its input and, if it is a single one, nothing else.
    inputs = study.sweep.batch * study.sweep.layer.in_features * ITEMSIZE[DTYPE]
    panels: list[tuple[str, Callable[[Row], int]]] = [
        ("Parameters", lambda row: row.parameters),
        ("FLOPs", lambda row: row.flops),
        ("Peak memory", lambda row: row.peak_bytes),
        ("Saved, with the input", lambda row: row.saved_bytes + inputs),
        ("Largest rank of an expert", lambda row: row.max_expert_rank),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.5 + 0.42 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3, sharey=True).flat
        for ax, (title, value) in zip(axes, panels, strict=False):
            reference = value(rows[0])
            ratios = [value(row) / reference for row in rows]
            _frame(ax, title, ratios)
            for y, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
                _lollipop(ax, y, ratio, row.name)
        _times(axes[-1], study)
        for ax in axes:
            ax.set_yticks(range(len(rows)), [row.title for row in rows])
            ax.set_ylim(len(rows) - 0.4, -0.6)
        figure.supxlabel(f"relative to the {study.sweep.layer.kind} (logarithmic)", fontsize=8)
        figure.suptitle(study.sweep.title)
    return figure


def write_plot(study: Study, stem: Path) -> list[Path]:
    """Write the picture as PNG and SVG.

    Parameters
    ----------
    study : Study
    stem : Path
        Where, without the suffix.

    Returns
    -------
    list of Path
    """
    figure = draw(study)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        # Without a date in it the same figure is the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        with matplotlib.rc_context(STYLE), whole_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=200, metadata=metadata)
    return paths


def _times(ax: Any, study: Study) -> None:
    """Measured forward time with quartiles, one marker a backend."""
    measured = [(row, row.ratios) for row in study.rows if row.ratios is not None]
    _frame(ax, "", [x for _, ratios in measured for x in ratios])
    height = {subject.name: y for y, subject in enumerate(study.sweep.subjects)}
    for subject in study.sweep.subjects:
        if subject.skip:
            ax.text(1, height[subject.name], " not run", va="center", color="0.4")
    for row, (q1, median, q3) in measured:
        k = study.backends.index(row.backend)
        ax.errorbar(
            median,
            height[row.name] + (0.36 * k - 0.18) * (len(study.backends) > 1),
            xerr=[[median - q1], [q3 - median]],
            fmt=MARKERS[k],
            color=colour(row.name),
            markerfacecolor=colour(row.name) if k == 0 else "white",
            markersize=4,
            elinewidth=1,
        )
    # A legend of one line under its own title, in the place of the title.
    handles = [
        Line2D([], [], linestyle="", marker=marker, color="0.2", markersize=4, markerfacecolor=face)
        for marker, face in zip(MARKERS, ("0.2", "white"), strict=True)
    ]
    ax.legend(
        handles[: len(study.backends)],
        [BACKENDS[backend] for backend in study.backends],
        title="Measured forward time",
        title_fontproperties={"weight": "bold", "size": STYLE["axes.titlesize"]},
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        ncols=2,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.1,
        columnspacing=1,
    )


def _frame(ax: Any, title: str, ratios: Sequence[float]) -> None:
    """A logarithmic axis about 1 on which all ratios and their labels have room."""
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    span = high / low
    ax.set_title(title, loc="left")
    ax.set_xscale("log")
    ax.set_xlim(low / span**0.08, high * span**0.3)
    # At most about five ticks: every second decade, every decade, or 1, 2, 5 within each.
    base, subs = (100, (1.0,)) if span > 1000 else (10, (1.0,)) if span > 50 else (10, (1.0, 2.0, 5.0))
    ax.xaxis.set_major_locator(LogLocator(base, subs=subs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    ax.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    ax.tick_params(axis="y", length=0)


def _lollipop(ax: Any, y: float, ratio: float, name: str) -> None:
    """A dot at the ratio, tied to 1, and the number beside it."""
    ax.plot([1, ratio], [y, y], color=colour(name), linewidth=1.5)
    ax.plot([ratio], [y], MARKERS[0], color=colour(name), markersize=5)
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
    # On the right of the line, which for a ratio below 1 ends at 1.
    ax.annotate(text, (max(ratio, 1), y), xytext=(5, 0), textcoords="offset points", va="center")
