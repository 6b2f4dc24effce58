"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_tensor.cli.console import bad_input
from mumoe_tensor.formats.elsewhere import import_file


def _import_files(paths: list[Path]) -> list[Path]:
    with bad_input():
        for path in paths:
            import_file(path)
    return paths


FormatName = Annotated[
    str,
    typer.Argument(
        help="Name of the format; see `mumoe-tensor formats`. With settings, its config entry as JSON: "
        """'{"name": "btt", "splits": {"i": [16, 48]}}'.""",
        show_default=False,
    ),
]
Gate = Annotated[bool, typer.Option("--gate", help="Include the gate.")]
Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        help="Python file to run first, which registers formats; may be repeated.",
        callback=lambda paths: _import_files(paths or []),
        is_eager=True,
        show_default=False,
    ),
]
Jobs = Annotated[
    str,
    typer.Option(
        help="Number of parallel fits and training runs, or address of a Dask scheduler: tcp://host:8786."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
