"""Parts of the blocks of both models: MLPs, dense or with experts, and stochastic depth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_fraction, as_positive, check_choice
from mumoe_tensor.formats.registry import config_entry, get_format
from mumoe_tensor.nn import MuMoEMLP
from mumoe_tensor.nn.experts import Init
from mumoe_tensor.nn.gate import GateNorm
from mumoe_tensor.nn.registry import GATES
from mumoe_tensor.spec import LayerSpec, expert_counts

#: The format of a model without experts.
DENSE = "mlp"


def dense_block(
    features: int,
    hidden: int,
    *,
    bias: bool = True,
    dropout: float = 0.0,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Two linear layers with GELU between them: the block that `expert_block` replaces.

    The modules are `up`, `activation`, `down` and `dropout`, which applies to the outputs.
    """
    return nn.Sequential(
        OrderedDict(
            up=nn.Linear(features, hidden, bias=bias, device=device),
            activation=nn.GELU(),
            down=nn.Linear(hidden, features, bias=bias, device=device),
            dropout=nn.Dropout(dropout),
        )
    )


def expert_block(
    features: int,
    hidden: int,
    *,
    experts: tuple[int, ...],
    format: str | dict[str, Any],
    rank: tuple[int, ...] | None,
    parameters: int | Literal["match"] = "match",
    bias: bool = True,
    **options: Any,
) -> MuMoEMLP:
    """A block of experts with a given rank, or with the rank closest to a budget of parameters.

    Parameters
    ----------
    experts : tuple of int
        Number of experts at each level.
    rank : tuple of int or None
        None solves for the rank.
    parameters : int or "match", default "match"
        Budget if the rank is None, including the gate and biases, but not the input norm. ``"match"`` is the
        number of parameters of `dense_block`.
    **options
        Further arguments of `.nn.MuMoEMLP`.

    Raises
    ------
    ValueError
        If no rank fits, or the format has no rank to solve for.
    """
    spec = LayerSpec(
        format, experts=experts, in_features=features, hidden=hidden, out_features=features, rank=rank,
        bias=bias,
    )  # fmt: skip
    if rank is None:
        if not spec.format.bonds(spec.num_levels):
            raise ValueError(
                f"a format must have a rank to match the parameters of a dense block; format {format!r} has "
                "none: pass the rank () to use it anyway."
            )
        spec = spec.fitted(parameters, rounding="nearest")
    return MuMoEMLP.from_spec(spec, **options)


class StochasticDepth(nn.Module):
    """Drop the residual branch of a row in training with a given probability (Huang et al., 2016).

    The kept branches are divided by the probability of keeping them, so that the expectation does not change.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Drop or rescale a branch, of shape (rows, ...), before it is added to the residual."""
        if not self.training or not self.probability:
            return branch
        stays = 1 - self.probability
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * torch.empty(shape, device=branch.device, dtype=branch.dtype).bernoulli_(stays) / stays

    def extra_repr(self) -> str:
        return f"{self.probability}"


def drop_probabilities(last: float, depth: int) -> list[float]:
    """Drop probability of each block, increasing linearly from zero to `last`."""
    return [last * block / (depth - 1) for block in range(depth - 1)] + [last]


def check_config(
    config: Any, sizes: Sequence[str], probabilities: Sequence[str], ranks: Sequence[str]
) -> None:
    """Check the common fields of the configs of both models, and convert them to plain data.

    `sizes`, `probabilities` and `ranks` are the names of fields.

    Raises
    ------
    ValueError, TypeError
        If a size is not positive, a probability is not below one, or an option is unknown.
    """
    checked: dict[str, Any] = {name: as_positive(getattr(config, name), name) for name in sizes}
    checked |= {name: as_fraction(getattr(config, name), name) for name in probabilities}
    if not isinstance(config.experts, tuple):
        raise TypeError(f"experts must be a tuple with one number per level, got {config.experts!r}.")
    checked["experts"] = expert_counts(config.experts)
    if not isinstance(config.gate, str):
        raise TypeError(f"gate must be a name, got {config.gate!r}; see register_gate.")
    GATES.read(config.gate)
    checked["gate"] = str(config.gate)
    checked["gate_norm"] = check_choice(config.gate_norm, get_args(GateNorm), "gate_norm")
    checked["init"] = check_choice(config.init, get_args(Init), "init")
    whole = {name: getattr(config, name) for name in ranks if getattr(config, name) is not None}
    checked["format"] = DENSE if config.format == DENSE else config_entry(get_format(config.format))
    if config.format != DENSE:
        format = get_format(config.format)
        for name, rank in whole.items():
            checked[name] = format.full_rank(rank, len(config.experts))
    elif whole:
        raise ValueError(f"a model without experts (format {DENSE!r}) has no rank, got {whole}.")
    for name, value in checked.items():
        object.__setattr__(config, name, value)  # a config is frozen
