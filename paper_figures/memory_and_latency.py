"""Peak memory and latency of a forward pass with 128 experts: linear layer, dense experts, and formats.

Oldfield et al. (2024), cost compared with dense and sparse mixtures: a dense mixture stores and uses all
weights, a sparse mixture stores all and uses few; factorized layers are close to the linear layer in both.

Settings: 768 → 768 with biases, 128 experts, float32, one thread, a single input and a batch of 256, no
gradients, with the gate (entmax15; softmax of two logits in the sparse mixture, whose inputs are grouped by
expert). Ranks match the parameters of the linear layer; Hadamard has none. Latency: median over rounds in one
process, with quartiles. Peak: weights, and growth of the resident set in the pass, in a new process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import nn

import mumoe_tensor as mt
from benchmarks.harness import MIB, quartiles
from mumoe_tensor.ledger import Row
from mumoe_tensor.measure.environment import environment_text
from mumoe_tensor.measure.memory import growth, in_fresh_process
from mumoe_tensor.measure.passes import forward
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import MuMoE
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.study.mixtures import SparseMixture
from paper_figures.common import FORMATS, LINEAR, OTHERS, colour_of, new_figure, title_of

EXPERTS, TOP_K, BATCH = 128, 2, 256
NAMES = (*OTHERS, *FORMATS)


def module_of(name: str, inputs: int, features: int = LINEAR.in_features, experts: int = EXPERTS) -> Any:
    """The module for inference on a batch of `inputs`, with a gate that distinguishes them."""
    torch.manual_seed(0)
    if name == "linear":
        return nn.Linear(features, features)
    if name == "sparse moe":
        spec = mt.LayerSpec("dense", experts=experts, in_features=features, out_features=features, bias=True)
        return SparseMixture(spec, TOP_K).eval()
    format = mt.get_format("dense" if name == "dense moe" else name)
    budget: Literal["match"] | None = "match" if format.bonds(1) else None
    module = MuMoE(features, features, experts, format, parameters=budget, batch_hint=inputs)
    nn.init.normal_(module.gate.weight, std=features**-0.5)
    return module.eval()


def peak(name: str, inputs: int) -> int:
    """Bytes of the weights, and peak growth of this process in a forward pass, on one thread."""
    torch.set_num_threads(1)
    with torch.no_grad():
        # First run a small layer of the same kind, so that libraries allocate their buffers.
        module_of(name, 4, features=64, experts=4)(torch.randn(4, 64))
        module, x = module_of(name, inputs), torch.randn(inputs, LINEAR.in_features)
        return x.itemsize * num_parameters(module) + growth(lambda: module(x))


def rows(quick: bool) -> list[Row]:
    """One row per layer and number of inputs."""
    records, measured = [], environment_text()
    for inputs in (BATCH,) if quick else (1, BATCH):
        x = torch.randn(inputs, LINEAR.in_features)
        modules = {name: module_of(name, inputs) for name in (("linear", "cp") if quick else NAMES)}
        calls = {name: forward(module, x) for name, module in modules.items()}
        times = compare(calls, "linear", rounds=3 if quick else 31, limit=0.5 if quick else 30)
        for name, module in modules.items():
            rank = module.config["rank"] if isinstance(module, MuMoE) else None
            row = {"name": name, "inputs": inputs, "rank": str(rank) if rank else None}
            row["parameters"] = num_parameters(module)
            row |= quartiles(times.spread(name), "ms", "ms_low", "ms_high", 1e3)
            row |= quartiles(times.ratio(name), "to_linear", "to_linear_low", "to_linear_high")
            row["peak_mib"] = in_fresh_process(f"{__name__}:peak", name, inputs) / MIB
            records.append(row | {"measured": measured})
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """One dot per layer: filled for the batch, hollow for a single input."""
    figure, axes = new_figure(2, height=3.0)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for ax, column in zip(axes, ("ms", "peak_mib"), strict=True):
        for row in rows:
            low, high = (row.get(f"{column}_{end}", row[column]) for end in ("low", "high"))
            look: dict[str, Any] = {"fmt": "o", "color": colour_of(row["name"]), "markersize": 5}
            look["markerfacecolor"] = "white" if row["inputs"] == 1 else look["color"]
            error = [[row[column] - low], [high - row[column]]]
            ax.errorbar(row[column], names.index(row["name"]), xerr=error, **look)
        ax.set_yticks(range(len(names)), [title_of(name) for name in names])
        ax.set(xscale="log", ylim=(len(names) - 0.5, -0.5))
        # (Minor tick labels would overlap on less than a decade.)
        ax.xaxis.set_minor_formatter("")
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="0.9")
    axes[0].set(xlabel="latency, ms", xlim=(0.01, None))
    axes[1].set(xlabel="peak memory, MiB", xlim=(1, None))
    axes[1].tick_params(labelleft=False)
    for face, label in (("white", "a single input"), ("black", f"{BATCH} inputs")):
        axes[1].plot([], [], "ko", markerfacecolor=face, markersize=5, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
