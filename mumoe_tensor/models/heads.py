"""Heads: from features of a network to the logits of classes, dense or of experts, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_entries, as_positive
from mumoe_tensor.models.weights import load_tensors, read_tensors, write_tensors
from mumoe_tensor.nn import MuMoE, MuMoEMLP
from mumoe_tensor.readers import parse_json, reading
from mumoe_tensor.spec import LayerSpec, as_budget

#: The name of a head without experts, where others have that of a format.
LINEAR = "linear"


class Head(nn.Module):
    """Features to logits: centred, scaled, and through a layer or a block, dense or of experts.

    Parameters
    ----------
    in_features, classes : int
    hidden : int, optional
        The head is a block of two layers with this size and GELU between them; else it is one layer.
    format : str, default "cp"
        Of the experts, or ``"linear"`` for a head without.
    experts : int or sequence of int, default 64
        One number a level.
    rank : int or sequence of int, optional
        As of `mumoe_tensor.nn.MuMoE`; an entry may be None. By default the smallest rank at which an expert
        can have full rank, and so can learn what the head without experts does.
    parameters : int or str, optional
        In the place of a whole rank: the head has the rank that comes nearest to these, gate and biases
        counted; ``"match"`` for those of the head without experts, a multiple of them as ``"2x"``. A format
        without a rank has the size between its layers that comes nearest; of it a single layer is as it is.
    gate, gate_norm, init : optional
        As of `mumoe_tensor.nn.MuMoE`.

    Attributes
    ----------
    config : dict
        The arguments that make such a head again, the rank solved.
    body : Linear, Sequential, MuMoE or MuMoEMLP
    mean, scale : Tensor
        Subtracted from features, and divided out of them; see `centre_on`.

    Raises
    ------
    ValueError
        If sizes, ranks or choices are wrong, or no rank fits the budget.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        classes: int,
        hidden: int | None = None,
        *,
        format: str = "cp",
        experts: Any = 64,
        rank: Any = None,
        parameters: int | str | None = None,
        gate: str = "entmax15",
        gate_norm: Literal["batch", "layer", "none"] = "batch",
        init: Literal["linear", "published"] = "linear",
    ):
        super().__init__()
        in_features, classes = as_positive(in_features, "in_features"), as_positive(classes, "classes")
        hidden = None if hidden is None else as_positive(hidden, "hidden")
        if format == LINEAR:
            if rank is not None or parameters is not None:
                raise ValueError("a head without experts has no rank, and its own number of parameters.")
            self.config: dict[str, Any] = dict(
                in_features=in_features, classes=classes, hidden=hidden, format=LINEAR
            )
            self.body = _dense(in_features, hidden, classes)
        else:
            rank = None if rank is None else as_entries(rank, "rank")
            is_open = rank is None or None in rank
            if not is_open and parameters is not None:
                raise ValueError(f"give a rank or parameters, got rank={rank} and parameters={parameters}.")
            spec = LayerSpec(
                format, experts=experts, in_features=in_features, hidden=hidden, out_features=classes,
                rank=rank, bias=True,
            )  # fmt: skip
            if rank is None and parameters is None:
                spec = spec.with_full_rank_experts()
            elif is_open:
                spec = _nearest(spec, "match" if parameters is None else parameters)
            hidden = spec.hidden
            common: Any = dict(
                experts=spec.experts, format=format, rank=spec.rank, gate=gate, gate_norm=gate_norm, init=init
            )
            if hidden is None:
                self.body = MuMoE(in_features, classes, **common)
            else:
                self.body = MuMoEMLP(in_features, hidden, classes, **common)
            own = self.body.config
            self.config = dict(
                in_features=in_features, classes=classes, hidden=hidden, format=own["format"],
                experts=list(spec.experts), rank=list(own["rank"]), gate=own["gate"],
                gate_norm=own["gate_norm"], init=own["init"],
            )  # fmt: skip
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def centre_on(self, features: Tensor) -> None:
        """From now on subtract the mean of these features, and divide by one number for all.

        A feature that hardly varies in them may vary later; so each is not scaled on its own.

        Parameters
        ----------
        features : Tensor of shape (rows, in_features)
        """
        mean, scale = centring(features)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits.

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
    """What is subtracted from features, and divided out of them: their mean, and one spread for all.

    Parameters
    ----------
    features : Tensor of shape (rows, features)

    Returns
    -------
    Tensor of shape (features,)
    Tensor of shape ()
        Of features that are all constant, 1.
    """
    mean = features.mean(0)
    spread = (features - mean).square().mean().sqrt()
    return mean, spread if spread > 0 else torch.ones_like(spread)


def save_head(head: Head, path: Path) -> None:
    """Write a head with its config as one file of safetensors, whole or not at all.

    Parameters
    ----------
    head : Head
    path : Path
    """
    write_tensors(path, head.state_dict(), {"head": json.dumps(head.config)})


def load_head(path: str | Path) -> Head:
    """Read a head that `save_head` wrote; nothing is unpickled.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Head
        In evaluation mode.

    Raises
    ------
    ValueError
        If it is no such file, or not what was written.
    OSError
        If it cannot be read.
    """
    tensors, about = read_tensors(path)
    with reading(path):
        if "head" not in about:
            raise ValueError(f"a head is a file of safetensors with its config; this has {sorted(about)}.")
        config = parse_json(about["head"])
        with torch.device("meta"):
            head = Head(**config)
        return load_tensors(head, tensors)


def _dense(in_features: int, hidden: int | None, classes: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(in_features, classes)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, classes))


def _nearest(spec: LayerSpec, parameters: int | str) -> LayerSpec:
    """The spec with the rank, or for want of one the hidden size, nearest to a number of parameters."""
    if spec.format.bonds(spec.num_levels):
        return spec.fitted(parameters, rounding="nearest")
    if spec.hidden is None:
        return spec
    budget = as_budget(parameters, spec.dense_parameters)
    # Both layers are linear in the hidden size.
    smallest, next_size = (replace(spec, hidden=size).parameters for size in (1, 2))
    hidden = round((budget - smallest) / (next_size - smallest)) + 1
    if hidden < 1:
        raise ValueError(
            f"the budget of {budget:,} parameters must allow for a hidden size of 1; format "
            f"{spec.format.name!r} with {spec.experts} experts has {smallest:,} even so. The rank () leaves "
            "the size as it is."
        )
    return replace(spec, hidden=hidden)
