"""Options that several commands have."""

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
        help="Name of the format; `mumoe-tensor formats` lists them. With settings its config entry as JSON: "
        """'{"name": "btt", "splits": {"i": [16, 48]}}'.""",
        show_default=False,
    ),
]
Experts = Annotated[
    str,
    typer.Option(help="Number of experts, levels as 64x64, or none for no level.", show_default=False),
]
InFeatures = Annotated[int, typer.Option(help="Size of the input.", show_default=False)]
OutFeatures = Annotated[int, typer.Option(help="Size of the output.", show_default=False)]
Hidden = Annotated[
    int | None, typer.Option(help="Count two layers with this size between them.", show_default=False)
]
Gated = Annotated[
    bool,
    typer.Option(
        "--gated/--no-gated", help="With --hidden: the first layer twice, one a factor of the other."
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(help="One number a bond, e.g. 64,128,128; see `mumoe-tensor formats`.", show_default=False),
]
OpenRank = Annotated[
    str | None,
    typer.Option(
        help="One number a bond, ? for the one to solve, e.g. 4,4,?; by default the format's convention.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(help="Number of inputs.")]
Bias = Annotated[
    bool,
    typer.Option(
        "--bias/--no-bias", help="Every expert has a bias: one more row in the weight's input mode."
    ),
]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", help="Count the gate.")]
Minimize = Annotated[str, typer.Option(help="time, flops or peak.")]
Implementation = Annotated[str, typer.Option(help="factorized, reconstructed or auto.")]
MemoryLimit = Annotated[
    int | None,
    typer.Option(help="Largest intermediate, in elements, or in bytes of --dtype.", show_default=False),
]
Constants = Annotated[
    str | None,
    typer.Option(help="weights: make products of weights alone ahead, uncounted.", show_default=False),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Count bytes of float64, float32, bfloat16 or float16 instead of elements.", show_default=False
    ),
]
MachineName = Annotated[
    str,
    typer.Option(
        "--machine",
        help="What to plan for, in --dtype or float32: cpu, cuda, h200, or FLOPs and bytes a second as JSON: "
        """'{"flops": 3e14, "bandwidth": 2e12, "launch": 4e-6, "dtype": "bfloat16"}'.""",
    ),
]
Parameters = Annotated[
    str, typer.Option(help="The budget: a number, match for that of the dense layer, or a multiple as 2x.")
]
Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        help="A Python file to run first, that registers formats; may be repeated.",
        callback=lambda paths: _import_files(paths or []),
        is_eager=True,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
