"""The shared style of the figures, and functions to compute and write them.

A figure is a module with ``rows(quick)``, which returns its numbers as a tidy table, and ``draw(rows)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mumoe_tensor import Cost, LayerSpec, cost, get_format
from mumoe_tensor.files import replacing, write_table
from mumoe_tensor.formats import formats
from mumoe_tensor.ledger import Row
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.study.subjects import BASELINE, SPARSE
from mumoe_tensor.text_table import text_table
from paper_figures.experiments.tables import grouped

FOLDER = Path(__file__).resolve().parent
FIGURES = tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if path.stem != "common"))
#: The linear layer in figures against the number of experts, and the number at which mixtures match it.
LINEAR = LayerSpec("dense", experts=(), in_features=768, out_features=768, bias=True)
MATCHED_AT = 64
#: Width of a text column, in inches.
WIDTH = 3.4
#: The formats to compare, in the order of legends; dense is the reference.
FORMATS = ("cp", "tr", "tt", "tucker", "hadamard")
TITLES = {name: formats()[name].title for name in FORMATS}
#: Other layers: the dense layer, a mixture of dense experts, and a sparse mixture of dense experts.
OTHERS = {"linear": "linear layer", "dense moe": "dense mixture", "sparse moe": "sparse mixture, top 2"}
#: Their names in the library.
KINDS = {"linear": BASELINE, "dense moe": "dense", "sparse moe": SPARSE}
#: Dash patterns that interleave, for formats whose lines may coincide.
LINES: dict[str, Any] = {
    "linear": "--", "dense moe": "-.", "sparse moe": ":",
    "tr": (0, (2, 4)), "tt": (2, (2, 4)), "tucker": (4, (2, 4)),
}  # fmt: skip
PRINT_STYLE = {
    **STYLE,
    "axes.spines.left": True,
    "lines.linewidth": 1.3,
    "legend.handlelength": 2.6,
    "pdf.fonttype": 42,
    "text.parse_math": True,  # labels of figures have formulas
}


def title_of(name: str) -> str:
    """The name of a line in a legend."""
    return TITLES.get(name) or OTHERS[name]


def colour_of(name: str) -> str:
    """The colour of a line, the same in all figures of the library."""
    return colour(KINDS.get(name, name))


def new_figure(columns: int = 1, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a text column or a page, and its axes side by side."""
    figure = Figure(figsize=(WIDTH if columns == 1 else 7.0, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def draw_lines(ax: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    """One line per format, `y` over `x` in the format's colour; quartiles of `y` as a pale band."""
    for name, group in grouped(rows, "name").items():
        look = {"color": colour_of(name), "linestyle": LINES.get(name, "-"), "label": title_of(name)}
        draw_line(ax, group, x, y, **look | style)


def draw_line(ax: Axes, rows: Sequence[Row], x: str, y: str, unit: float = 1, **style: Any) -> None:
    """A line of `y` over `x`, in multiples of a unit; from ``y_low`` to ``y_high``, if given, a pale band."""
    places = [row[x] for row in rows]
    (line,) = ax.plot(places, [row[y] / unit for row in rows], **style)
    if f"{y}_low" in rows[0]:
        low, high = ([row[f"{y}_{end}"] / unit for row in rows] for end in ("low", "high"))
        ax.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_interval(ax: Axes, x: float, row: Row, y: str, unit: float = 1, **style: Any) -> None:
    """A point of `y` with its error bar, from ``y_low`` to ``y_high``, in multiples of a unit."""
    low, value, high = (row[f"{y}{end}"] / unit for end in ("_low", "", "_high"))
    ax.errorbar(x, value, [[value - low], [high - value]], markersize=4, capsize=2, **style)


def set_experts_axis(ax: Axes, rows: Sequence[Row]) -> None:
    """A logarithmic axis with a tick for each of a few numbers of experts."""
    ticks = sorted({row["experts"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()
    ax.set_xlabel("experts N")


def pretrained() -> np.ndarray:
    """Three layers of one shape as (layer, input, output): see ``tests/data/README.md``."""
    with np.load(FOLDER.parent / "tests" / "data" / "lite0_expand.npz") as file:
        return file["weight"].astype(float)


def over_experts(quick: bool, figure: str, of_cost: Callable[[Cost], int]) -> list[Row]:
    """The cost of every format, including the gate, for every number of experts; see `matched_layers`."""
    return [
        {"name": name, "experts": n, figure: of_cost(cost(replace(layer, experts=(n,)), gate=True))}
        for name, layer in matched_layers().items()
        for n in counts(quick)
    ]


def counts(quick: bool) -> list[int]:
    """Numbers of experts, from two to a million."""
    return [2**k for k in range(1, 21, 4 if quick else 1)]


def matched_layers() -> dict[str, LayerSpec]:
    """By format with a rank, the layer of `MATCHED_AT` experts with the parameters of the linear layer."""
    layers = {
        name: replace(LINEAR, format=get_format(name), experts=(MATCHED_AT,), rank=None) for name in FORMATS
    }
    return {name: layer.fitted() if layer.rank is None else layer for name, layer in layers.items()}


def rank_text(layer: LayerSpec) -> str:
    """The rank of a layer in a table: a single number if the format has one bond."""
    rank = layer.full_rank
    return str(rank[0] if len(rank) == 1 else rank or None)


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """The legend of an axis, below all of the figure."""
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)


def draw_over_experts(rows: Sequence[Row], figure: str, label: str) -> Figure:
    """A quantity against the number of experts, with logarithmic axes."""
    drawn, (ax,) = new_figure(height=2.9)
    draw_lines(ax, rows, "experts", figure)
    ax.set(xscale="log", yscale="log", xlabel="experts N", ylabel=label)
    legend_below(drawn, ax, 2)
    return drawn


def load(name: str) -> ModuleType:
    """The module of a figure."""
    if name not in FIGURES:
        raise ValueError(f"a figure must be one of {', '.join(FIGURES)}, got {name!r}.")
    return import_module(f"paper_figures.{name}")


def write(module: ModuleType, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a figure's numbers as CSV and the figure as PNG and PDF; they replace older files together."""
    names = [f"{name_of(module)}{suffix}" for suffix in (".csv", ".png", ".pdf")]
    with replacing(folder, names) as new, matplotlib.rc_context(PRINT_STYLE):
        write_table(new / names[0], list(rows[0]), rows)
        figure = module.draw(rows)
        figure.savefig(new / names[1], dpi=300)
        # Without a date, identical figures give identical files.
        figure.savefig(new / names[2], dpi=300, metadata={"CreationDate": None})
    return [folder / name for name in names]


def name_of(module: ModuleType) -> str:
    """The name of a figure."""
    return module.__name__.rpartition(".")[2]


def as_text(module: ModuleType, rows: Sequence[Row]) -> str:
    """A figure's numbers as text."""
    return f"{name_of(module)}: {(module.__doc__ or '').splitlines()[0]}\n{table(rows)}"


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        spec = "," if isinstance(value, int) else ".4g" if isinstance(value, float) else ""
        return format(value, spec)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return text_table(cells, ">" * len(rows[0]))
