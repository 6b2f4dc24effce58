"""What both models have in every block: an MLP, dense or of experts, and branches that may be dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mumoe_tensor.budget import fit_rank
from mumoe_tensor.formats.base import as_positive, check_choice, get_format
from mumoe_tensor.nn import MuMoEMLP
from mumoe_tensor.nn.gate import GATES

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
        solved = fit_rank(
            format, experts=experts, in_features=features, out_features=features, hidden=hidden,
            parameters=parameters, bias=True, gate=True, rounding="nearest",
        )  # fmt: skip
        rank = (solved,) if isinstance(solved, int) else solved
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
    sizes: dict[str, int],
    probabilities: dict[str, float],
    format: str,
    experts: Iterable[int],
    ranks: dict[str, tuple[int, ...] | None],
    gate: str,
) -> None:
    """Check what the configs of both models have in common.

    Raises
    ------
    ValueError, TypeError
        If a size is not positive, a probability not below one, or the experts cannot be of the format.
    """
    for name, size in sizes.items():
        as_positive(size, name)
    for name, probability in probabilities.items():
        if not 0 <= probability < 1:
            raise ValueError(f"{name} must be a probability below one, got {probability!r}.")
    levels = [as_positive(n, "every number of experts") for n in experts]
    check_choice(gate, GATES, "gate")
    for name, rank in ranks.items():
        if format == DENSE and rank is not None:
            raise ValueError(f"a model without experts (format {DENSE!r}) has no {name}, got {rank!r}.")
        if format != DENSE and rank is not None:
            get_format(format).full_rank(rank, len(levels))
    if format != DENSE:
        get_format(format)
