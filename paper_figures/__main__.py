"""Draw the figures of the papers: ``python -m paper_figures [NAME ...] [--quick] [--fresh] [--out FOLDER]``.

Prints the numbers of each figure, and writes them as CSV and the figure as PNG and PDF. Measurements are
stored and not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_tensor.cli.console import bad_input, failures, print_json
from mumoe_tensor.cli.options import Json
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat stored measurements.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("results/figures"),
    as_json: Json = False,
) -> None:
    """Draw figures."""
    with failures():
        with bad_input():
            modules = [common.load(name) for name in names or common.FIGURES]
        drawn = {}
        with alone_in(out), progress_bar("figures") as progress:
            for done, module in enumerate(modules):
                name = common.name_of(module)
                progress(done, len(modules), name)
                rows = common.rows_of(module, out, quick, fresh)
                paths = common.write(module, rows, out)
                drawn[name] = {"rows": rows, "files": [str(path) for path in paths]}
                if not as_json:
                    print(common.as_text(module, rows), *paths, sep="\n", end="\n\n")
        if as_json:
            print_json(drawn)


if __name__ == "__main__":
    app()
