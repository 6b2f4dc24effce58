"""How factors are drawn: every expert near one and the same linear layer."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mumoe_tensor.formats.base import mode_names
from mumoe_tensor.multilinear import mixed_matrix
from mumoe_tensor.tensors import FactorizedTensor


@torch.no_grad()
def draw(weight: FactorizedTensor, in_features: int) -> None:
    """Fill the factors of a weight in place with the published initialisation, for any format and levels.

    Parameters
    ----------
    weight : FactorizedTensor of torch tensors
    in_features : int
        Without the bias row.

    References
    ----------
    Oldfield et al., "Multilinear Mixture of Experts", NeurIPS 2024.
    """
    modes = mode_names(weight.levels)
    for declared, factor in zip(weight.format.declaration(weight.levels), weight.factors, strict=True):
        if factor is None:
            continue
        held = [x for x in declared.indices if x in modes]
        bonds = [n for x, n in zip(declared.indices, factor.shape, strict=True) if x not in modes]
        if "i" in held:
            factor.uniform_(-(in_features**-0.5), in_features**-0.5)
        elif "o" in held and not any(x.startswith("n") for x in held):
            factor.uniform_(-(prod(bonds) ** -0.5), prod(bonds) ** -0.5)
        elif held:
            fill_neutral(factor, [k for k, x in enumerate(declared.indices) if x not in modes])
            if "n1" in held:
                factor.mul_(1 + torch.randn_like(factor))
        else:
            factor.normal_()
            factor.div_(torch.linalg.vector_norm(factor))


@torch.no_grad()
def fill_neutral(factor: Tensor, bonds: list[int]) -> None:
    """Let a factor of expert modes pass on what its bonds bring: the identity between two, or ones."""
    if len(bonds) != 2:
        factor.fill_(1)
        return
    shape = [n if k in bonds else 1 for k, n in enumerate(factor.shape)]
    rows, columns = (factor.shape[k] for k in bonds)
    eye = torch.eye(rows, columns, device=factor.device, dtype=factor.dtype)
    factor.copy_(eye.reshape(shape).expand_as(factor))


@torch.no_grad()
def scale_to_linear(weight: FactorizedTensor, in_features: int) -> None:
    """Scale the factor of the input so that the mean expert has the variance of a `torch.nn.Linear`'s weight.

    Its entries have variance 1 / (3 I). With coefficients 1 / N, which is how a gate starts, outputs then
    have the variance of those of `torch.nn.Linear`.
    """
    like = weight.arrays[0]
    uniform = [torch.full((n,), 1 / n, device=like.device, dtype=like.dtype) for n in weight.experts]
    variance = mixed_matrix(weight, uniform).square().mean()
    for declared, factor in zip(weight.format.declaration(weight.levels), weight.factors, strict=True):
        if "i" in declared.indices:
            factor.mul_((3 * in_features * variance).rsqrt())
