"""What both models have in every block: an MLP, dense or of experts, and branches that may be dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_positive, as_probability, check_choice
from mumoe_tensor.formats.registry import config_entry, get_format
from mumoe_tensor.nn import MuMoEMLP
from mumoe_tensor.nn.experts import Init
from mumoe_tensor.nn.gate import GateNorm
from mumoe_tensor.nn.registry import GATES
from mumoe_tensor.spec import LayerSpec

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
    """Two linear layers with GELU between them: the block that one of experts takes the place of.

    Parameters
    ----------
    features, hidden : int
    bias : bool, default True
    dropout : float, default 0
        Probability of dropping an output while training.
    device : torch.device or str, optional

    Returns
    -------
    Sequential
        Of up, activation, down and dropout.
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
    format: str,
    rank: tuple[int, ...] | None,
    parameters: int | Literal["match"] = "match",
    **options: Any,
) -> MuMoEMLP:
    """The block of experts at a rank, or with the parameters that come nearest to a number of them.

    Parameters
    ----------
    features, hidden : int
    experts : tuple of int
        One number a level.
    format : str
    rank : tuple of int or None
        None: the rank is solved for.
    parameters : int or "match", default "match"
        What the solved rank comes nearest to, gate and biases counted, but not the norm of the input;
        ``"match"`` for those of `dense_block` with biases.
    **options
        Further arguments of `.nn.MuMoEMLP`.

    Returns
    -------
    MuMoEMLP

    Raises
    ------
    ValueError
        If no rank fits, or the format has none to solve for.
    """
    if rank is None:
        if not get_format(format).bonds(len(experts)):
            raise ValueError(
                f"a block has the parameters of a dense one by its rank, and format {format!r} has none: the "
                "rank () takes it as it is."
            )
        block = LayerSpec(
            format, experts=experts, in_features=features, hidden=hidden, out_features=features, bias=True
        )
        rank = block.fitted(parameters, rounding="nearest").full_rank
    return MuMoEMLP(features, hidden, features, experts, format, rank or None, **options)


class StochasticDepth(nn.Module):
    """Drop a whole residual branch of a row, at random in training.

    What is kept is divided by the probability of keeping it, so that the mean over chance is the branch
    (Huang et al., 2016).

    Parameters
    ----------
    probability : float
        Of dropping.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """What of a branch is added to its residual.

        Parameters
        ----------
        branch : Tensor of shape (rows, ...)

        Returns
        -------
        Tensor of the same shape
        """
        if not self.training or not self.probability:
            return branch
        kept = 1 - self.probability
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * torch.empty(shape, device=branch.device, dtype=branch.dtype).bernoulli_(kept) / kept

    def extra_repr(self) -> str:
        return f"{self.probability}"


def drop_probabilities(last: float, depth: int) -> list[float]:
    """Probabilities of dropping the branches of each block: from zero linearly up to that of the last one.

    Parameters
    ----------
    last : float
    depth : int

    Returns
    -------
    list of float
    """
    return [last * block / (depth - 1) for block in range(depth - 1)] + [last]


def check_config(
    config: Any, sizes: Sequence[str], probabilities: Sequence[str], ranks: Sequence[str]
) -> None:
    """Check what the configs of both models have in common, and make it plain data.

    Parameters
    ----------
    config : MixerConfig or GPT2Config
    sizes, probabilities, ranks : sequence of str
        Names of its fields.

    Raises
    ------
    ValueError, TypeError
        If a size is not positive, a probability not below one, or there are no such experts.
    """
    checked: dict[str, Any] = {name: as_positive(getattr(config, name), name) for name in sizes}
    checked |= {name: as_probability(getattr(config, name), name) for name in probabilities}
    if not isinstance(config.experts, tuple):
        raise TypeError(f"experts must be a tuple with one number a level, got {config.experts!r}.")
    checked["experts"] = tuple(as_positive(number, "every number of experts") for number in config.experts)
    if not isinstance(config.gate, str):
        raise TypeError(f"gate must be a name, got {config.gate!r}; see register_gate.")
    GATES.read(config.gate)
    checked["gate"] = str(config.gate)
    checked["gate_norm"] = check_choice(config.gate_norm, get_args(GateNorm), "gate_norm")
    checked["init"] = check_choice(config.init, get_args(Init), "init")
    given = {name: getattr(config, name) for name in ranks if getattr(config, name) is not None}
    checked["format"] = DENSE if config.format == DENSE else config_entry(get_format(config.format))
    if config.format != DENSE:
        format = get_format(config.format)
        for name, rank in given.items():
            checked[name] = format.full_rank(rank, len(config.experts))
    elif given:
        raise ValueError(f"a model without experts (format {DENSE!r}) has no rank, got {given}.")
    for name, value in checked.items():
        object.__setattr__(config, name, value)  # (a config is frozen)
