"""Draw the figures of the papers: ``python -m paper_figures [NAME ...] [--quick] [--out FOLDER]``.

Prints the numbers of each figure, and writes them as CSV and the figure as PNG and PDF.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import threads
from mumoe_tensor.cli.console import bad_input, failures
from mumoe_tensor.files import alone_in
from mumoe_tensor.progress import progress_bar
from paper_figures import common

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def figures(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Figures to draw; by default all.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("results/figures"),
) -> None:
    """Draw figures."""
    with failures():
        with bad_input():
            modules = [common.load(name) for name in names or common.FIGURES]
        # On one thread: several threads wait for each other when another process takes a core.
        with alone_in(out), progress_bar("figures") as progress, threads(1):
            for done, module in enumerate(modules):
                progress(done, len(modules), common.name_of(module))
                rows = module.rows(quick)
                paths = common.write(module, rows, out)
                print(common.as_text(module, rows), *paths, sep="\n", end="\n\n")


if __name__ == "__main__":
    app()
