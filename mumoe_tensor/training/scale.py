"""FLOPs, memory and time of a training on many accelerators, from its settings alone.

python -m mumoe_tensor.training.scale                         the published settings, on 4 and 64
python -m mumoe_tensor.training.scale gpt2-124m-cp-256 --accelerators 8 --peak 989e12
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mumoe_tensor.cost import Cost, cost
from mumoe_tensor.models.blocks import DENSE
from mumoe_tensor.models.gpt2 import GPT2Config
from mumoe_tensor.models.mixer import MixerConfig
from mumoe_tensor.nn.backward import saved_results
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.text_table import text_table
from mumoe_tensor.training.settings import RUNS, GPT2Run, Settings, packaged, read_settings

#: Inputs that the order of contraction is chosen for, as in the layers.
BATCH = 1024
#: Bytes of an entry in float32, the dtype of weights, gradients and the state of AdamW.
ITEM = 4
#: Images of ImageNet's training set: how long an epoch of the published Mixer is.
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Machine:
    """Assumptions about an accelerator.

    Attributes
    ----------
    peak : float
        FLOPs a second. The default is that of an A100 in bfloat16.
    utilisation : float
        Share of the FLOPs that training reaches, communication included.
    memory : float
        Usable bytes. The default is four fifths of 80 GB.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    peak: float = 312e12
    utilisation: float = 0.4
    memory: float = 64e9

    def __post_init__(self) -> None:
        if not (self.peak > 0 and 0 < self.utilisation <= 1 and self.memory > 0):
            raise ValueError(
                "peak and memory must be positive, and utilisation a share above zero, got "
                f"{self.peak}, {self.memory} and {self.utilisation}."
            )


@dataclass(frozen=True)
class Work:
    """FLOPs and memory of the training of a model, on any machine.

    Attributes
    ----------
    parameters : int
    outside : int
        Parameters outside the blocks, which FSDP2 gathers at once.
    depth : int
        Number of blocks.
    units : int
        Tokens of a row, or 1 where a row is an image.
    flops : int
        FLOPs of one token or image, forward and backward.
    activations : int
        Bytes of one row that are saved for the backward pass.
    loss : int
        Further bytes of one row, for its logits while the loss is differentiated.
    """

    parameters: int
    outside: int
    depth: int
    units: int
    flops: int
    activations: int
    loss: int


@dataclass(frozen=True)
class Prediction:
    """Prediction for a training on a number of accelerators.

    Attributes
    ----------
    accelerators : int
    is_sharded : bool
        Weights, gradients and AdamW's numbers are divided (FSDP2), or whole on each (DDP).
    accumulation : int
        Parts of a step, the fewest with which memory suffices, for ``train.accumulation``.
    rows : int
        Rows that an accelerator computes with at once.
    state : int
        Bytes of weights, gradients and AdamW on an accelerator.
    memory : int
        `state`, and bytes saved of the rows.
    units_per_second : float
        Tokens or images of all accelerators together.
    days : float
        Days of all steps of the settings.
    sent : float
        Bytes a second that an accelerator sends to exchange gradients (and, sharded, weights).
    """

    accelerators: int
    is_sharded: bool
    accumulation: int
    rows: int
    state: int
    memory: int
    units_per_second: float
    days: float
    sent: float


def work(settings: Settings) -> Work:
    """Count FLOPs and memory of the training of a model.

    FLOPs are those of matrix products, twice the multiplications: blocks of experts by `mumoe_tensor.cost`,
    attention without its mask, norms and gate functions left out. A backward pass takes twice a forward
    pass. Saved are the operands of products (in bfloat16 or float16 under these precisions), the
    inputs of norms, in float32, and the log-probabilities of the loss, as without a compiler and dropout.

    Returns
    -------
    Work
    """
    model: Any = settings.make_model("meta")
    parameters = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.blocks.parameters())
    item = ITEM if settings.train.precision == "no" else 2
    count = _gpt2 if isinstance(settings, GPT2Run) else _mixer
    flops, activations, logits = count(model.config, item)
    units = model.config.context if isinstance(settings, GPT2Run) else 1
    return Work(
        parameters=parameters,
        outside=parameters - inside,
        depth=model.config.depth,
        units=units,
        flops=3 * flops // units,
        # The log-probabilities are kept.
        activations=activations + ITEM * logits,
        # The logits, as the model gave them and in float32, and the gradient.
        loss=(2 * ITEM if item == ITEM else 2 * ITEM + item) * logits,
    )


def predict(
    settings: Settings,
    accelerators: int,
    *,
    is_sharded: bool = False,
    machine: Machine | None = None,
    rows: int = IMAGENET,
    known: Work | None = None,
) -> Prediction:
    """Predict memory and time of a training.

    Memory counts, in float32, weights, gradients and two numbers a parameter of AdamW; of several processes
    also the buckets that DDP gathers gradients in; and copies of weights in bfloat16 or float16 under these
    precisions. FSDP2 divides the former among accelerators, and gathers what is outside of the blocks and
    two blocks at a time, weights and gradients.

    Parameters
    ----------
    is_sharded : bool, default False
        FSDP2 in the place of DDP.
    rows : int, default 1,281,167
        Rows of an epoch; without use where the settings have steps.
    known : Work, optional
        The result of `work`, if it is there already.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        If a step cannot be shared out among the accelerators, or memory does not suffice even for the fewest
        rows.
    """
    machine, counted, train = machine or Machine(), known or work(settings), settings.train
    if accelerators < 1 or rows < train.batch_size:
        raise ValueError(
            f"there must be an accelerator, and rows for a batch of {train.batch_size}; got {accelerators} "
            f"and {rows}."
        )
    state = _state(counted, accelerators, is_sharded, train.precision != "no")
    row = counted.activations + counted.loss
    # Mixed rows are neighbours, and both of a pair must be in one share.
    together = accelerators * (2 if train.mixup else 1)
    parts = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * together) == 0]
    fitting = [n for n in parts if state + train.batch_size // (n * accelerators) * row <= machine.memory]
    if not fitting:
        raise ValueError(
            f"a step of {train.batch_size} rows must divide among {accelerators} accelerators into parts "
            f"that fit in {machine.memory / 1e9:.1f} GB; the state takes {state / 1e9:.1f} GB, a row "
            f"{row / 1e9:.2f} GB, and the parts could be {parts or 'none'}."
        )
    at_once = train.batch_size // (fitting[0] * accelerators)
    speed = accelerators * machine.peak * machine.utilisation / counted.flops
    seconds = train.batch_size * counted.units / speed
    steps = train.steps or train.epochs * (rows // train.batch_size)
    # A ring sends every gradient twice; sharded, weights are gathered twice, and gradients divided, once.
    entries = 3 * (ITEM if train.precision == "no" else 2) if is_sharded else 2 * ITEM
    return Prediction(
        accelerators=accelerators,
        is_sharded=is_sharded,
        accumulation=fitting[0],
        rows=at_once,
        state=state,
        memory=state + at_once * row,
        units_per_second=speed,
        days=steps * seconds / 86_400,
        sent=entries * counted.parameters * (accelerators - 1) / accelerators / seconds,
    )


def _state(counted: Work, accelerators: int, is_sharded: bool, has_copies: bool) -> int:
    """Bytes of weights, gradients, and AdamW on one accelerator."""
    item = 2 if has_copies else ITEM
    if not is_sharded:
        buckets = ITEM if accelerators > 1 else 0
        return (4 * ITEM + buckets + (item if has_copies else 0)) * counted.parameters
    gathered = (
        counted.outside + min(2, counted.depth) * (counted.parameters - counted.outside) // counted.depth
    )
    return -(-4 * ITEM * counted.parameters // accelerators) + 2 * item * gathered


def _gpt2(config: GPT2Config, item: int) -> tuple[int, int, int]:
    """FLOPs of the forward pass of one row, bytes it saves for the backward pass, and its logits."""
    tokens, width = config.context, config.width
    block = _block(config, width, config.hidden, config.rank, item)
    # Queries, keys, values and outputs; products of tokens with each other.
    attention = 2 * 4 * width**2 + 2 * 2 * tokens * width
    # Saved of attention: input and output of its norm, queries, keys, values and result; the input of the
    # MLP's norm.
    saved = ITEM * width + 5 * item * width + ITEM * width
    flops = config.depth * (attention + block[0]) + 2 * config.vocabulary * width
    activations = config.depth * (saved + block[1]) + (ITEM + item) * width
    return tokens * flops, tokens * activations, tokens * config.vocabulary


def _mixer(config: MixerConfig, item: int) -> tuple[int, int, int]:
    """As `_gpt2`, of one image."""
    tokens, width = config.tokens, config.width
    pixels = config.channels * config.image_size**2
    token = _block(config, tokens, config.token_hidden, config.token_rank, item, is_transposed=True)
    channel = _block(config, width, config.channel_hidden, config.channel_rank, item)
    # Inputs of both norms.
    saved = 2 * ITEM * tokens * width
    flops = 2 * pixels * width + config.depth * (width * token[0] + tokens * channel[0])
    activations = config.depth * (width * token[1] + tokens * channel[1] + saved)
    # The pixels, and the input of the last norm.
    activations += (ITEM + (0 if item == ITEM else item)) * pixels + ITEM * tokens * width
    return flops + 2 * width * config.classes, activations, config.classes


def _block(
    config: GPT2Config | MixerConfig,
    features: int,
    hidden: int,
    rank: tuple[int, ...] | None,
    item: int,
    is_transposed: bool = False,
) -> tuple[int, int]:
    """FLOPs of one input of an MLP, and bytes it saves besides the input of its norm."""
    is_dense = config.format == DENSE
    spec = LayerSpec(
        "dense" if is_dense else config.format, experts=() if is_dense else config.experts, rank=rank,
        in_features=features, hidden=hidden, out_features=features, bias=True,
    )  # fmt: skip
    total = cost(spec, gate=True, batch=BATCH)
    flops = total.flops // BATCH
    if is_dense:
        return flops, item * (features + 2 * hidden)
    # Gate and experts share an input that is not cast or copied. The gate works in float32.
    gate_input = item * features if is_transposed or item != ITEM else 0
    experts = sum(config.experts)
    coefficients = (item if item == ITEM else ITEM + item) * experts
    normed_logits = {"none": 0, "layer": ITEM, "batch": ITEM}[config.gate_norm] * experts
    return flops, gate_input + item * (features + hidden + _results(total)) + coefficients + normed_logits


def _results(total: Cost) -> int:
    """Elements of one input of the intermediate results that layers of experts save for the backward pass."""
    elements = 0
    for plan in (term for layer in total.plans for term in layer.terms):
        first = len(plan.program.network.operands)
        elements += sum(prod(plan.steps[k - first].shape) for k in saved_results(plan.program, False))
    return elements // BATCH


# ---- tables -----------------------------------------------------------------------------------------------

Table = list[tuple[str, ...]]


def tables(
    kind: str,
    names: Sequence[str],
    accelerators: Sequence[int] = (4, 64),
    machine: Machine | None = None,
    *,
    overrides: Sequence[str] = (),
    rows: int = IMAGENET,
) -> tuple[Table, Table]:
    """FLOPs and memory of settings, and predictions of their trainings, as text.

    Parameters
    ----------
    kind : {"mixer", "gpt2"}
    names : sequence of str
        Names of settings, or TOML files.
    overrides : sequence of str, optional
        As of `.settings.read_settings`.
    rows : int, default 1,281,167
        As of `predict`.

    Returns
    -------
    list of tuple of str, list of tuple of str
        A heading, and a line for each settings; and for each number of accelerators and settings.
    """
    unit, row = ("token", "window") if kind == GPT2Run.kind else ("image", "image")
    works: Table = [("settings", "parameters", f"GFLOP per {unit}", f"MB per {row}", "state, GB")]
    predictions: Table = [
        (
            "on", "settings", "accumulation", f"{row}s at once", "GB, DDP", "GB, FSDP2", f"{unit}s/s",
            "hours", "GB/s",
        )
    ]  # fmt: skip
    counts = []
    for name in names:
        settings = read_settings(kind, name, overrides)
        counted = work(settings)
        counts.append((name.removesuffix(".toml"), settings, counted))
        saved = (counted.activations + counted.loss) / 1e6
        state = _state(counted, 1, False, settings.train.precision != "no") / 1e9
        works.append(
            (
                counts[-1][0], f"{counted.parameters:,}", f"{counted.flops / 1e9:.3g}", f"{saved:,.0f}",
                f"{state:.2f}",
            )
        )  # fmt: skip
    for count in accelerators:
        for name, settings, counted in counts:
            ddp, fsdp = (
                predict(settings, count, is_sharded=sharded, machine=machine, rows=rows, known=counted)
                for sharded in (False, True)
            )
            # With the rows of DDP, so that both are of one accumulation.
            sharded_memory = fsdp.state + ddp.memory - ddp.state
            predictions.append(
                (
                    f"{count}", name, f"{ddp.accumulation}", f"{ddp.rows:,}", f"{ddp.memory / 1e9:.1f}",
                    f"{sharded_memory / 1e9:.1f}", f"{ddp.units_per_second:,.0f}", f"{24 * ddp.days:.1f}",
                    f"{ddp.sent / 1e9:.1f}",
                )
            )  # fmt: skip
    return works, predictions


def published(kind: str) -> list[str]:
    """Names of the settings at the published scale, the dense one first.

    Parameters
    ----------
    kind : {"mixer", "gpt2"}
    """
    return sorted((name for name in packaged(kind) if "-" in name), key=lambda name: not name.endswith("mlp"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables of predictions.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the command line by default.
    """
    machine = Machine()
    parser = argparse.ArgumentParser(
        prog="python -m mumoe_tensor.training.scale",
        description="Predict FLOPs, memory and time of a training from its settings.",
        epilog="Accumulation is the least with which memory suffices. GB/s: what an accelerator sends, DDP.",
    )
    parser.add_argument("kind", nargs="?", choices=list(RUNS), help="both by default")
    parser.add_argument("settings", nargs="*", help="names or TOML files; by default all that are published")
    parser.add_argument("--accelerators", type=int, nargs="+", default=[4, 64], metavar="N")
    for name, meaning in (
        ("peak", "FLOPs a second of an accelerator"),
        ("utilisation", "share of these that is made use of"),
        ("memory", "bytes of an accelerator that may be taken"),
    ):
        default = getattr(machine, name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning}; default {default:g}")
    parser.add_argument("--rows", type=int, default=IMAGENET, help="images of an epoch; default %(default)s")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        machine = Machine(options.peak, options.utilisation, options.memory)
        printed = [
            lines
            for kind in ([options.kind] if options.kind else RUNS)
            for lines in tables(kind, options.settings or published(kind), options.accelerators, machine,
                                overrides=options.overrides, rows=options.rows)
        ]  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    for lines in printed:
        print(text_table(lines, ">" * len(lines[0])), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
