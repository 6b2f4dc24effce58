"""The published configurations: parameter counts of networks and heads, computed by this library.

Oldfield et al. (2024), parameters of the trained models: at matched parameters, a network has many experts in
every block. The last column has the parameters of the same number of dense experts.

Settings: CLIP ViT-B/32 head 768 → 1000; MLP-Mixer S-16 (8 blocks of width 512, tokens 196 → 256 → 196,
channels 512 → 2048 → 512); GPT-2 (12 blocks 768 → 3072 → 768, vocabulary 50,304, context 1024, embeddings
tied); CelebA head 768 → 40, and the dense head of high rank, without biases. μMoE layers with biases and
gate. Ranks as published. The last column counts only weights and biases of the experts, without gates and the
rest of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mumoe_tensor import LayerSpec, get_format
from mumoe_tensor.ledger import Row
from paper_figures.common import TITLES, new_figure


class Network(NamedTuple):
    """The blocks to replace, and the parameters of the rest of a network.

    Attributes
    ----------
    blocks : list of LayerSpec
        The distinct dense blocks; blocks of experts always have biases.
    variants : list of tuple
        Format, number of experts, and the rank in each of the blocks.
    repeated : int
        Number of times the network repeats the blocks.
    rest : int
        Parameters of the rest of the network.
    norms : tuple of int
        Parameters of the norms of the blocks, for dense blocks and for blocks of experts.
    """

    name: str
    blocks: list[LayerSpec]
    variants: list[tuple[str, int, tuple[Any, ...]]]
    repeated: int = 1
    rest: int = 0
    norms: tuple[int, int] = (0, 0)

    def parameters(self, blocks: list[LayerSpec], norms: int) -> int:
        """Parameters with these blocks."""
        return self.rest + self.repeated * (norms + sum(block.parameters for block in blocks))


def dense(*widths: int, bias: bool = True) -> LayerSpec:
    """A linear layer for two widths, or a block of two layers for three."""
    first, *hidden, last = widths
    return LayerSpec(
        "dense",
        experts=(),
        in_features=first,
        hidden=hidden[0] if hidden else None,
        out_features=last,
        bias=bias,
    )


CLIP = {16: (424, 107), 32: (414, 106), 64: (393, 102), 128: (354, 95), 256: (283, 81), 512: (165, 52)}
NETWORKS = (
    Network(
        "CLIP ViT-B/32 head",
        [dense(768, 1000)],
        [("cp", n, (r,)) for n, (r, _) in CLIP.items()]
        + [("tr", n, ((4, 4, r3),)) for n, (_, r3) in CLIP.items()],
    ),
    Network(
        "MLP-Mixer S-16",
        [dense(196, 256, 196), dense(512, 2048, 512)],
        [("cp", 64, (147, 384)), ("tr", 64, ((4, 4, 37), (4, 4, 97)))],
        repeated=8,
        # Patch embedding, two norms per block, the last norm, the head.
        rest=(3 * 16**2 + 1) * 512 + 8 * 2 * 1024 + 1024 + 513 * 1000,
    ),
    Network(
        "GPT-2 124M",
        [dense(768, 3072, 768, bias=False)],
        [("cp", n, (r,)) for n, r in ((64, 599), (256, 556))]
        + [("tr", n, ((4, 4, r3),)) for n, r3 in ((64, 153), (256, 149))],
        repeated=12,
        # Embeddings, attention and its norm, the last norm; without biases.
        rest=(50_304 + 1024) * 768 + 12 * (4 * 768**2 + 768) + 768,
        norms=(768, 2 * 768),
    ),
    Network("CelebA head", [dense(768, 40)], [("cp", 128, (512,))]),
    Network("CelebA head, 768 → 1024 → 40", [dense(768, 1024, 40, bias=False)], []),
)


def rows(quick: bool) -> list[Row]:
    """One row per network and kind of block."""
    table: list[Row] = []
    for network in NETWORKS:
        parameters = network.parameters(network.blocks, network.norms[0])
        row: Row = {"network": network.name, "layer": "dense", "experts": None, "rank": None}
        table.append(row | {"parameters": parameters, "dense_experts": None})
        biased = [replace(block, bias=True) for block in network.blocks]
        for format, experts, ranks in network.variants:
            mixtures = [
                replace(block, format=get_format(format), experts=(experts,), rank=rank)
                for block, rank in zip(biased, ranks, strict=True)
            ]
            row = {"network": network.name, "layer": TITLES[format], "experts": experts}
            row["rank"] = " and ".join(map(str, ranks))
            row["parameters"] = network.parameters(mixtures, network.norms[1])
            row["dense_experts"] = network.repeated * experts * sum(block.parameters for block in biased)
            table.append(row)
    return table


#: Columns: heading, position in inches, alignment.
COLUMNS = {
    "network": ("network", 0.0, "left"),
    "layer": ("layer", 2.05, "left"),
    "experts": ("experts", 3.35, "right"),
    "rank": ("rank", 3.55, "left"),
    "parameters": ("parameters", 5.75, "right"),
    "dense_experts": ("dense experts", 7.0, "right"),
}


def draw(rows: Sequence[Row]) -> Figure:
    """The rows as a table, with a rule before each network."""
    figure, (ax,) = new_figure(height=0.18 * (len(rows) + 2))
    figure.set_figwidth(7.0)
    ax.set(xlim=(0, 7), ylim=(len(rows), -1.2), title="Published configurations")
    ax.set_axis_off()
    for heading, x, align in COLUMNS.values():
        ax.text(x, -0.5, heading, ha=align, va="center", weight="bold")
    network = None
    for y, row in enumerate(rows):
        cells = dict(row)
        if row["network"] == network:
            del cells["network"]
        else:
            network = row["network"]
            ax.axhline(y, color="black", linewidth=0.6)
        for column, value in cells.items():
            _, x, align = COLUMNS[column]
            text = "" if value is None else f"{value:,}" if isinstance(value, int) else value
            ax.text(x, y + 0.5, text, ha=align, va="center")
    return figure
