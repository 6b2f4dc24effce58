"""The contraction of each format: its tensor network, and the order of the pairwise products.

Oldfield et al. (2024), diagrams of the layers: coefficients and inputs are contracted with the factors, and
the weight tensor is never formed.

Settings: 64 experts, 768 → 768 with biases, one input, ranks as in parameters_over_experts; the plan with the
least time. Circles are factors, squares the coefficients a and the input z, lines the indices that two
tensors share, and dots indices shared by more than two. A number is the position of a product in the plan: it
is at the indices contracted by the product, or between the tensors of an outer product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import mumoe_tensor as mt
from mumoe_tensor.contraction.network import Indices, Network
from mumoe_tensor.formats.base import BATCH
from mumoe_tensor.ledger import Row
from paper_figures.common import LINEAR, MATCHED_AT, colour_of, matched_layers

#: Direction of each mode in degrees; its vector is drawn outside, its factor further in.
ANGLES = {"n1": 210, "i": 330, "o": 90}
OUTSIDE, INSIDE = 1.6, 0.9
VECTORS = {"n1": "a", "i": "z"}


def plans() -> dict[str, mt.ContractionPlan]:
    """The plan of each format's forward pass, by the format's name."""
    layers = matched_layers() | {"dense": replace(LINEAR, experts=(MATCHED_AT,))}
    terms = {name: mt.plan(layer).terms for name, layer in layers.items()}
    return {name: plan for name, (plan,) in terms.items()}


def rows(quick: bool) -> list[Row]:
    """One row per format and product."""
    return [
        {
            "name": name,
            "step": k,
            "product": step.equation,
            "kind": step.kind,
            "shape": "x".join(map(str, step.shape)),
            "flops": step.flops,
        }
        for name, plan in plans().items()
        for k, step in enumerate(plan.steps, start=1)
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """One network per format."""
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    for ax, (name, plan) in zip(figure.subplots(2, 3).flat, plans().items(), strict=True):
        flops = sum(row["flops"] for row in rows if row["name"] == name)
        draw_network(ax, plan.program.network, colour_of(name))
        write_numbers(ax, plan)
        ax.set(title=mt.get_format(name).title, xlabel=f"{flops:,} FLOPs", aspect="equal")
        ax.set(xlim=(-1.8, 1.8), ylim=(-1.1, 1.85), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def draw_network(ax: Axes, network: Network, colour: str) -> None:
    """Operands as nodes, indices as lines between them."""
    places = [place_of(network, k) for k in range(len(network.operands))]
    for index, where in index_places(network).items():
        for end in ends(network, index):
            ax.plot(*zip(where, end, strict=True), color="0.45", linewidth=1.2, zorder=1)
        if len(ends(network, index)) > 2:
            ax.plot(*where, "o", color="0.45", markersize=4)
    for k, (x, y) in enumerate(places):
        vector = k >= network.weights
        ax.plot(x, y, "s" if vector else "o", color="0.25" if vector else colour, markersize=13)
        if vector:
            (mode,) = (index for index in network.operands[k] if index != BATCH)
            ax.text(x, y, VECTORS[mode], color="white", ha="center", va="center_baseline", style="italic")
    x, y = 1.08 * direction("o", OUTSIDE)
    ax.text(x, y, "y", ha="center", va="center", style="italic")


def write_numbers(ax: Axes, plan: mt.ContractionPlan) -> None:
    """The number of each product at the indices it contracts; several in one place are side by side."""
    where = index_places(plan.program.network)
    numbers: dict[tuple[float, float], list[str]] = {}
    for k, step in enumerate(plan.steps, start=1):
        left, right, result = ([x for x in axes if x != BATCH] for axes in step.axes)
        shared = [x for x in left if x in right]
        # Keep outer products away from the node in the middle, to which their indices lead.
        places = [where[x] for x in shared] or [2 * np.mean([where[x] for x in result], axis=0)]
        for place in places:
            numbers.setdefault(tuple(place), []).append(str(k))
    for (x, y), labels in numbers.items():
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "0.45", "linewidth": 0.8}
        ax.text(x, y, " ".join(labels), ha="center", va="center", bbox=box, zorder=3)


def direction(mode: str, radius: float) -> np.ndarray:
    """The point at a radius on a mode's ray."""
    angle = np.deg2rad(ANGLES[mode])
    return radius * np.array([np.cos(angle), np.sin(angle)])


def place_of(network: Network, position: int) -> np.ndarray:
    """The position of an operand: on the ray of its mode, or between the rays of its modes."""
    modes = [x for x in network.operands[position] if x in ANGLES]
    radius = INSIDE if position < network.weights else OUTSIDE
    return np.mean([direction(mode, radius) for mode in modes], axis=0) if modes else np.zeros(2)


def ends(network: Network, index: str) -> list[np.ndarray]:
    """The ends of the lines of an index: its operands, and a point outside for the output."""
    places = [place_of(network, k) for k, axes in enumerate(network.operands) if index in axes]
    return [*places, direction(index, 0.9 * OUTSIDE)] if index in network.output else places


def index_places(network: Network) -> dict[str, np.ndarray]:
    """The middle of each index."""
    indices: Indices = tuple(dict.fromkeys(x for axes in network.operands for x in axes if x != BATCH))
    return {index: np.mean(ends(network, index), axis=0) for index in indices}
