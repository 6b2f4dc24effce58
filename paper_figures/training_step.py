"""Time of a training step, and memory kept for the backward pass, over the number of experts.

Not in the paper, which measures inference. Beside the dense MLP that the block stands for.

Settings: GPT-2's MLP block, 768 → 3072 → 768 with biases, 1,024 tokens, float32, one thread, layer norm in
the gate; the ranks are those with which 256 experts have the dense MLP's parameters, and are kept. Step:
zero_grad, forward and backward; median of turns in one process, with quartiles as a band. Kept: by the
forward pass, besides parameters and buffers, every storage once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import mumoe_tensor as mt
from benchmarks.layers import GPT2, Shape, step
from benchmarks.memory import MIB
from benchmarks.probes import kept_bytes
from mumoe_tensor.study.timing import compare
from paper_figures.common import FORMATS, Row, draw_lines, new_figure, set_experts_axis, spread

TOKENS, MATCHED_AT = 1024, 256
BLOCK: dict[str, Any] = dict(in_features=GPT2[0], hidden=GPT2[1], out_features=GPT2[2], bias=True, gate=True)


def measure(quick: bool) -> list[Row]:
    """One row a format and number of experts; the dense MLP in each number's turn."""
    names, tokens = (FORMATS[:2], 32) if quick else (FORMATS, TOKENS)
    ranks = {
        name: mt.fit_rank(name, experts=MATCHED_AT, **BLOCK) if mt.get_format(name).bonds(1) else None
        for name in names
    }
    x, gradient = torch.randn(tokens, GPT2[0], requires_grad=True), torch.randn(tokens, GPT2[-1])
    found = []
    for experts in (16, 256) if quick else (16, 64, 256, 1024, 4096):
        torch.manual_seed(0)
        shapes = {
            name: Shape("", tokens, GPT2, (experts,), name, rank, "layer") for name, rank in ranks.items()
        }
        modules = {name: shape.layer() for name, shape in shapes.items()}
        modules["dense"] = nn.Sequential(nn.Linear(*GPT2[:2]), nn.GELU(), nn.Linear(*GPT2[1:]))
        calls = {name: step(module, x, gradient) for name, module in modules.items()}
        times = compare(calls, "dense", rounds=3 if quick else 15, limit=1 if quick else 30)
        kept = {name: kept_bytes(module, x) for name, module in modules.items()}
        for name in names:
            row = {"name": name, "experts": experts, "rank": str(ranks[name])}
            row |= spread("ms", times.spread(name), 1e-3) | spread("to_dense", times.ratio(name))
            row |= {"kept_mib": kept[name] / MIB, "kept_to_dense": kept[name] / kept["dense"]}
            found.append(row | {"dense_ms": 1e3 * times.spread("dense").median})
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Both as ratios to the dense MLP."""
    figure, axes = new_figure(2, height=2.8)
    titles = {"to_dense": "Time of a step", "kept_to_dense": "Kept for the backward pass"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        ax.axhline(1, color="black", linestyle="--", label="dense MLP")
        draw_lines(ax, rows, "experts", column, marker="o", markersize=3)
        set_experts_axis(ax, rows)
        ax.set(title=title, ylabel="relative to the dense MLP", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure
