"""A penalty on active experts, for training gates with thresholds."""

from __future__ import annotations

from functools import reduce

import torch
from opt_einsum import contract
from torch import Tensor, nn

from mumoe_tensor.dense import to_dense
from mumoe_tensor.nn.layers import MuMoE
from mumoe_tensor.tensors import FactorizedTensor


class Penalized(nn.Module):
    """Returns a layer's outputs and its penalty, the mean over rows of ``sum_n tanh(|a_n| |W_n|)``.

    The penalty is a differentiable approximation of the number of active experts. ``|W_n|`` is the Frobenius
    norm of the expert's matrix.

    Parameters
    ----------
    layer : Module
        A layer with an attribute `mixture`, a `.MuMoE` with experts, that accepts `return_coefficients`.

    Raises
    ------
    ValueError
        If the layer has no experts.

    References
    ----------
    Anthropic, "Sparse Mixtures of Linear Transforms", Transformer Circuits Thread, 2025.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        mixture = getattr(layer, "mixture", None)
        if not isinstance(mixture, MuMoE) or not mixture.gate.num_experts:
            raise ValueError(
                "a penalty needs a layer with experts, such as a Transcoder or a MixtureOfTransforms; "
                f"{type(layer).__name__} has none."
            )
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, levels = self.layer(x, return_coefficients=True)
        coefficients = reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), levels)
        mixture: MuMoE = self.layer.mixture  # type: ignore[assignment]
        norms = expert_norms(mixture.weight).flatten()
        return y, (coefficients.abs() * norms).tanh().sum(-1).mean()


def expert_norms(weight: FactorizedTensor) -> Tensor:
    """Frobenius norms of all experts, of shape (N1, ..., NE). The derivative at a norm of zero is zero."""
    terms, counts = weight.terms, torch.zeros(weight.experts, device="cpu")
    for term in terms:
        _window(counts, term).add_(1)
    if counts.max() > 1 or any(term.format.splits for term in terms):
        # The summed matrices of an expert are not orthogonal, and split modes may be padded.
        squares = to_dense(weight).square().sum((-2, -1))
    else:
        squares = weight.arrays[0].new_zeros(weight.experts)
        for term in terms:
            _window(squares, term).add_(_squares(term))
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _window(of_experts: Tensor, term: FactorizedTensor) -> Tensor:
    """The entries of the experts that a term covers."""
    for level in range(term.num_levels):
        start, stop = term.format.window(level) or (0, of_experts.shape[level])
        of_experts = of_experts.narrow(level, start, stop - start)
    return of_experts


def _squares(term: FactorizedTensor) -> Tensor:
    """The squared norms of the experts of a term, contracted without forming the matrices."""
    format, levels = term.format, term.num_levels
    bonds = format.bonds(levels)
    operands: list[object] = []
    for factor, array in zip(format.declaration(levels), term.factors, strict=True):
        if array is not None:
            operands += [array, factor.indices, array, [f"{x}'" if x in bonds else x for x in factor.indices]]
    present = {x for axes in operands[1::2] for x in axes}  # type: ignore[attr-defined]
    squares: Tensor = contract(*operands, [x for x in format.modes(levels)[:-2] if x in present])
    return squares
