"""The command that measures a layer: study."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mumoe_tensor.cli.configs import options_of
from mumoe_tensor.cli.console import bad_input, new_table, print_json, resumable, show
from mumoe_tensor.cli.options import Imports, Jobs, Json
from mumoe_tensor.cli.values import read_jobs
from mumoe_tensor.configs.layer import LayerConfig
from mumoe_tensor.configs.study import QUICK, StudyConfig
from mumoe_tensor.extras import require
from mumoe_tensor.progress import progress_bar

CORES = str(os.cpu_count() or 1)


@options_of("sizes", LayerConfig, ("in_features", "out_features", "hidden"))
@options_of("options", StudyConfig, quick=QUICK)
def study(
    layer: Annotated[
        str | None,
        typer.Option(
            help="Published layer: gpt2-mlp, clip-head, mixer-s16-token or mixer-s16-channel; or give the "
            "sizes below.",
            show_default="gpt2-mlp",
        ),
    ] = None,
    *,
    sizes: dict[str, Any],
    options: dict[str, Any],
    quick: Annotated[bool, typer.Option("--quick", help="Small and short, to try the command.")] = False,
    jobs: Jobs = CORES,
    setting: Annotated[
        Path | None,
        typer.Option(
            help="The study.json of a study to run again, instead of the options above.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Folder of another study, to compare with.", show_default=False),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again, even if the folder has results.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/study"),
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Compare layers of every tensor format with the dense layer that they can replace.

    For every format and budget: parameters, FLOPs, memory, rank, measured and predicted time; with --weight
    the error of the format fitted to your layer, with --inputs the error of its outputs; and the accuracy of
    heads trained on --data. Writes a page (report.html), the table (results.csv), charts, and the setting
    (study.json). If it is interrupted, the same command resumes; other --formats are added to the study.

    Example: `mumoe-tensor study --layer gpt2-mlp --experts 256,64x64`
    """
    require("torch", "train", "study")
    from mumoe_tensor import study as studies

    with bad_input():
        processes = read_jobs(jobs)
        if setting is not None:
            if options or layer is not None or quick or sizes:
                raise ValueError("--setting cannot be combined with options that describe the study.")
            chosen = studies.Setting.from_json(setting)
        else:
            if "weight" in options and (layer is not None or sizes):
                raise ValueError(
                    "a study needs one of --layer, --weight, and --in-features with --out-features."
                )
            chosen = studies.prepare(_layer(layer, sizes), quick=quick, **options)
        if compare is not None:
            studies.read_study(compare)  # fail before anything is measured
    with ExitStack() as stack:
        with bad_input():
            planned, results, folder = stack.enter_context(studies.open_folder(chosen, out, fresh=fresh))
        with resumable(), progress_bar(planned.setting.title) as progress:
            studies.measure(planned, results, progress, processes)
        names = [path.name for path in studies.write(planned, results, folder, compare)]
    if as_json:
        print_json({**studies.to_json(planned, results), "files": [str(out / name) for name in names]})
        return
    for title, headings, rows in studies.cells(planned, results, compare):
        table = new_table(*headings, title=title)
        for row in rows:
            table.add_row(*row)
        show(table, labels=2)
    console = Console()
    for note in studies.notes(planned, results):
        console.print(f"• {note}", highlight=False, markup=False)
    print(f"\nWritten to {out}: " + ", ".join(names))


def _layer(name: str | None, sizes: dict[str, Any]) -> Any:
    """A published layer by name, or a layer of given sizes."""
    from mumoe_tensor.study import Layer

    if not sizes:
        return name
    if name is not None or not {"in_features", "out_features"} <= set(sizes):
        raise ValueError("a study needs --layer, or --in-features and --out-features.")
    return Layer("MLP" if "hidden" in sizes else "Layer", **sizes)
