"""Commands for training: train head, train mixer and train gpt2, and tokenize for its texts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mumoe_tensor.cli.configs import options_of
from mumoe_tensor.cli.console import bad_input, new_table, print_json, resumable, show
from mumoe_tensor.cli.options import Imports, Json
from mumoe_tensor.configs.head import HeadConfig, HeadModelConfig
from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.extras import require

FreshRun = Annotated[
    bool, typer.Option("--fresh", help="Train again, even if the folder has a finished run.")
]
#: Attributes of a `TrainConfig` that are options of a head.
TRAIN = ("epochs", "batch_size", "learning_rate", "weight_decay", "patience", "seed")


@options_of("data", HeadConfig)
@options_of("model", HeadModelConfig)
@options_of("train", TrainConfig, TRAIN)
def train_head(
    features: Annotated[
        Path | None,
        typer.Option(help="An .npz file with features x and labels y.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --features: an .npz file with images x and labels y, images in IDX, or a folder "
            "with a subfolder of images for each class.",
            show_default=False,
        ),
    ] = None,
    *,
    data: dict[str, Any],
    model: dict[str, Any],
    train: dict[str, Any],
    fresh: FreshRun = False,
    out: Annotated[Path, typer.Option(help="Folder for the head.")] = Path("results/head"),
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Train a classifier head, dense or with experts, on features or images.

    Writes config.json, metrics.csv with a line for each epoch, curves for TensorBoard, checkpoints, and at
    the end head.safetensors, which `mumoe_tensor.models.load_head` reads. A finished head in the folder is
    not trained again. If it is interrupted, the same command resumes.

    Example: `mumoe-tensor train head --features features.npz --format cp --experts 64 --rank 64
    --out results/head`
    """
    require("torch", "train")
    with bad_input():
        from mumoe_tensor.training.head import HeadSetting

        inputs = [path for path in (features, images) if path is not None]
        if len(inputs) != 1:
            raise ValueError("either --features or --images must be given.")
        if images is not None:
            backbone = data.setdefault("backbone", "efficientnet-lite0")
            data["weights"] = data.get("weights") or _weights(backbone)
        setting = HeadSetting(
            str(inputs[0]), HeadModelConfig(**model).arguments(), TrainConfig(**train), **data
        )
    _run(setting, out, as_json, fresh=fresh)


def _trains(kind: str, text: str) -> Callable[..., None]:
    """The command that trains a kind of model from settings."""

    def command(
        config: Annotated[
            str | None,
            typer.Argument(
                help="A TOML file with settings, or the name of packaged settings.",
                show_default="small settings for a laptop",
            ),
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="KEY=VALUE",
                help="Change a setting of the file, e.g. train.epochs=3; may be repeated.",
                show_default=False,
            ),
        ] = None,
        from_step: Annotated[
            int | None,
            typer.Option(
                help="Resume from the checkpoint of this step instead of the last.", show_default=False
            ),
        ] = None,
        fresh: FreshRun = False,
        out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("results", kind),
        imports: Imports = None,
        as_json: Json = False,
    ) -> None:
        require("torch", "train")
        with bad_input():
            from mumoe_tensor.training.settings import read_settings

            settings = read_settings(kind, config, overrides or ())
        _run(settings, out, as_json, fresh=fresh, from_step=from_step)

    command.__doc__ = text
    return command


train_mixer = _trains(
    "mixer",
    """Train an MLP-Mixer on images, with dense blocks or blocks of experts.

    The settings specify the model, the data and the training. The default settings are for Fashion-MNIST,
    which `mumoe-tensor data` fetches. Writes config.json, metrics.csv, curves for TensorBoard, checkpoints,
    and at the end model.safetensors, which `mumoe_tensor.models.load_model` reads. If it is interrupted, the
    same command resumes.

    Example: `mumoe-tensor train mixer --set model.format=cp --out results/mixer-cp`
    """,
)
train_gpt2 = _trains(
    "gpt2",
    """Train a GPT-2 on files of tokens, with dense blocks or blocks of experts.

    The settings specify the model, the data and the training. The default settings are for the works of
    Shakespeare, whose tokens `mumoe-tensor tokenize` writes. Writes the same files as `train mixer`. If it is
    interrupted, the same command resumes.

    Example: `mumoe-tensor train gpt2 --set model.format=cp --out results/gpt2-cp`
    """,
)


def _run(settings: Any, out: Path, as_json: bool, **options: Any) -> None:
    """Run the training and print its figures."""
    from mumoe_tensor.training.processes import processes
    from mumoe_tensor.training.run import run

    with bad_input(), resumable():
        figures = run(settings, out, progress=sys.stderr.isatty(), **options)
    group = processes()
    group.destroy_process_group()
    if not group.is_main_process:
        return
    if as_json:
        print_json(figures)
        return
    ranks = figures["ranks"] if "ranks" in figures else {"rank": figures["rank"]}
    text = ", ".join(f"{name} {value}" for name, value in ranks.items() if value)
    print(f"{figures['parameters']:,} parameters" + (f", {text}" if text else ""))
    trained = "" if figures["trained"] else "; it was already trained, --fresh trains it again"
    print(
        f"accuracy {figures['accuracy']:.4f}, loss {figures['validation_loss']:.4f} on validation rows, "
        f"after {figures['steps']:,} steps in {figures['seconds']:.0f} s{trained}"
    )
    print(f"Written to {out}: config.json, metrics.csv, tensorboard, checkpoints, {settings.result}")


def tokenize(
    sources: Annotated[
        list[Path], typer.Argument(help="Files of text, or folders of *.txt files.", show_default=False)
    ],
    vocabulary_files: Annotated[
        Path, typer.Option(help="Folder with encoder.json and vocab.bpe, which `mumoe-tensor data` fetches.")
    ] = Path("data/gpt2-vocabulary"),
    vocabulary: Annotated[
        int | None,
        typer.Option(help="Size of the vocabulary: the bytes and the first merges.", show_default="all"),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files for validation, e.g. 'macbeth*'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files to leave out; may be repeated.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tokens.")] = Path("results/tokens"),
    as_json: Json = False,
) -> None:
    """Convert texts to GPT-2 tokens for training and validation.

    Writes training.bin and validation.bin, with two-byte integers that `train gpt2` reads, and tokens.json
    with the files of each part.

    Example: `mumoe-tensor tokenize texts --hold-out 'macbeth*' --vocabulary 8192`
    """
    require("torch", "train")
    with bad_input():
        from mumoe_tensor.training import tokens

        tokenizer = tokens.Tokenizer(vocabulary_files, vocabulary)
        written = tokens.tokenize(sources, tokenizer, out, hold_out=hold_out or (), leave_out=leave_out or ())
    if as_json:
        print_json(written)
        return
    table = new_table("file", "part", "tokens")
    for part in ("training", "validation"):
        for entry in written[part]:
            table.add_row(entry["file"], part, f"{entry['tokens']:,}")
        table.add_row("", part, f"{sum(entry['tokens'] for entry in written[part]):,}", end_section=True)
    show(table)
    print(f"{written['vocabulary']:,} ids. Written to {out}: training.bin, validation.bin, tokens.json")


def _weights(backbone: str) -> str:
    """The weights of a backbone fetched by `mumoe-tensor data`."""
    files = sorted(Path("data", backbone).glob("*.pth"))
    if not files:
        raise ValueError(
            f"the weights of {backbone} must be given by --weights; data/{backbone} has none: "
            f"`mumoe-tensor data {backbone}` fetches them."
        )
    return str(files[0])
