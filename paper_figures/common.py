"""What all figures share: one style, and a way to write them.

A figure is a module with ``rows(quick)``, its numbers as a tidy table, and ``draw(rows)``, its picture.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mumoe_tensor import Cost, cost, fit_rank
from mumoe_tensor.formats import formats
from mumoe_tensor.study.plots import COLOURS, STYLE
from mumoe_tensor.study.report import whole_file

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
#: The layer of the figures over the number of experts, and where its ranks are matched to a linear layer.
SIZES: dict[str, Any] = dict(in_features=768, out_features=768, bias=True)
MATCHED_AT = 64
#: Of a column of text, in inches.
WIDTH = 3.4
#: The formats that are compared, in the order of legends. Dense is what they are compared with.
FORMATS = tuple(name for name in ("cp", "tr", "tt", "tucker", "hadamard") if name in formats())
TITLES = {name: formats()[name].title for name in FORMATS}
#: What is no format: the dense layer, a mixture of dense experts, one of which only some are used.
OTHERS = {"linear": "linear layer", "dense moe": "dense mixture", "sparse moe": "sparse mixture, top 2"}
#: Formats whose lines may coincide have dashes that leave each other gaps.
LINES: dict[str, Any] = {
    "linear": "--", "dense moe": "-.", "sparse moe": ":",
    "tr": (0, (2, 4)), "tt": (2, (2, 4)), "tucker": (4, (2, 4)),
}  # fmt: skip
PRINT_STYLE = {**STYLE, "axes.spines.left": True, "lines.linewidth": 1.3, "pdf.fonttype": 42}


def title_of(name: str) -> str:
    """How a line is called in a legend."""
    return TITLES.get(name) or OTHERS[name]


def new_figure(columns: int = 1, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A figure of the width of a column of text, or of a page, and its axes side by side."""
    figure = Figure(figsize=(WIDTH if columns == 1 else 7.0, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def draw_lines(ax: Axes, rows: Sequence[Row], x: str, y: str, names: Sequence[str] = ()) -> None:
    """One line a format: `y` over `x`, each under its own colour."""
    for name in names or dict.fromkeys(row["name"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["name"] == name and row[y] is not None]
        style = {"linestyle": LINES.get(name, "-"), "color": COLOURS.get(name, "#000000")}
        ax.plot(*zip(*points, strict=True), label=title_of(name), **style)


def over_experts(quick: bool, figure: str, of_cost: Callable[[Cost], int]) -> list[Row]:
    """A figure of every format's cost, one row a format and number of experts, up to a million.

    The layer is `SIZES`, its gate counted. The rank is that of `matched_ranks`.
    """
    return [
        {"name": name, "experts": n, figure: of_cost(cost(name, experts=n, rank=rank, gate=True, **SIZES))}
        for name, rank in matched_ranks().items()
        for n in counts(quick)
    ]


def counts(quick: bool) -> list[int]:
    """Numbers of experts, from two to a million."""
    return [2**k for k in range(1, 21, 4 if quick else 1)]


def matched_ranks() -> dict[str, Any]:
    """By format the rank at which the layer has the parameters of the linear one; None if it has no rank."""
    return {
        name: fit_rank(name, experts=MATCHED_AT, parameters="match", gate=True, **SIZES)
        if formats()[name].bonds(1)
        else None
        for name in FORMATS
    }


def draw_over_experts(rows: Sequence[Row], figure: str, label: str) -> Figure:
    """A figure over the number of experts, both logarithmic."""
    drawn, (ax,) = new_figure(height=2.9)
    draw_lines(ax, rows, "experts", figure)
    ax.set(xscale="log", yscale="log", xlabel="experts N", ylabel=label)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False)
    return drawn


def write(module: ModuleType, folder: Path, quick: bool) -> list[Path]:
    """Print a figure's numbers, and write them as CSV and its picture as PNG and PDF.

    Parameters
    ----------
    module : module
        A figure.
    folder : Path
    quick : bool
        Fewer points.

    Returns
    -------
    list of Path
    """
    name = module.__name__.rpartition(".")[2]
    rows = module.rows(quick)
    print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}\n{table(rows)}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".csv", ".png", ".pdf")]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(paths[0]) as file:
        file.write(text.getvalue().encode())
    with matplotlib.rc_context(PRINT_STYLE):
        figure = module.draw(rows)
        for path in paths[1:]:
            # Without a date in it the same figure is the same file.
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
            with whole_file(path) as file:
                figure.savefig(file, format=path.suffix[1:], dpi=300, metadata=metadata)
    return paths


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in cells)


def run(known: dict[str, Callable[[], ModuleType]], arguments: Sequence[str] | None = None) -> None:
    """Draw the figures that the command line names, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures", description="Draw figures of the papers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "figures", help="folder to write to")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in known:
            parser.error(f"unknown figure {name!r}; the figures are {', '.join(known)}")
    for name in options.names or known:
        for path in write(known[name](), options.out, options.quick):
            print(path)
