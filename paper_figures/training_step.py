"""Time of a training step, and memory saved for the backward pass, against the number of experts.

Not in the paper, which measures inference. Relative to the dense MLP that the block replaces.

Settings: GPT-2's MLP block, 768 → 3072 → 768 with biases, 1,024 tokens, float32, one thread, layer norm in
the gate; the ranks, with which 256 experts have the dense MLP's parameters, are the same for all numbers of
experts. Step: zero_grad, forward and backward; median over rounds in one process, with quartiles as a band.
Saved memory: each distinct storage that the forward pass saves, without parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from benchmarks.layers import GPT2, gpt2_block
from benchmarks.memory import MIB
from benchmarks.probes import kept_bytes
from mumoe_tensor.measure.passes import step
from mumoe_tensor.measure.timing import compare
from paper_figures.common import FORMATS, Row, draw_lines, new_figure, rank_text, set_experts_axis, spread

TOKENS, MATCHED_AT = 1024, 256


def measure(quick: bool) -> list[Row]:
    """One row per format and number of experts; the dense MLP is measured with each number."""
    names, tokens = (FORMATS[:2], 32) if quick else (FORMATS, TOKENS)
    matched = {name: gpt2_block(name, MATCHED_AT, None, tokens).spec for name in names}
    x = torch.randn(tokens, GPT2.in_features, requires_grad=True)
    gradient = torch.randn(tokens, GPT2.out_features)
    records = []
    for experts in (16, 256) if quick else (16, 64, 256, 1024, 4096):
        torch.manual_seed(0)
        blocks = {name: gpt2_block(name, experts, spec.rank, tokens) for name, spec in matched.items()}
        modules = {name: block.layer() for name, block in blocks.items()}
        modules["dense"] = blocks["cp"].dense(GPT2.parameters)
        calls = {name: step(module, x, gradient) for name, module in modules.items()}
        times = compare(calls, "dense", rounds=3 if quick else 15, limit=1 if quick else 30)
        kept = {name: kept_bytes(module, x) for name, module in modules.items()}
        for name in names:
            row = {"name": name, "experts": experts, "rank": rank_text(matched[name])}
            row |= spread("ms", times.spread(name), 1e-3) | spread("to_dense", times.ratio(name))
            row |= {"kept_mib": kept[name] / MIB, "kept_to_dense": kept[name] / kept["dense"]}
            records.append(row | {"dense_ms": 1e3 * times.spread("dense").median})
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """Both as ratios to the dense MLP."""
    figure, axes = new_figure(2, height=2.8)
    titles = {"to_dense": "Time of a step", "kept_to_dense": "Saved for the backward pass"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        ax.axhline(1, color="black", linestyle="--", label="dense MLP")
        draw_lines(ax, rows, "experts", column, marker="o", markersize=3)
        set_experts_axis(ax, rows)
        ax.set(title=title, ylabel="relative to the dense MLP", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure
