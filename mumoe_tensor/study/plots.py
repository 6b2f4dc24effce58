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

from mumoe_tensor.formats import formats
from mumoe_tensor.study.report import BACKENDS, whole_file
from mumoe_tensor.study.sweep import BASELINE, Row, Study

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

STYLE = {
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
    panels: list[tuple[str, Callable[[Row], int]]] = [
        ("Parameters", lambda row: row.parameters),
        ("FLOPs", lambda row: row.flops),
        ("Peak memory of a contraction", lambda row: row.peak_bytes),
        ("Saved for backward", lambda row: row.saved_bytes),
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
    rows = [row for row in study.rows if row.time_ratio is not None]
    _frame(ax, "Measured forward time", [x for row in rows for x in (row.time_ratio_q1, row.time_ratio_q3)])
    offsets = [0.0] if len(study.backends) == 1 else [-0.18, 0.18]
    for y, subject in enumerate(study.sweep.subjects):
        measured = study.of(subject.name)
        if subject.skip:
            ax.text(1, y, " not run", va="center", color="0.4")
        for offset, marker, backend in zip(offsets, MARKERS, study.backends, strict=False):
            row = measured.get(backend)
            if row is None or row.time_ratio is None:
                continue
            spread = [[row.time_ratio - row.time_ratio_q1], [row.time_ratio_q3 - row.time_ratio]]
            ax.errorbar(
                row.time_ratio,
                y + offset,
                xerr=spread,
                fmt=marker,
                color=colour(row.name),
                markerfacecolor="white" if marker == "s" else None,
                markersize=4,
                elinewidth=1,
            )
    if len(study.backends) > 1:
        handles = [
            Line2D([], [], linestyle="", marker=m, color="0.2", markersize=4, markerfacecolor=face)
            for m, face in zip(MARKERS, ("0.2", "white"), strict=True)
        ]
        names = [BACKENDS[backend] for backend in study.backends]
        ax.set_title("")
        ax.legend(
            handles, names, title="Measured forward time", title_fontproperties={"weight": "bold", "size": 9},
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0, borderaxespad=0.3,
            handletextpad=0.1, columnspacing=1, alignment="left",
        )  # fmt: skip
    else:
        ax.set_title(f"Measured forward time, {BACKENDS[study.backends[0]]}", loc="left")


def _frame(ax: Any, title: str, ratios: Sequence[float]) -> None:
    """A logarithmic axis about 1 on which all ratios and their labels have room."""
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    span = high / low
    ax.set_title(title, loc="left")
    ax.set_xscale("log")
    ax.set_xlim(low / span**0.08, high * span**0.3)
    subs = (1.0,) if span > 100 else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(LogLocator(10, subs=subs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    ax.tick_params(axis="y", length=0)


def _lollipop(ax: Any, y: float, ratio: float, name: str) -> None:
    """A dot at the ratio, tied to 1, and the number beside it."""
    ax.plot([1, ratio], [y, y], color=colour(name), linewidth=1.5)
    ax.plot([ratio], [y], MARKERS[0], color=colour(name), markersize=5)
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
    # On the right of the line, which for a ratio below 1 ends at 1.
    ax.annotate(text, (max(ratio, 1), y), xytext=(5, 0), textcoords="offset points", va="center")
