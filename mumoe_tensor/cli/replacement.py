"""The command that replaces blocks of a language model with sparse layers: replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_tensor.cli.console import bad_input, new_table, print_json, resumable, show
from mumoe_tensor.cli.options import Imports, Jobs, Json
from mumoe_tensor.cli.values import read_jobs
from mumoe_tensor.extras import require
from mumoe_tensor.progress import progress_bar


def replace(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder with a causal language model from transformers and its tokenizer, or a *.gguf file.",
            show_default=False,
        ),
    ],
    grid: Annotated[Path, typer.Option(help="TOML file with the grid of layers.", show_default=False)],
    training: Annotated[
        Path,
        typer.Option(
            help="Texts to train on: a JSON Lines file with the key text, or a folder of *.txt files.",
            show_default=False,
        ),
    ],
    validation: Annotated[Path, typer.Option(help="Texts to choose settings on.", show_default=False)],
    test: Annotated[Path, typer.Option(help="Texts to measure results on.", show_default=False)],
    jobs: Jobs = "1",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/replace"),
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Replace blocks of a language model with sparse layers, and measure how much worse it predicts.

    Trains transcoders, mixtures of decoders and other layers of a grid on the outputs of the blocks, and
    measures the cross entropy of the model with each layer in place. Writes the layers, and frontier.csv with
    one row per layer. If it is interrupted, the same command resumes.

    Example: `mumoe-tensor replace SmolLM2 --grid grid.toml --training a.jsonl --validation b.jsonl --test
    c.jsonl`
    """
    require("torch", "train", "transformers")
    with bad_input():
        from transformers.utils import logging

        from mumoe_tensor.replace.frontier import run_grid
        from mumoe_tensor.replace.grid import Grid

        logging.disable_progress_bar()
        paths = (training, validation, test)
        with resumable(), progress_bar("replace") as progress:
            rows = run_grid(model, paths, Grid.read(grid), out, jobs=read_jobs(jobs), progress=progress)
    if as_json:
        print_json(rows)
        return
    table = new_table("module", "arm", "K", "seed", "parameters", "NMSE", "rise, nats", "active", "dead")
    for row in rows:
        half = "" if row["half"] is None else f" ± {row['half']:.3f}"
        table.add_row(
            row["module"], row["arm"], str(row["k"] or ""), str(row["seed"]), f"{row['parameters']:,}",
            f"{row['nmse']:.3f}", f"{row['rise']:.3f}{half}", f"{row['active']:.1f}", str(row["dead"]),
        )  # fmt: skip
    show(table, labels=4)
    print(
        f"Rises in cross entropy are in nats per token, with 95 % intervals over documents. Written to {out}."
    )
