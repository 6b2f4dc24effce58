"""The command that shows what was trained: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mumoe_tensor.cli.console import bad_input, fail, print_json, progress_bar
from mumoe_tensor.cli.options import Imports, Json
from mumoe_tensor.cli.values import read_list
from mumoe_tensor.extras import require


def inspect(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run of `train`, or of a layer of `replace`.", show_default=False),
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="A second folder, to compare with.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of RUN: package.module:function that returns your model, or your model and "
            "its tokenizer.",
            show_default=False,
        ),
    ] = None,
    allow_import: Annotated[
        bool, typer.Option("--allow-import", help="Allow --model to import and run your code.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --model: an .npz file with inputs x, and optionally their classes y.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Images to show for a head on features, or for --data: an .npz file with x.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes, with commas between.", show_default=False)
    ] = None,
    vocabulary_files: Annotated[
        Path, typer.Option(help="For a GPT-2: folder of encoder.json and vocab.bpe.")
    ] = Path("data/gpt2-vocabulary"),
    texts: Annotated[
        Path | None,
        typer.Option(
            help="For a layer of `replace`, or --model: JSON lines with an entry text, or a folder of *.txt.",
            show_default="the test texts of its grid",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows to look at.",
            show_default="2000; of a language model windows of 65,536 tokens together; of --model all",
        ),
    ] = None,
    shown: Annotated[int, typer.Option(help="Inputs to show for each expert.")] = 8,
    removed: Annotated[
        int,
        typer.Option(
            help="How many experts of a level to remove, one by one, to see their effect; for a head, all."
        ),
    ] = 16,
    out: Annotated[
        Path | None, typer.Option(help="File for the page.", show_default="experts.html in RUN, or here")
    ] = None,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Write a page that shows the experts of a trained model, of this library or your own.

    For each expert: the inputs it is most active for, the classes or tokens it is used for, how much it is
    used, and what is lost without it; of a GPT-2 also a text that it writes. One file, no network.

    Example: `mumoe-tensor inspect results/head`

    Your own model: `mumoe-tensor inspect --model models:build --data rows.npz --allow-import`
    """
    require("torch", "train")
    from mumoe_tensor.browser import browse, browse_built
    from mumoe_tensor.files import alone_in, whole_file

    if (run is None) == (model is None):
        raise typer.Exit(fail("inspect takes either the folder of a run or --model.", 2))
    if model is not None and not allow_import:
        raise typer.Exit(fail(f"--model imports and runs {model}; allow it with --allow-import.", 2))
    if model is None and data is not None:
        raise typer.Exit(fail("--data is for --model; a run names its data.", 2))
    if model is not None and beside is not None:
        raise typer.Exit(fail("--beside is for folders of runs; view several models in Python.", 2))
    for folder in (run, beside):
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder}; `train` and `replace` leave some.")
    path = (run or Path()) / "experts.html" if out is None else out
    options: dict[str, Any] = {
        "images": images, "classes": read_list(classes) if classes else (), "texts": texts, "rows": rows,
        "k": shown, "removed": removed,
    }  # fmt: skip
    with bad_input(), alone_in(path.parent), progress_bar("experts") as progress:
        if model is not None:
            text = browse_built(model, data=data, progress=progress, **options)
        else:
            assert run is not None
            text = browse(run, vocabulary=vocabulary_files, beside=beside, progress=progress, **options)
        with whole_file(path) as file:
            file.write(text.encode())
    if as_json:
        print_json({"files": [str(path)]})
    else:
        print(f"Written to {path}")
