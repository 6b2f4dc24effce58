"""Error of a trained weight tensor in each format, against rank and against parameters.

Not in the paper: how well a factorized layer can approximate existing experts.

Settings: three trained layers of EfficientNet-Lite0, 80 → 480, stacked as three experts, without biases and
gate; `decompose` with the best of two starts, at most 200 iterations, seed 0. The free rank is solved for the
parameters: CP R, Tensor Ring (2, 2, R3), Tensor Train (3, R3), Tucker (3, 60, Ro); Hadamard has none. Dashed:
a truncated SVD of each expert separately. The error is relative, in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

import mumoe_tensor as mt
from paper_figures.common import TITLES, Row, colour_of, draw_lines, new_figure, pretrained, rank_text

OPEN = {"cp": (None,), "tr": (2, 2, None), "tt": (3, None), "tucker": (3, 60, None)}
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)


def measure(quick: bool) -> list[Row]:
    """One row per format and share of the parameters. Not timed, but stored because it takes long."""
    weight = pretrained()
    n, i, o = weight.shape
    dense = mt.LayerSpec("dense", experts=n, in_features=i, out_features=o)
    effort = dict(n_restarts=1, n_iter=5) if quick else dict(n_restarts=2, n_iter=200)
    shares = SHARES[:2] if quick else SHARES
    records = []

    def add(name: str, rank: str, open_rank: int | None, parameters: int, error: float) -> None:
        values = {"parameters": parameters, "share": parameters / weight.size, "relative_error": error}
        records.append({"name": name, "rank": rank, "open_rank": open_rank, **values})

    for name, rank in OPEN.items():
        for share in shares:
            budget = round(share * weight.size)
            spec = replace(dense, format=name, rank=rank).fitted(budget, rounding="down", gate=False)
            _, error = mt.decompose(weight, name, spec.rank, **effort)
            add(name, rank_text(spec), spec.rank[-1], spec.weight_parameters, error)
    _, error = mt.decompose(weight, "hadamard", **effort)
    add("hadamard", "none", None, replace(dense, format="hadamard").weight_parameters, error)
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    for share in shares:
        rank = int(share * weight.size / (n * (i + o)))
        error = float((squares[:, rank:].sum() / squares.sum()) ** 0.5)
        add("svd", str(rank), rank, n * rank * (i + o), error)
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """The error against the free rank, and against the share of the parameters."""
    figure, axes = new_figure(2, height=2.7)
    lines = [row for row in rows if row["name"] in OPEN]
    alone = [row for row in rows if row["name"] == "svd"]
    (single,) = (row for row in rows if row["name"] == "hadamard")
    for ax, x in zip(axes, ("open_rank", "share"), strict=True):
        draw_lines(ax, lines, x, "relative_error", marker="o", markersize=3)
        places, errors = zip(*((row[x], row["relative_error"]) for row in alone), strict=True)
        ax.plot(places, errors, "k--", label="SVD of each expert")
        ax.set(ylim=(0, 1), ylabel="relative error")
    axes[0].set(xlabel="open rank", xlim=(0, None))
    axes[1].set(xlabel="parameters, share of the dense ones", xlim=(0, 1.05))
    axes[1].plot(
        single["share"], single["relative_error"], "D", color=colour_of("hadamard"), label=TITLES["hadamard"]
    )
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
