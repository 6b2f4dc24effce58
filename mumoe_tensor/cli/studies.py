"""The command that measures a layer: study."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mumoe_tensor.cli.console import bad_input, can_go_on, new_table, print_json, progress_bar, show
from mumoe_tensor.cli.options import Hidden, Imports, Jobs, Json
from mumoe_tensor.cli.values import read_formats, read_jobs, read_names, read_several
from mumoe_tensor.extras import require

CORES = str(os.cpu_count() or 1)


def study(
    layer: Annotated[
        str | None,
        typer.Option(
            help="Published layer: gpt2-mlp, clip-head, mixer-s16-token or mixer-s16-channel.",
            show_default="gpt2-mlp",
        ),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME",
            help="Instead of --layer: the weight of your own layer, in a file of safetensors, NumPy or "
            "torch.save. A pattern such as 'layers.*.up_proj.weight' gives a stack of experts.",
            show_default=False,
        ),
    ] = None,
    transposed: Annotated[
        bool,
        typer.Option(
            "--transposed",
            help="The file has the weight as in x out (Conv1D of GPT-2), not as out x in (nn.Linear).",
        ),
    ] = False,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME",
            help="Inputs of that layer, one per row: adds the errors of its outputs.",
            show_default=False,
        ),
    ] = None,
    in_features: Annotated[
        int | None, typer.Option(help="Instead of --layer: number of input features.", show_default=False)
    ] = None,
    out_features: Annotated[
        int | None, typer.Option(help="Number of output features.", show_default=False)
    ] = None,
    hidden: Hidden = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of experts, e.g. 256,64x64; none for a layer without experts.",
            show_default="the layer's",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Tensor formats, e.g. cp,tr, or a list as JSON.", show_default="all"),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="Budgets: numbers of parameters, match for those of the dense layer, or multiples (0.5x).",
            show_default="match,0.5x; of a weight 0.5x,0.25x,0.1x",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Number of inputs in a batch.", show_default="512; quick 32")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Devices to measure on: cpu, cuda or cpu,cuda.", show_default="all available"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds for each timing.", show_default="0.4; quick 0.05")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="Limit in GiB; larger layers run with fewer dense experts or inputs, and are extrapolated.",
            show_default="2",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to train heads on: digits, an .npz file with x and y, or none.",
            show_default="digits; with --weight none",
        ),
    ] = None,
    head_hidden: Annotated[
        int | None,
        typer.Option(help="Hidden size of the heads; 0 for linear ones.", show_default="128"),
    ] = None,
    head_formats: Annotated[
        str | None,
        typer.Option(
            help="Tensor formats of the heads.", show_default="those of --formats that split no size"
        ),
    ] = None,
    head_experts: Annotated[
        str | None,
        typer.Option(help="Numbers of experts of the heads.", show_default="8,32; quick 8"),
    ] = None,
    head_parameters: Annotated[
        str | None, typer.Option(help="Budgets of the heads.", show_default="0.5x,match; quick match")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of trainings of each head.", show_default="3; quick 1")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data in a training.", show_default="15; quick 1")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of a step; all rows if there are fewer than 128.", show_default="128"),
    ] = None,
    sweeps: Annotated[
        int | None,
        typer.Option(help="Maximum number of sweeps of a fit to the weight.", show_default="10; quick 2"),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="Other machines to predict times for, e.g. cuda,h200.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The first seed.", show_default="0")] = None,
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
    the error of the format fitted to your layer, with --inputs that of its outputs; and the accuracy of heads
    trained on --data. Writes a page (report.html), the table (results.csv), pictures, and the setting
    (study.json). If it is interrupted, the same command continues; with other --formats it adds them.

    Example: `mumoe-tensor study --layer gpt2-mlp --experts 256,64x64`
    """
    require("torch", "train", "study")
    from mumoe_tensor import study as studies

    with bad_input():
        processes = read_jobs(jobs)
        options: dict[str, Any] = {
            "experts": read_several(experts),
            "formats": read_formats(formats),
            "parameters": read_names(parameters),
            "batch": batch,
            "devices": read_names(device),
            "seconds": seconds,
            "memory": memory,
            "data": data,
            "head_hidden": head_hidden,
            "head_formats": read_formats(head_formats),
            "head_experts": read_several(head_experts),
            "head_parameters": read_names(head_parameters),
            "seeds": seeds,
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "weight": weight,
            "transposed": transposed or None,
            "inputs": inputs,
            "sweeps": sweeps,
            "machines": read_names(machine),
        }
        sizes = (in_features, hidden, out_features)
        if setting is not None:
            others = [name for name, value in {**options, "layer": layer}.items() if value is not None]
            if others or quick or any(sizes):
                raise ValueError("--setting replaces the options that describe the study.")
            chosen = studies.Setting.from_json(setting)
        else:
            if weight is not None and (layer is not None or any(size is not None for size in sizes)):
                raise ValueError(
                    "a study takes one of --layer, --weight, and --in-features with --out-features."
                )
            chosen = studies.prepare(_layer(layer, sizes), quick=quick, **options)
        if not fresh:
            chosen = studies.going_on(chosen, out)
        planned = studies.plan(chosen)
        if compare is not None:
            studies.read_study(compare)  # before anything is measured
    with ExitStack() as stack:
        with bad_input():
            folder, results = stack.enter_context(studies.open_folder(chosen, out, fresh=fresh))
        with can_go_on(), progress_bar(chosen.title) as progress:
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


def _layer(name: str | None, sizes: tuple[int | None, int | None, int | None]) -> Any:
    """A published layer by its name, or one of these sizes."""
    from mumoe_tensor.study import Layer, dense

    in_features, hidden, out_features = sizes
    if all(size is None for size in sizes):
        return name
    if name is not None or in_features is None or out_features is None:
        raise ValueError("a study takes --layer, or --in-features and --out-features.")
    return Layer("Layer" if hidden is None else "MLP", dense(in_features, out_features, hidden))
