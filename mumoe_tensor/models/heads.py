"""Heads, dense or with experts, which map features to class logits, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_positive
from mumoe_tensor.configs.head import LINEAR, HeadModelConfig
from mumoe_tensor.formats import Format
from mumoe_tensor.nn import MuMoE, MuMoEMLP
from mumoe_tensor.nn.experts import Init
from mumoe_tensor.nn.gate import GateNorm
from mumoe_tensor.nn.weights import load_tensors, read_tensors, write_tensors
from mumoe_tensor.readers import parse_json, reading
from mumoe_tensor.spec import LayerSpec, as_budget


class Head(nn.Module):
    """A head that centres and scales features, and maps them to logits by a layer or a block.

    Parameters
    ----------
    hidden : int, optional
        Hidden size of a block of two layers with GELU between them. By default, the head is a single layer.
    format : str, dict or Format, default "cp"
        Format of the experts, or ``"linear"`` for a head without experts.
    experts : int or sequence of int, default 64
        Number of experts at each level.
    rank : int or sequence of int, optional
        See `mumoe_tensor.nn.MuMoE`; one entry may be None. The default is the smallest rank that allows an
        expert of full rank, as in the head without experts.
    parameters : int or str, optional
        Budget, including the gate and biases. The rank, or its None entry, is chosen so that the number of
        parameters is closest to it. ``"match"``, the default for a None entry, is the number of parameters of
        the head without experts, and ``"2x"`` a multiple of it. For a format without a rank, `hidden` is
        solved for instead, and a single layer ignores the budget.
    gate, gate_norm, init : optional
        See `mumoe_tensor.nn.MuMoE`.

    Attributes
    ----------
    config : dict
        The arguments of a head like this one, including the rank and hidden size that were solved for.
    body : Linear, Sequential, MuMoE or MuMoEMLP
    mean, scale : Tensor
        The head subtracts `mean` from the features and divides them by `scale`; see `centre_on`.

    Raises
    ------
    ValueError
        If a size, a rank or an option is invalid, or no rank fits the budget.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        classes: int,
        hidden: int | None = None,
        *,
        format: str | Mapping[str, Any] | Format = HeadModelConfig.format,
        experts: Any = HeadModelConfig.experts,
        rank: Any = None,
        parameters: int | str | None = None,
        gate: str = HeadModelConfig.gate,
        gate_norm: GateNorm = HeadModelConfig.gate_norm,
        init: Init = "linear",
    ):
        super().__init__()
        in_features, classes = as_positive(in_features, "in_features"), as_positive(classes, "classes")
        hidden = None if hidden is None else as_positive(hidden, "hidden")
        self.config: dict[str, Any]
        if format == LINEAR:
            if rank is not None or parameters is not None:
                raise ValueError("a head without experts has a fixed number of parameters and no rank.")
            self.body = _dense(in_features, hidden, classes)
            self.config = dict(in_features=in_features, classes=classes, hidden=hidden, format=LINEAR)
        else:
            spec = LayerSpec(
                format, experts=experts, in_features=in_features, hidden=hidden, out_features=classes,
                rank=rank, bias=True,
            )  # fmt: skip
            if rank is None and parameters is None:
                spec = spec.with_full_rank_experts()
            elif rank is None or None in (spec.rank or ()):
                spec = _nearest(spec, "match" if parameters is None else parameters)
            elif parameters is not None:
                raise ValueError(
                    f"either rank or parameters must be given, got rank={spec.rank} and {parameters=}."
                )
            make = MuMoE if spec.hidden is None else MuMoEMLP
            self.body = make.from_spec(spec, gate=gate, gate_norm=gate_norm, init=init)
            made = self.body.config
            self.config = dict(
                in_features=in_features, classes=classes, hidden=spec.hidden, format=made["format"],
                experts=list(spec.experts), rank=list(spec.full_rank),
                **{name: made[name] for name in ("gate", "gate_norm", "init")},
            )  # fmt: skip
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def centre_on(self, features: Tensor) -> None:
        """Set `mean` and `scale` to the statistics of given features; see `centring`.

        All features have a common scale, since a feature that hardly varies in this sample may vary more
        later.

        Parameters
        ----------
        features : Tensor of shape (rows, in_features)
        """
        mean, scale = centring(features)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features.

        Parameters
        ----------
        features : Tensor of shape (..., in_features)

        Returns
        -------
        Tensor of shape (..., classes)
        """
        logits: Tensor = self.body((features - self.mean) / self.scale)
        return logits


def centring(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each feature, and a common standard deviation of all features (1 if they are constant)."""
    mean = features.mean(0)
    spread = (features - mean).square().mean().sqrt()
    return mean, spread if spread > 0 else torch.ones_like(spread)


def save_head(head: Head, path: Path) -> None:
    """Save a head with its config to a safetensors file, atomically."""
    write_tensors(path, head.state_dict(), {"head": json.dumps(head.config)})


def load_head(path: str | Path) -> Head:
    """Load a head saved by `save_head`; nothing is unpickled.

    Returns
    -------
    Head
        The head in evaluation mode.

    Raises
    ------
    ValueError
        If the file is not a saved head, or is damaged.
    OSError
        If the file cannot be read.
    """
    tensors, about = read_tensors(path)
    with reading(path):
        if "head" not in about:
            raise ValueError(f"it must be a safetensors file with a head's config, got keys {sorted(about)}.")
        config = parse_json(about["head"])
        with torch.device("meta"):
            head = Head(**config)
        return load_tensors(head, tensors)


def _dense(in_features: int, hidden: int | None, classes: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(in_features, classes)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, classes))


def _nearest(spec: LayerSpec, parameters: int | str) -> LayerSpec:
    """The spec with the rank closest to a budget, or the hidden size if the format has no rank."""
    if spec.format.bonds(spec.num_levels):
        return spec.fitted(parameters, rounding="nearest")
    if spec.hidden is None:
        return spec
    if spec.format.is_split:
        raise ValueError(
            "a format must have a rank or modes that are not split, to fit a budget; format "
            f"{spec.format.name!r} has neither. Pass the rank () to keep the sizes."
        )
    budget = as_budget(parameters, spec.dense_parameters)
    # The number of parameters is linear in the hidden size.
    smallest, next_size = (replace(spec, hidden=size).parameters for size in (1, 2))
    hidden = round((budget - smallest) / (next_size - smallest)) + 1
    if hidden < 1:
        raise ValueError(
            f"the budget of {budget:,} parameters must allow a hidden size of 1, at which format "
            f"{spec.format.name!r} with {spec.experts} experts has {smallest:,}. Pass the rank () to keep "
            "the size."
        )
    return replace(spec, hidden=hidden)
