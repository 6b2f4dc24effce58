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
Experts = Annotated[
    str,
    typer.Option(help="Number of experts, e.g. 64, 64x64 for two levels, or none.", show_default=False),
]
InFeatures = Annotated[int, typer.Option(help="Number of input features.", show_default=False)]
OutFeatures = Annotated[int, typer.Option(help="Number of output features.", show_default=False)]
Hidden = Annotated[int | None, typer.Option(help="Hidden size of a block of two layers.", show_default=False)]
Gated = Annotated[
    bool,
    typer.Option(
        "--gated/--no-gated",
        help="With --hidden: a gated block, with two layers to the hidden units.",
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="Rank, one number per bond, e.g. 64,128,128; see `mumoe-tensor formats`.", show_default=False
    ),
]
OpenRank = Annotated[
    str | None,
    typer.Option(
        help="Rank, one number per bond, ? to solve for one, e.g. 4,4,?. By default all are solved for.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(help="Number of inputs in a batch.")]
Bias = Annotated[
    bool,
    typer.Option(
        "--bias/--no-bias", help="Whether every expert has a bias, an additional row of the input mode."
    ),
]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", help="Include the gate.")]
Minimize = Annotated[str, typer.Option(help="What the plan minimizes: time, flops or peak (memory).")]
Implementation = Annotated[
    str,
    typer.Option(help="factorized (contract the factors), reconstructed (form the weight) or auto."),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        help="Limit for the largest intermediate result, in elements, or in bytes with --dtype.",
        show_default=False,
    ),
]
Constants = Annotated[
    str | None,
    typer.Option(
        help="weights: products of only weights are precomputed and not counted.", show_default=False
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Count memory in bytes of float64, float32, bfloat16 or float16, instead of elements.",
        show_default=False,
    ),
]
MachineName = Annotated[
    str,
    typer.Option(
        "--machine",
        help="Machine to predict times for: cpu, cuda, h200, or its speeds as JSON: "
        """'{"flops": 3e14, "bandwidth": 2e12, "launch": 4e-6, "dtype": "bfloat16"}'.""",
    ),
]
Parameters = Annotated[
    str, typer.Option(help="Number of parameters, match for that of the dense layer, or a multiple (2x).")
]
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
