"""How factors are drawn: every expert near one and the same linear layer."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.backend import to_float64
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


@torch.no_grad()
def fit_every_expert(weight: FactorizedTensor, matrix: Tensor) -> float:
    """Fill the factors in place so that every expert is one matrix, or what is closest to it at this rank.

    Expert modes and cores become neutral, which leaves the product ``A K B`` of the factor of the input, a
    constant matrix K and the factor of the output. With the singular value decompositions of K and of the
    matrix it is the best approximation of the rank of K.

    Parameters
    ----------
    weight : FactorizedTensor of torch tensors
    matrix : Tensor of shape (I, O)
        With the bias row, if the weight has one.

    Returns
    -------
    float
        Error in the Frobenius norm over the norm of the matrix.
    """
    modes = mode_names(weight.levels)
    held = [
        (f.indices, factor)
        for f, factor in zip(weight.format.declaration(weight.levels), weight.factors, strict=True)
        if factor is not None
    ]
    inner, a = next((x, factor) for x, factor in held if "i" in x)
    outer, b = (inner, a) if "o" in inner else next((x, factor) for x, factor in held if "o" in x)
    inner_bonds, outer_bonds = ([x for x in indices if x not in modes] for indices in (inner, outer))
    others = [(x, factor) for x, factor in held if factor is not a and factor is not b]
    for indices, factor in others:
        bonds = [k for k, x in enumerate(indices) if x not in modes]
        if len(bonds) == len(indices):
            # A core: the identity between a bond of the input and one of the output.
            ends = [next((k for k in bonds if indices[k] in side), None) for side in (inner, outer)]
            bonds = [k for k in ends if k is not None]
            fill_neutral(factor, list(dict.fromkeys(bonds)))
            factor.div_(prod(n for k, n in enumerate(factor.shape) if k not in bonds))
        else:
            fill_neutral(factor, bonds)
    if a is b:
        shape = [n if x in ("i", "o") else 1 for x, n in zip(inner, a.shape, strict=True)]
        turned = matrix if inner.index("i") < inner.index("o") else matrix.T
        a.copy_(turned.reshape(shape).expand_as(a))
        return 0.0
    # K by einsum: a bond that both factors have gets a second name through an identity. By NumPy, because not
    # every device has float64.
    number = {x: k for k, x in enumerate(dict.fromkeys(x for indices, _ in held for x in indices))}
    operands: list[Any] = []
    for indices, factor in others:
        averaged = tuple(k for k, x in enumerate(indices) if x in modes)
        operands += [to_float64(factor).mean(averaged), [number[x] for x in indices if x not in modes]]
    second = dict(number)
    for x in set(inner_bonds) & set(outer_bonds):
        second[x] = len(number) + number[x]
        size = a.shape[inner.index(x)]
        operands += [np.eye(size), [number[x], second[x]]]
    result = [number[x] for x in inner_bonds] + [second[x] for x in outer_bonds]
    rows = prod(a.shape[inner.index(x)] for x in inner_bonds)
    constant = np.einsum(*operands, result, optimize="greedy").reshape(rows, -1)
    p, d, q = np.linalg.svd(constant, full_matrices=False)
    u, s, v = np.linalg.svd(to_float64(matrix), full_matrices=False)
    rank = min(int((d > 1e-9 * d[0]).sum()), len(s))
    scale = np.sqrt(s[:rank] / d[:rank])
    for mode, factor, indices, left, right in (
        ("i", a, inner, u[:, :rank], p[:, :rank].T),
        ("o", b, outer, v[:rank].T, q[:rank]),
    ):
        axes = [mode, *(x for x in indices if x not in modes)]
        size = dict(zip(indices, factor.shape, strict=True))
        value = ((left * scale) @ right).reshape([size[x] for x in axes])
        value = value.transpose([axes.index(x) for x in indices if x in axes])
        value = value.reshape([n if x in axes else 1 for x, n in size.items()])
        value = value.astype(np.float64 if factor.dtype == torch.float64 else np.float32)
        factor.copy_(torch.from_numpy(value).expand_as(factor))
    total = np.linalg.norm(s)
    return float(np.linalg.norm(s[rank:]) / total) if total else 0.0
