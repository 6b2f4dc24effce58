"""The command line: parse, call the library, print.

Bad input ends with exit code 2 and one line on stderr. With ``--json`` stdout has JSON and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import mumoe_tensor as mt
from mumoe_tensor.formats import Format, mode_names

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup
except ImportError as missing:
    # The module is nothing but the command: a traceback would tell its user less.
    print("mumoe-tensor: the command line needs an extra; pip install 'mumoe_tensor[cli]'.", file=sys.stderr)
    raise SystemExit(2) from missing

#: What typer raises for a line it cannot parse. It exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """A group of commands that tells of bad input in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = partial(super().main, *args, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        try:
            code = run(standalone_mode=False)
        except (typer.Abort, KeyboardInterrupt):
            code = _fail("interrupted.", 130)
        except _UsageError as error:
            told: Any = error
            command = told.ctx.command_path if told.ctx else "mumoe-tensor"
            code = _fail(f"{told.format_message().rstrip('.')}; see '{command} --help'.", 2)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    help="Multilinear mixture-of-experts layers: formats, plans, costs, ranks, and the study of a layer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

FormatName = Annotated[
    str, typer.Argument(help="Name of the format; `mumoe-tensor formats` lists them.", show_default=False)
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
Parameters = Annotated[str, typer.Option(help="The budget: a number, or match for that of the dense layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version, or help where no command is named."""
    if version:
        print(mt.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def formats(as_json: Json = False) -> None:
    """List the formats: their factors, the entries of a rank, and their parameters.

    Shown for one level of experts, of sizes N experts, I inputs (with the bias row), O outputs.

    Example: `mumoe-tensor formats`
    """
    found = [_declared(format) for format in mt.formats().values()]
    if as_json:
        _print_json(found)
        return
    table = _table("format", "title", "factors", "rank", "parameters")
    for entry in found:
        # One line a factor, its parameters beside it.
        terms = entry["parameters"].replace(" + ", "\n+ ")
        units = "\n" * (len(entry["factors"]) - len(terms.splitlines()))
        rank = ", ".join(entry["rank"]) or "none"
        table.add_row(
            entry["name"], entry["title"], "\n".join(entry["factors"]), rank, units + terms, end_section=True
        )
    Console().print(table)


@app.command()
def plan(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    rank: Rank = None,
    batch: Batch = 1,
    bias: Bias = False,
    minimize: Minimize = "time",
    implementation: Implementation = "factorized",
    memory_limit: MemoryLimit = None,
    constants: Constants = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show the pairwise products of a forward pass, with their FLOPs and memory.

    Example: `mumoe-tensor plan tucker --experts 256 --in-features 768
    --out-features 768 --rank 64,128,128 --batch 8192`
    """
    with _bad_input():
        planned = mt.plan(
            format,
            experts=_experts(experts),
            in_features=in_features,
            out_features=out_features,
            rank=_known_rank(rank),
            batch=batch,
            bias=bias,
            minimize=minimize,  # type: ignore[arg-type]  # the library says what it may be
            implementation=implementation,  # type: ignore[arg-type]
            memory_limit=memory_limit,
            constants=constants,  # type: ignore[arg-type]
            dtype=dtype,
        )
    if as_json:
        _print_json({"format": format, **_plan_figures(planned)})
    else:
        print(planned)


@app.command()
def cost(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    hidden: Hidden = None,
    rank: Rank = None,
    batch: Batch = 1,
    bias: Bias = False,
    gate: Gate = False,
    minimize: Minimize = "time",
    implementation: Implementation = "factorized",
    memory_limit: MemoryLimit = None,
    constants: Constants = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say what a layer, or a block of two, costs: parameters, FLOPs, memory, expert rank.

    Example: `mumoe-tensor cost cp --experts 256 --in-features 768 --hidden 3072
    --out-features 768 --rank 556 --bias --gate`
    """
    with _bad_input():
        found = mt.cost(
            format,
            experts=_experts(experts),
            in_features=in_features,
            out_features=out_features,
            hidden=hidden,
            rank=_known_rank(rank),
            batch=batch,
            bias=bias,
            gate=gate,
            minimize=minimize,  # type: ignore[arg-type]
            implementation=implementation,  # type: ignore[arg-type]
            memory_limit=memory_limit,
            constants=constants,  # type: ignore[arg-type]
            dtype=dtype,
        )
    total = {name: getattr(found, name) for name in _COST}
    layers = [
        {name: getattr(layer if hasattr(layer, name) else layer.plan, name) for name in _COST}
        for layer in found.layers
    ]
    unit = "bytes" if dtype else "elements"
    if as_json:
        gate_figures = {"gate_parameters": found.gate_parameters, "gate_flops": found.gate_flops}
        _print_json({"format": format, **total, **gate_figures, "unit": unit, "layers": layers})
        return
    sizes = [n for n in (in_features, hidden, out_features) if n is not None]
    gate_column: dict[str, int] = {"parameters": found.gate_parameters, "flops": found.gate_flops}
    columns = dict(zip((f"{i} → {o}" for i, o in pairwise(sizes)), layers, strict=True))
    table = _table(
        "",
        *columns,
        *(["gate"] if gate else []),
        "total",
        title=f"{format}, batch {batch:,}; memory in {unit}",
    )
    for name, title in _COST.items():
        values = [*(layer[name] for layer in layers), *([gate_column.get(name)] if gate else []), total[name]]
        table.add_row(title, *("" if value is None else f"{value:,}" for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)


@app.command()
def fit(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    hidden: Hidden = None,
    rank: OpenRank = None,
    parameters: Parameters = "match",
    bias: Bias = False,
    gate: Gate = False,
    rounding: Annotated[str, typer.Option(help="up, down or nearest.")] = "up",
    as_json: Json = False,
) -> None:
    """Find the rank at which a layer has a given number of parameters.

    Example: `mumoe-tensor fit tr --experts 64 --in-features 768 --out-features 1000
    --rank '4,4,?' --parameters 769000 --bias --gate`
    """
    sizes: dict[str, Any] = {"in_features": in_features, "hidden": hidden, "out_features": out_features}
    with _bad_input():
        layer: dict[str, Any] = {**sizes, "experts": _experts(experts), "bias": bias, "gate": gate}
        wanted = _budget(parameters)
        fitted = mt.fit_rank(
            format,
            rank=_rank(rank),
            parameters=wanted,
            rounding=rounding,  # type: ignore[arg-type]
            **layer,
        )
        found = mt.cost(format, rank=fitted, **layer)
    entries = [fitted] if isinstance(fitted, int) else list(fitted)
    budget = mt.dense_parameters(**sizes, bias=bias) if wanted == "match" else wanted
    if as_json:
        result = {"format": format, "rank": entries, "parameters": found.parameters, "budget": budget}
        _print_json({**result, "gate_parameters": found.gate_parameters})
        return
    print(f"rank {','.join(map(str, entries))}")
    share = f", of which the gate {found.gate_parameters:,}" if gate else ""
    print(f"{found.parameters:,} parameters{share}; the budget is {budget:,}")


@app.command()
def study(
    layer: Annotated[
        str | None,
        typer.Option(
            help="gpt2-mlp, clip-head, mixer-s16-token or mixer-s16-channel.", show_default="gpt2-mlp"
        ),
    ] = None,
    in_features: Annotated[
        int | None, typer.Option(help="In the place of --layer: size of the input.", show_default=False)
    ] = None,
    out_features: Annotated[int | None, typer.Option(help="Size of the output.", show_default=False)] = None,
    hidden: Hidden = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of experts, e.g. 256,64x64.",
            show_default="the layer's, a quarter, four times as many",
        ),
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="Names with commas between, e.g. cp,tr.", show_default="all")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="The budget: a number, match for that of the dense layer, or a multiple of it as 0.5x.",
            show_default="match",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Inputs of a forward pass and a step.", show_default="1024; quick 32")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cpu,cuda.", show_default="all there are")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time of a timing.", show_default="0.6; quick 0.05")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="What needs more GiB is not run, but told by its formula.", show_default="2"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Train heads on digits, or on an .npz file with x and y; or none.", show_default="digits"
        ),
    ] = None,
    head_hidden: Annotated[
        int | None,
        typer.Option(
            help="Heads are an MLP with this size between.",
            show_default="128 for digits; else a linear layer",
        ),
    ] = None,
    head_experts: Annotated[
        str | None,
        typer.Option(help="Numbers of experts of heads.", show_default="8,32 for digits; else --experts"),
    ] = None,
    head_parameters: Annotated[
        str | None, typer.Option(help="Budgets of heads.", show_default="0.5x,match")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings of a head.", show_default="3; quick 1")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of a training.", show_default="15; quick 1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The first seed.", show_default="0")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small and short, to see that all works.")] = False,
    setting: Annotated[
        Path | None,
        typer.Option(
            help="The study.json of a study to run again, in the place of all above.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder has.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/study"),
    as_json: Json = False,
) -> None:
    """Set mixtures of every format beside the dense layer they may take the place of.

    Ranks are fitted to a budget. Beside the dense layer, the dense and a sparse mixture: parameters, FLOPs,
    memory, expert rank; measured time and peak memory; accuracy of heads trained on real data. Leaves a page
    (report.html), the table (results.csv), pictures, and the setting (study.json). Interrupted, the same
    command goes on where it stopped.

    Example: `mumoe-tensor study --layer gpt2-mlp --experts 256,64x64`
    """
    from mumoe_tensor import study as studies

    with _bad_input():
        options: dict[str, Any] = {
            "experts": _several(experts),
            "formats": _listed(formats),
            "parameters": parameters,
            "batch": batch,
            "devices": _listed(device),
            "seconds": seconds,
            "memory": memory,
            "data": data,
            "head_hidden": head_hidden,
            "head_experts": _several(head_experts),
            "head_parameters": _listed(head_parameters),
            "seeds": seeds,
            "epochs": epochs,
            "seed": seed,
        }
        sizes = (in_features, hidden, out_features)
        if setting is not None:
            given = [name for name, value in {**options, "layer": layer}.items() if value is not None]
            if given or quick or any(sizes):
                raise ValueError("--setting takes the place of all options but --fresh, --out and --json.")
            chosen = studies.Setting.from_json(setting)
        else:
            chosen = studies.prepare(_layer(layer, sizes), quick=quick, **options)
        planned = studies.plan(chosen)
        results = studies.open_folder(chosen, out, fresh=fresh)
    try:
        with _progress(chosen.title) as progress:
            studies.measure(planned, results, progress)
    except KeyboardInterrupt as stop:
        raise typer.Exit(_fail("interrupted; the same command goes on where it stopped.", 130)) from stop
    with _bad_input():
        paths = studies.write(planned, results, out)
    if as_json:
        _print_json({**studies.to_json(planned, results), "files": [str(path) for path in paths]})
        return
    console = Console()
    for table in studies.tables(planned, results):
        console.print(table)
    for sentence in studies.paragraph(planned, results):
        console.print(sentence, highlight=False, markup=False)
    console.print()
    for note in studies.notes(planned, results):
        console.print(f"• {note}", highlight=False, markup=False)
    print(f"\nWritten to {out}: " + ", ".join(path.name for path in paths))


@app.command()
def bias(
    target: Annotated[
        str,
        typer.Option(
            help="What is predicted, and its value in the subpopulation, e.g. Young=0; 1 if left out."
        ),
    ],
    group: Annotated[str, typer.Option(help="The group, and its value in the subpopulation, e.g. Male=0.")],
    data: Annotated[str, typer.Option(help="celeba or adult.")] = "celeba",
    folder: Annotated[Path, typer.Option(help="Where `make data` has put the data.")] = Path("data"),
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="An .npz file with x, a row an image of CelebA: the input, in the place of attributes.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each model.")] = 5,
    test: Annotated[bool, typer.Option("--test", help="Read test rows, after all is chosen.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small and short, to see that all works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/bias"),
    as_json: Json = False,
) -> None:
    """Correct a bias against a subpopulation by the experts' biases, beside other ways to do so.

    Trains a linear, a high-rank linear and a μMoE classifier, with oversampling or adversarial debiasing too;
    corrects them by the edit of the experts and by thresholds. Settings are chosen on validation rows; once
    that is finished, `--test` reads the test rows. Leaves results.csv, to which every task adds its rows.
    Interrupted, the same command goes on where it stopped.

    Example: `mumoe-tensor bias --target Blond_Hair --group Male`
    """
    with _bad_input():
        from mumoe_tensor.experiments import bias as experiments
        from mumoe_tensor.training.attributes import read_adult, read_celeba

        if seeds < 1:
            raise ValueError(f"--seeds must be positive, got {seeds}.")
        sides, place = (_side("target", target), _side("group", group)), folder / data
        if data not in experiments.RECIPES:
            raise ValueError(f"--data must be one of {', '.join(experiments.RECIPES)}, got {data!r}.")
        if not place.is_dir():
            raise OSError(f"there is no folder {place}; `make data` fetches the data into data.")
        if data == "celeba":
            task = read_celeba(place, *sides, embeddings)
        elif embeddings is None:
            task = read_adult(place, *sides)
        else:
            raise ValueError(f"--embeddings are of the images of celeba, {data} has none.")
        recipe = replace(experiments.RECIPES[data], seeds=seeds)
        if quick:
            task, recipe = replace(task, name=f"{task.name} quick"), recipe.quick()
        experiment = experiments.Experiment(task, recipe, out)
        split = "test" if test else "validation"
        try:
            with _progress(task.name) as progress:
                (experiment.test if test else experiment.validate)(progress)
        except KeyboardInterrupt as stop:
            message = "interrupted; the same command goes on where it stopped."
            raise typer.Exit(_fail(message, 130)) from stop
    rows = experiment.rows(split)
    found, differences = experiments.summary(rows), experiments.comparisons(rows)
    if as_json:
        _print_json({"task": task.name, "split": split, "methods": found, "differences": differences})
        return
    console = Console()
    names = (*experiments.METRICS, "area")
    table = _table("", *names, title=f"{task.name}, {split} rows")
    for row in found:
        cells = (_with_half(row[name], row[f"{name}_half"]) if name in row else "" for name in names)
        table.add_row(row["method"], *cells)
    console.print(table)
    table = _table("difference", "of", "minus", "")
    for row in differences:
        table.add_row(row["metric"], row["of"], row["minus"], _with_half(row["difference"], row["half"]))
    console.print(table)
    print(f"Means and 95 % intervals over {recipe.seeds} seed(s). Written to {out / 'results.csv'}.")


@app.command()
def figures(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Which figures; by default all.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder has.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("results/figures"),
    as_json: Json = False,
) -> None:
    """Draw the figures of the papers, in a checkout of the repository.

    Prints the numbers of each and leaves them as CSV, the picture as PNG and PDF. What was measured is
    measured once.

    Example: `mumoe-tensor figures levels gate_share --quick`
    """
    with _bad_input():
        if find_spec("paper_figures") is None:
            raise ImportError("figures are drawn in a checkout of the repository; the package has none.")
        common = import_module("paper_figures.common")
        modules = [common.load(name) for name in names or common.FIGURES]
        out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with _progress("figures") as progress:
        for done, module in enumerate(modules):
            name = common.name_of(module)
            progress(done, len(modules), name)
            rows = common.rows_of(module, out, quick, fresh)
            with _bad_input():
                paths = common.write(module, rows, out)
            drawn[name] = {"rows": rows, "files": [str(path) for path in paths]}
            if not as_json:
                print(common.told(module, rows), *paths, sep="\n", end="\n\n")
    if as_json:
        _print_json(drawn)


train_app = typer.Typer(
    cls=OneLineErrors,
    help="Train on data of your own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(train_app, name="train")


@train_app.command("head")
def train_head(
    features: Annotated[
        Path | None,
        typer.Option(help="An .npz file with features x and labels y.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="In the place of --features: an .npz file with images x and labels y, or images in IDX.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels of images in IDX.", show_default=False)] = None,
    backbone: Annotated[
        str, typer.Option(help="The network below the head: efficientnet-lite0, or a model of timm.")
    ] = "efficientnet-lite0",
    weights: Annotated[
        Path | None,
        typer.Option(help="Its weights.", show_default="those that `make data` fetches"),
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width images are scaled to.")] = 64,
    train_backbone: Annotated[
        bool, typer.Option("--train-backbone", help="Train the network too, not the head alone.")
    ] = False,
    format: Annotated[str, typer.Option(help="Of the experts; linear for a head without.")] = "cp",
    experts: Annotated[str, typer.Option(help="Number of experts, levels as 8x8.")] = "64",
    hidden: Annotated[
        int | None,
        typer.Option(
            help="The head is a block of two layers with this size between.", show_default="one layer"
        ),
    ] = None,
    rank: OpenRank = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="In the place of a whole rank: a number, or match for that of the head without experts.",
            show_default="match",
        ),
    ] = None,
    gate: Annotated[str, typer.Option(help="entmax15, sparsemax or softmax.")] = "entmax15",
    gate_norm: Annotated[str, typer.Option(help="Norm of the logits: batch, layer or none.")] = "batch",
    validation: Annotated[float, typer.Option(help="Share of the rows kept for validation.")] = 0.2,
    epochs: Annotated[int, typer.Option(help="Epochs; the best one counts.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Largest, after a warm-up.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a lower loss.", show_default="never"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of rows.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what the folder has.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the head.")] = Path("results/head"),
    as_json: Json = False,
) -> None:
    """Train a head of experts, or a dense one, on features or on images.

    Leaves config.json, metrics.csv with a line an epoch, and head.safetensors for
    `mumoe_tensor.models.load_head`. What the folder has already is not trained again.

    Example: `mumoe-tensor train head --features features.npz --format cp --experts 64 --rank 64
    --out results/head`
    """
    with _bad_input():
        from mumoe_tensor.training import TrainConfig
        from mumoe_tensor.training.head import HeadSetting, run_head

        given = [path for path in (features, images) if path is not None]
        if len(given) != 1:
            raise ValueError("give either --features or --images.")
        options: dict[str, Any] = {"format": format, "hidden": hidden}
        if format != "linear":
            options |= {"experts": _experts(experts), "gate": gate, "gate_norm": gate_norm}
        if rank is not None or parameters is not None:
            options |= {
                "rank": _rank(rank),
                "parameters": None if parameters is None else _budget(parameters),
            }
        network: dict[str, Any] = {}
        if images is not None:
            network = {"backbone": backbone, "weights": str(_weights(backbone, weights))}
        setting = HeadSetting(
            inputs=str(given[0]),
            labels=None if labels is None else str(labels),
            **network,
            size=size,
            train_backbone=train_backbone,
            head=options,
            validation=validation,
            training=TrainConfig(
                epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
                weight_decay=weight_decay, patience=patience, seed=seed,
            ),
        )  # fmt: skip
    try:
        with _bad_input():
            found = run_head(setting, out, fresh=fresh, progress=sys.stdout.isatty() and not as_json)
    except KeyboardInterrupt as stop:
        raise typer.Exit(_fail("interrupted; nothing was kept.", 130)) from stop
    except FloatingPointError as error:
        raise typer.Exit(_fail(str(error), 1)) from error
    if as_json:
        _print_json(found)
        return
    trained = "" if found["trained"] else "; it was trained before, --fresh trains it again"
    print(f"{found['parameters']:,} parameters, rank {found['rank'] or 'none'}")
    print(f"accuracy {found['accuracy']:.4f} on validation rows, best epoch {found['epoch']}{trained}")
    print(f"Written to {out}: config.json, metrics.csv, head.safetensors")


ConfigName = Annotated[
    str | None,
    typer.Argument(
        help="A TOML file, or the name of settings that come with the library.",
        show_default="those of the command's name, for a laptop",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting in the place of the file's, as train.epochs=3; as many as you like.",
        show_default=False,
    ),
]
FromStep = Annotated[
    int | None,
    typer.Option(help="Go on from the checkpoint of this step, not from the last.", show_default=False),
]
FreshRun = Annotated[bool, typer.Option("--fresh", help="Train anew, whatever the folder has.")]


@train_app.command("mixer")
def train_mixer(
    config: ConfigName = None,
    overrides: Overrides = None,
    from_step: FromStep = None,
    fresh: FreshRun = False,
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("results/mixer"),
    as_json: Json = False,
) -> None:
    """Train an MLP-Mixer on images, with dense blocks or with experts in every block.

    The settings say which model, which data and how. By default they are for Fashion-MNIST, which `make data`
    fetches. Leaves config.json, metrics.csv, curves for TensorBoard, checkpoints, and last model.safetensors
    for `mumoe_tensor.models.load_model`. Interrupted, the same command goes on where it stopped.

    Example: `mumoe-tensor train mixer --set model.format=cp --out results/mixer-cp`
    """
    _train("mixer", config, overrides, from_step, fresh, out, as_json)


@train_app.command("gpt2")
def train_gpt2(
    config: ConfigName = None,
    overrides: Overrides = None,
    from_step: FromStep = None,
    fresh: FreshRun = False,
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("results/gpt2"),
    as_json: Json = False,
) -> None:
    """Train a GPT-2 on files of tokens, with dense blocks or with experts in every block.

    The settings say which model, which data and how. By default they are for the works of Shakespeare, whose
    tokens `mumoe-tensor tokenize` writes. Leaves what `train mixer` leaves. Interrupted, the same command
    goes on where it stopped.

    Example: `mumoe-tensor train gpt2 --set model.format=cp --out results/gpt2-cp`
    """
    _train("gpt2", config, overrides, from_step, fresh, out, as_json)


def _train(
    kind: str,
    config: str | None,
    overrides: list[str] | None,
    from_step: int | None,
    fresh: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Train a model of settings and print its figures."""
    with _bad_input():
        from mumoe_tensor.training.checkpoint import DamagedCheckpoint
        from mumoe_tensor.training.processes import processes
        from mumoe_tensor.training.run import run
        from mumoe_tensor.training.settings import read_settings

        settings = read_settings(kind, config, overrides or ())
        progress = sys.stdout.isatty() and not as_json
        try:
            found = run(settings, out, fresh=fresh, from_step=from_step, progress=progress)
        except KeyboardInterrupt as stop:
            message = "interrupted; the same command goes on where it stopped."
            raise typer.Exit(_fail(message, 130)) from stop
        except FileNotFoundError:
            raise
        except (FloatingPointError, DamagedCheckpoint, OSError) as error:
            raise typer.Exit(_fail(str(error), 1)) from error
    own = processes()
    own.destroy_process_group()
    if not own.is_main_process:
        return
    if as_json:
        _print_json(found)
        return
    ranks = ", ".join(f"{name} {value}" for name, value in found["ranks"].items() if value)
    print(f"{found['parameters']:,} parameters" + (f", {ranks}" if ranks else ""))
    trained = "" if found["trained"] else "; it was trained before, --fresh trains it again"
    print(
        f"accuracy {found['accuracy']:.4f}, loss {found['validation_loss']:.4f} on validation rows, after "
        f"{found['steps']:,} steps in {found['seconds']:.0f} s{trained}"
    )
    print(f"Written to {out}: config.json, metrics.csv, tensorboard, checkpoints, model.safetensors")


@app.command()
def tokenize(
    sources: Annotated[
        list[Path], typer.Argument(help="Files of text, or folders with files *.txt.", show_default=False)
    ],
    vocabulary_files: Annotated[
        Path, typer.Option(help="Folder of encoder.json and vocab.bpe, which `make data` fetches.")
    ] = Path("data/gpt2-vocabulary"),
    vocabulary: Annotated[
        int | None, typer.Option(help="Number of ids: the bytes and the first merges.", show_default="all")
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files for validation, as 'macbeth*'; as many as you like.",
            show_default=False,
        ),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Files that go nowhere; as many as you like.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tokens.")] = Path("results/tokens"),
    as_json: Json = False,
) -> None:
    """Write texts as tokens of GPT-2's byte pairs, parted into training and validation, file by file.

    Leaves training.bin and validation.bin, numbers of two bytes, for `train gpt2`, and tokens.json: what
    went where.

    Example: `mumoe-tensor tokenize texts --hold-out 'macbeth*' --vocabulary 8192`
    """
    with _bad_input():
        from mumoe_tensor.training import tokens

        tokenizer = tokens.Tokenizer(vocabulary_files, vocabulary)
        found = tokens.tokenize(sources, tokenizer, out, hold_out=hold_out or (), leave_out=leave_out or ())
    if as_json:
        _print_json(found)
        return
    table = _table("file", "part", "tokens")
    for part in ("training", "validation"):
        for entry in found[part]:
            table.add_row(entry["file"], part, f"{entry['tokens']:,}")
        table.add_row("", part, f"{sum(entry['tokens'] for entry in found[part]):,}", end_section=True)
    Console().print(table)
    print(f"{found['vocabulary']:,} ids. Written to {out}: training.bin, validation.bin, tokens.json")


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `train`.", show_default=False)],
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
    rows: Annotated[
        int | None,
        typer.Option(
            help="Validation rows to look at.",
            show_default="2000; of a GPT-2 windows of 65,536 tokens together",
        ),
    ] = None,
    shown: Annotated[int, typer.Option(help="Inputs to show for each expert.")] = 8,
    removed: Annotated[
        int,
        typer.Option(
            help="Of Mixer and GPT-2: remove the most used so many experts of a level, to see their effect."
        ),
    ] = 16,
    out: Annotated[Path | None, typer.Option(help="The page.", show_default="experts.html in RUN")] = None,
    as_json: Json = False,
) -> None:
    """Write a page to browse the experts of a trained head, Mixer or GPT-2 in.

    For each expert: the inputs it is most active for, the classes or tokens it is used for, how much it is
    used, and what is lost without it; of a GPT-2 also a text that it writes. One file, no network.

    Example: `mumoe-tensor inspect results/head`
    """
    from mumoe_tensor.browser import browse
    from mumoe_tensor.files import whole_file

    path = run / "experts.html" if out is None else out
    with _bad_input(), _progress("experts") as progress:
        text = browse(
            run,
            images=images,
            classes=_listed(classes) or (),
            vocabulary=vocabulary_files,
            rows=rows,
            k=shown,
            removed=removed,
            progress=progress,
        )
        with whole_file(path) as file:
            file.write(text.encode())
    if as_json:
        _print_json({"files": [str(path)]})
    else:
        print(f"Written to {path}")


#: Figures of a cost, and how they are written.
_COST = {
    "parameters": "parameters",
    "flops": "FLOPs",
    "reference_flops": "FLOPs, closed form",
    "write": "written",
    "size": "largest intermediate",
    "peak": "peak",
    "saved": "saved for backward",
    "max_expert_rank": "largest expert rank",
}


def _fail(message: str, code: int) -> int:
    print("mumoe-tensor: " + " ".join(message.split()), file=sys.stderr)
    return code


@contextmanager
def _bad_input() -> Iterator[None]:
    """Make the library's complaint, or the operating system's about a path, one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise typer.Exit(_fail(str(error), 2)) from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _table(*headings: str, title: str | None = None) -> Table:
    return Table(*headings, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _experts(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(n) for n in text.split("x"))
    except ValueError:
        rule = "--experts must be a number, levels as 64x64, or none"
        raise ValueError(f"{rule}, got {text!r}.") from None


def _several(text: str | None) -> list[tuple[int, ...]] | None:
    return None if text is None else [_experts(levels.strip()) for levels in text.split(",")]


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _layer(name: str | None, sizes: tuple[int | None, int | None, int | None]) -> Any:
    """A published layer by its name, or one of these sizes."""
    from mumoe_tensor.study import Layer

    in_features, hidden, out_features = sizes
    if all(size is None for size in sizes):
        return name or "gpt2-mlp"
    if name is not None or in_features is None or out_features is None:
        raise ValueError("a layer is told by --layer, or by --in-features and --out-features.")
    return Layer("Layer" if hidden is None else "MLP", in_features, out_features, hidden)


def _side(option: str, text: str) -> tuple[str, int]:
    """An attribute and its value, from NAME or NAME=0."""
    name, _, value = text.partition("=")
    if not name or value not in ("", "0", "1"):
        raise ValueError(f"--{option} must be an attribute, with =0 or =1 after it or nothing, got {text!r}.")
    return name, int(value or 1)


def _with_half(value: float, half: float | None) -> str:
    """A mean, and the half width of its interval where there is one."""
    return f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"


def _weights(backbone: str, weights: Path | None) -> Path:
    """The file of weights of a network, by default what `make data` fetched."""
    if weights is not None:
        return weights
    found = sorted(Path("data", backbone).glob("*.pth"))
    if not found:
        raise ValueError(f"weights of {backbone} must be given by --weights; data/{backbone} has none.")
    return found[0]


def _rank(text: str | None) -> tuple[int | None, ...] | None:
    if text is None:
        return None
    try:
        return tuple(None if r.strip() == "?" else int(r) for r in text.split(","))
    except ValueError:
        raise ValueError(
            f"--rank must be numbers with commas between, e.g. 64,128,128; for fit one may be ?; "
            f"got {text!r}."
        ) from None


def _known_rank(text: str | None) -> tuple[int, ...] | None:
    entries = _rank(text)
    if entries is None:
        return None
    known = tuple(r for r in entries if r is not None)
    if len(known) < len(entries):
        raise ValueError(f"every entry of --rank must be a number here, got {text!r}; `fit` solves for a ?.")
    return known


def _budget(text: str) -> Any:
    if text == "match":
        return text
    try:
        return int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise ValueError(f"--parameters must be a number or match, got {text!r}.") from None


def _declared(format: Format) -> dict[str, Any]:
    """A format in words, for one level of experts."""
    names = dict(zip(mode_names(1), "NIO", strict=True))
    factors = format.declaration(1)
    held = [f for f in factors if not f.unit]
    return {
        "name": format.name,
        "title": format.title,
        "factors": [" ".join(names.get(x, x) for x in f.indices) + " (ones)" * f.unit for f in factors],
        "rank": list(format.bonds(1)),
        "parameters": " + ".join("·".join(names.get(x, x) for x in f.indices) for f in held),
    }


def _plan_figures(planned: mt.ContractionPlan) -> dict[str, Any]:
    figures = ("flops", "write", "copied", "size", "peak", "saved")
    steps = ("equation", "kind", "shape", "flops", "write", "copied", "saved", "live")

    def told(found: Any) -> list[dict[str, Any]]:
        return [{name: getattr(step, name) for name in steps} for step in found]

    return {
        "implementation": planned.implementation,
        "minimize": planned.minimize,
        "batch": planned.batch,
        **{name: getattr(planned, name) for name in figures},
        "unit": "bytes" if planned.dtype else "elements",
        "steps": told(planned.steps),
        "constant_steps": told(planned.constant_steps),
    }


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A progress bar on stderr, where somebody looks at it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
