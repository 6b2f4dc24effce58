"""The command that shows the experts of a trained model: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mumoe_tensor.cli.configs import options_of
from mumoe_tensor.cli.console import bad_input, print_json
from mumoe_tensor.cli.options import Imports, Json
from mumoe_tensor.configs.page import PageConfig
from mumoe_tensor.extras import require
from mumoe_tensor.progress import progress_bar


@options_of("page", PageConfig)
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
    *,
    page: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="File for the page.", show_default="experts.html in RUN, or here")
    ] = None,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Write a page that shows the experts of a trained model of this library, or of your own model.

    For each expert: the inputs it is most active for, the classes or tokens it is used for, how much it is
    used, and the effect of removing it; for a GPT-2 also a generated text. One file that needs no network.

    Example: `mumoe-tensor inspect results/head`

    Your own model: `mumoe-tensor inspect --model models:build --data rows.npz --allow-import`
    """
    require("torch", "train")
    from mumoe_tensor.browser import browse, browse_built
    from mumoe_tensor.files import alone_in, whole_file

    with bad_input():
        if (run is None) == (model is None):
            raise ValueError("inspect needs either the folder of a run or --model.")
        if model is not None and not allow_import:
            raise ValueError(f"--model imports and runs {model}; allow it with --allow-import.")
        if model is None and data is not None:
            raise ValueError("--data can only be used with --model; a run has its own data.")
        if model is not None and beside is not None:
            raise ValueError(
                "--beside can only be used with folders of runs; compare other models in Python."
            )
        config = PageConfig(**page)
    for folder in (run, beside):
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder}; `train` and `replace` write folders.")
    path = (run or Path()) / "experts.html" if out is None else out
    if path.is_dir():
        raise IsADirectoryError(f"--out must be a file, but {path} is a folder.")
    with bad_input(), alone_in(path.parent), progress_bar("experts") as progress:
        if model is not None:
            text = browse_built(model, config, data=data, progress=progress)
        else:
            assert run is not None
            text = browse(run, config, beside=beside, progress=progress)
        with whole_file(path) as file:
            file.write(text.encode())
    if as_json:
        print_json({"files": [str(path)]})
    else:
        print(f"Written to {path}")
