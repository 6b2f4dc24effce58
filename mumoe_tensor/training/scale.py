"""FLOPs and memory of a training run, computed from its settings, and the gradient accumulation that fits.

python -m mumoe_tensor.training.scale                         the published settings, on 4 and 64 accelerators
python -m mumoe_tensor.training.scale gpt2 gpt2-124m-cp-256 --accelerators 8 --memory 70e9
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.cost import Cost, cost
from mumoe_tensor.models.blocks import DENSE
from mumoe_tensor.models.gpt2 import GPT2Config
from mumoe_tensor.models.mixer import MixerConfig
from mumoe_tensor.nn.backward import saved_results
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.text_table import text_table
from mumoe_tensor.training.settings import RUNS, GPT2Run, Settings, packaged, read_settings

#: Number of inputs for which the contraction path is chosen, as in the layers.
BATCH = 1024
#: Bytes per element of float32, the dtype of weights, gradients and the state of AdamW.
ITEM = 4
#: Usable bytes per accelerator: four fifths of 80 GB.
MEMORY = 64e9


@dataclass(frozen=True)
class Work:
    """FLOPs and memory of training a model.

    Attributes
    ----------
    parameters : int
    units : int
        Tokens per row, or 1 if a row is an image.
    flops : int
        FLOPs per token or image, forward and backward.
    activations : int
        Bytes per row saved for the backward pass.
    loss : int
        Further bytes per row for the logits while the loss is differentiated.
    state : int
        Bytes of weights, gradients and the state of AdamW, and of copies of the weights in bfloat16 or
        float16.
    """

    parameters: int
    units: int
    flops: int
    activations: int
    loss: int
    state: int


def work(settings: Settings) -> Work:
    """Count FLOPs and memory of training a model.

    Only the FLOPs of matrix products count, two per multiplication: blocks of experts by `mumoe_tensor.cost`,
    and attention as if unmasked. Norms and gate functions are left out. A backward pass costs twice a forward
    pass. Saved for it are the operands of products (in bfloat16 or float16 under these precisions), the
    inputs of norms, in float32, and the log-probabilities of the loss, without a compiler or dropout.

    Returns
    -------
    Work
    """
    model: Any = settings.make_model("meta")
    parameters = num_parameters(model)
    item = ITEM if settings.train.precision == "no" else 2
    count = _gpt2 if isinstance(settings, GPT2Run) else _mixer
    flops, activations, logits = count(model.config, item)
    units = model.config.context if isinstance(settings, GPT2Run) else 1
    return Work(
        parameters=parameters,
        units=units,
        flops=3 * flops // units,
        # The log-probabilities are saved.
        activations=activations + ITEM * logits,
        # The logits, in the model's precision and in float32, and the gradient.
        loss=(2 * ITEM if item == ITEM else 2 * ITEM + item) * logits,
        state=(4 * ITEM + (0 if item == ITEM else item)) * parameters,
    )


def accumulation(counted: Work, train: TrainConfig, accelerators: int, memory: float = MEMORY) -> int:
    """The smallest ``train.accumulation`` with which a step fits into memory.

    Every accelerator stores the whole state (DDP) and, if there are several, the buckets for gradients.

    Parameters
    ----------
    counted : Work
    train : TrainConfig
    accelerators : int
    memory : float, default 64e9
        Usable bytes per accelerator.

    Raises
    ------
    ValueError
        If a step cannot be divided evenly among the accelerators, or even the smallest part does not fit.
    """
    if accelerators < 1:
        raise ValueError(f"accelerators must be positive, got {accelerators}.")
    state = counted.state + (ITEM * counted.parameters if accelerators > 1 else 0)
    row = counted.activations + counted.loss
    # Mixup pairs neighbouring rows, and both rows of a pair must go to one process.
    together = accelerators * (2 if train.mixup else 1)
    parts = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * together) == 0]
    for n in parts:
        if state + train.batch_size // (n * accelerators) * row <= memory:
            return n
    raise ValueError(
        f"a step of {train.batch_size} rows must divide among {accelerators} accelerators into parts "
        f"that fit in {memory / 1e9:.1f} GB; the state takes {state / 1e9:.1f} GB, a row "
        f"{row / 1e9:.2f} GB, and the possible numbers of parts are {parts or 'none'}."
    )


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
    """As `_gpt2`, for one image."""
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
    """FLOPs of an MLP per input, and bytes saved besides the input of its norm."""
    is_dense = config.format == DENSE
    spec = LayerSpec(
        "dense" if is_dense else config.format, experts=() if is_dense else config.experts, rank=rank,
        in_features=features, hidden=hidden, out_features=features, bias=True,
    )  # fmt: skip
    total = cost(spec, gate=True, batch=BATCH)
    flops = total.flops // BATCH
    if is_dense:
        return flops, item * (features + 2 * hidden)
    # Gate and experts share an input that is neither cast nor copied. The gate computes in float32.
    gate_input = item * features if is_transposed or item != ITEM else 0
    experts = sum(config.experts)
    coefficients = (item if item == ITEM else ITEM + item) * experts
    normed_logits = {"none": 0, "layer": ITEM, "batch": ITEM}[config.gate_norm] * experts
    return flops, gate_input + item * (features + hidden + _results(total)) + coefficients + normed_logits


def _results(total: Cost) -> int:
    """Elements per input of the intermediate results that expert layers save for the backward pass."""
    elements = 0
    for plan in (term for layer in total.plans for term in layer.terms):
        first = len(plan.program.network.operands)
        elements += sum(prod(plan.steps[k - first].shape) for k in saved_results(plan.program, False))
    return elements // BATCH


def table(
    kind: str,
    names: Sequence[str],
    accelerators: Sequence[int] = (4, 64),
    memory: float = MEMORY,
) -> list[tuple[str, ...]]:
    """Work and accumulation as rows of text: a heading, then a line for each run.

    Parameters
    ----------
    kind : {"mixer", "gpt2"}
    names : sequence of str
        Names of packaged settings, or TOML files.
    accelerators : sequence of int
    memory : float, default 64e9

    Returns
    -------
    list of tuple of str
    """
    unit, row = ("token", "window") if kind == GPT2Run.kind else ("image", "image")
    columns = ("settings", "parameters", f"GFLOP per {unit}", "state, GB", f"MB per {row}")
    lines = [(*columns, *(f"accumulation on {n}" for n in accelerators))]
    for name in names:
        settings = read_settings(kind, name)
        counted = work(settings)
        saved = (counted.activations + counted.loss) / 1e6
        parts = (f"{accumulation(counted, settings.train, n, memory)}" for n in accelerators)
        figures = (f"{counted.flops / 1e9:.3g}", f"{counted.state / 1e9:.2f}", f"{saved:,.0f}")
        lines.append((name.removesuffix(".toml"), f"{counted.parameters:,}", *figures, *parts))
    return lines


def published(kind: str) -> list[str]:
    """Names of the packaged settings at the published scale, the dense one first."""
    return sorted((name for name in packaged(kind) if "-" in name), key=lambda name: not name.endswith("mlp"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each kind."""
    parser = argparse.ArgumentParser(
        prog="python -m mumoe_tensor.training.scale",
        description="FLOPs and memory of a training run, and the least accumulation that fits.",
    )
    parser.add_argument("kind", nargs="?", choices=list(RUNS), help="kind of model; both by default")
    parser.add_argument("settings", nargs="*", help="names or TOML files; by default all published settings")
    parser.add_argument("--accelerators", type=int, nargs="+", default=[4, 64], metavar="N")
    parser.add_argument(
        "--memory", type=float, default=MEMORY, help="usable bytes per accelerator; default %(default)g"
    )
    options = parser.parse_args(arguments)
    try:
        for kind in [options.kind] if options.kind else RUNS:
            names = options.settings or published(kind)
            lines = table(kind, names, options.accelerators, options.memory)
            print(text_table(lines, ">" * len(lines[0])), end="\n\n")
    except (ValueError, OSError) as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
