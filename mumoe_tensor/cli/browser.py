"""The command that shows what was trained: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_tensor.cli.console import bad_input, print_json, progress_bar
from mumoe_tensor.cli.options import Imports, Json
from mumoe_tensor.cli.values import read_names
from mumoe_tensor.extras import require


def inspect(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run of `train`, or of a layer of `replace`.", show_default=False),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Of a head on features: their images, an .npz file with x.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes, with commas between.", show_default=False)
    ] = None,
    vocabulary_files: Annotated[
        Path, typer.Option(help="Of a GPT-2: folder with encoder.json and vocab.bpe.")
    ] = Path("data/gpt2-vocabulary"),
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Of a layer of `replace`: JSON lines with an entry text, or a folder of *.txt.",
            show_default="the test texts of its grid",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Validation rows to look at.",
            show_default="2000; of a language model windows of 65,536 tokens together",
        ),
    ] = None,
    shown: Annotated[int, typer.Option(help="Inputs to show for each expert.")] = 8,
    removed: Annotated[
        int,
        typer.Option(
            help="Except of heads: remove the most used so many experts of a level, to see their effect."
        ),
    ] = 16,
    out: Annotated[Path | None, typer.Option(help="The page.", show_default="experts.html in RUN")] = None,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Write a page to browse the experts of a trained head, Mixer or GPT-2 in, or of a layer of `replace`.

    For each expert: the inputs it is most active for, the classes or tokens it is used for, how much it is
    used, and what is lost without it; of a GPT-2 also a text that it writes. One file, no network.

    Example: `mumoe-tensor inspect results/head`
    """
    require("torch", "train")
    from mumoe_tensor.browser import browse
    from mumoe_tensor.files import alone_in, whole_file

    path = run / "experts.html" if out is None else out
    if not run.is_dir():
        raise NotADirectoryError(f"there is no folder {run}; `train` and `replace` leave some.")
    with bad_input(), alone_in(path.parent), progress_bar("experts") as progress:
        text = browse(
            run,
            images=images,
            classes=read_names(classes) or (),
            vocabulary=vocabulary_files,
            texts=texts,
            rows=rows,
            k=shown,
            removed=removed,
            progress=progress,
        )
        with whole_file(path) as file:
            file.write(text.encode())
    if as_json:
        print_json({"files": [str(path)]})
    else:
        print(f"Written to {path}")
