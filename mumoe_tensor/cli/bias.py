"""The command for bias correction: bias."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mumoe_tensor.cli.configs import options_of
from mumoe_tensor.cli.console import bad_input, new_table, print_json, resumable, show
from mumoe_tensor.cli.options import Jobs, Json
from mumoe_tensor.cli.values import read_jobs
from mumoe_tensor.configs.bias import RECIPES, Recipe
from mumoe_tensor.extras import require
from mumoe_tensor.files import alone_in
from mumoe_tensor.progress import progress_bar


@options_of("recipe", Recipe, ["seeds"])
def bias(
    target: Annotated[
        str,
        typer.Option(
            help="Attribute to predict, with its value in the subpopulation, e.g. Young=0; by default 1."
        ),
    ],
    group: Annotated[
        str, typer.Option(help="Attribute of the group, with its value in the subpopulation, e.g. Male=0.")
    ],
    data: Annotated[str, typer.Option(help="celeba, adult, or your own .npz file.")] = "celeba",
    folder: Annotated[Path, typer.Option(help="Folder of the data fetched by `mumoe-tensor data`.")] = Path(
        "data"
    ),
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Inputs for CelebA instead of its attributes: an .npz file with x, one row per image.",
            show_default=False,
        ),
    ] = None,
    jobs: Jobs = "1",
    *,
    recipe: dict[str, Any],
    test: Annotated[
        bool, typer.Option("--test", help="Evaluate on test rows, once validation is finished.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small and short, to try the command.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/bias"),
    as_json: Json = False,
) -> None:
    """Correct the errors of a classifier on a subpopulation by editing experts; compare with other methods.

    Trains linear, high-rank linear and μMoE classifiers, also with oversampling and adversarial debiasing.
    Corrects them by editing experts and by moving thresholds. Settings are chosen on validation rows; then
    `--test` evaluates on test rows. Results are added to results.csv. If it is interrupted, the same command
    resumes.

    Your own file must have x of shape (rows, features), and an array of 0s and 1s for each attribute, under
    its name.

    Example: `mumoe-tensor bias --data embeddings.npz --target y=0 --group group=1`
    """
    require("torch", "train", "experiments")
    with bad_input():
        from mumoe_tensor.experiments import bias as experiments
        from mumoe_tensor.training.attributes import read_adult, read_celeba, read_embeddings

        sides, place = (_side("target", target), _side("group", group)), folder / data
        is_own = data.endswith(".npz")
        if data not in RECIPES and not is_own:
            raise ValueError(f"--data must be one of {', '.join(RECIPES)} or a file *.npz, got {data!r}.")
        if not is_own and not place.is_dir():
            raise OSError(f"there is no folder {place}; `mumoe-tensor data` fetches the data into data/.")
        if data == "celeba":
            task = read_celeba(place, *sides, embeddings)
        elif embeddings is None:
            task = read_embeddings(Path(data), *sides) if is_own else read_adult(place, *sides)
        else:
            raise ValueError(f"--embeddings can only be used with celeba, got {data}.")
        chosen = replace(RECIPES["adult" if is_own else data], **recipe)
        if len(task.training) < chosen.batch_size:
            chosen = replace(chosen, batch_size=len(task.training))
        if quick:
            task, chosen = replace(task, name=f"{task.name} quick"), chosen.quick()
        split = "test" if test else "validation"
        with alone_in(out, "models"), resumable(), progress_bar(task.name) as progress:
            experiment = experiments.Experiment(task, chosen, out)
            (experiment.test if test else experiment.validate)(progress, read_jobs(jobs))
    rows = experiment.rows(split)
    methods, differences = experiments.summary(rows), experiments.comparisons(rows)
    if as_json:
        print_json({"task": task.name, "split": split, "methods": methods, "differences": differences})
        return
    names = (*experiments.METRICS, "area")
    table = new_table("", *names, title=f"{task.name}, {split} rows")
    for row in methods:
        cells = (_with_half(row[name], row[f"{name}_half"]) if name in row else "" for name in names)
        table.add_row(row["method"], *cells)
    show(table)
    table = new_table("difference", "of", "minus", "")
    for row in differences:
        table.add_row(row["metric"], row["of"], row["minus"], _with_half(row["difference"], row["half"]))
    show(table, labels=3)
    print(f"Means and 95 % intervals over {chosen.seeds} seed(s). Written to {out / 'results.csv'}.")


def _side(option: str, text: str) -> tuple[str, int]:
    """An attribute and its value, from NAME or NAME=0."""
    name, _, value = text.partition("=")
    if not name or value not in ("", "0", "1"):
        raise ValueError(f"--{option} must be an attribute, optionally followed by =0 or =1, got {text!r}.")
    return name, int(value or 1)


def _with_half(value: float, half: float | None) -> str:
    """A mean, with the half-width of its interval if there is one."""
    return f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"
