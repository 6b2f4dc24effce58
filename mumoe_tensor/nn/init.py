"""First values of factors: every expert near, or equal to, one linear layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.backend import to_float64
from mumoe_tensor.dense import mixed_matrix, to_dense
from mumoe_tensor.formats.base import mode_names
from mumoe_tensor.tensors import FactorizedTensor


@torch.no_grad()
def draw(weight: FactorizedTensor, in_features: int) -> None:
    """Fill the factors of a weight in place with the published initialisation, for any format and levels.

    The bias row is not one of the input features. (Oldfield et al., "Multilinear Mixture of Experts", NeurIPS
    2024.)
    """
    modes = mode_names(weight.num_levels)
    for declared, factor in zip(weight.format.declaration(weight.num_levels), weight.factors, strict=True):
        if factor is None:
            continue
        factor_modes = [x for x in declared.indices if x in modes]
        bonds = [k for k, x in enumerate(declared.indices) if x not in modes]
        if "i" in factor_modes:
            factor.uniform_(-(in_features**-0.5), in_features**-0.5)
        elif factor_modes == ["o"]:
            bound = prod(factor.shape[k] for k in bonds) ** -0.5
            factor.uniform_(-bound, bound)
        elif factor_modes:
            fill_neutral(factor, bonds)
            if "n1" in factor_modes:
                factor.mul_(1 + torch.randn_like(factor))
        else:
            factor.normal_()
            factor.div_(torch.linalg.vector_norm(factor))


def fill_neutral(factor: Tensor, bonds: list[int]) -> None:
    """Make a factor of expert modes neutral: the identity between two bonds, or ones."""
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
    for declared, factor in zip(weight.format.declaration(weight.num_levels), weight.factors, strict=True):
        if factor is not None and "i" in declared.indices:
            factor.mul_((3 * in_features * variance).rsqrt())


@torch.no_grad()
def fit_every_expert(weight: FactorizedTensor, matrix: Tensor) -> float:
    """Fill the factors in place so that every expert is one matrix, or the best fit to it at this rank.

    All factors but A, that of the input, and B, that of the output, become neutral. The matrix of an expert
    is then ``A K B`` with a constant K, and the singular value decompositions of K and of the matrix give the
    best approximation of the rank of K. All is done in NumPy, because not every device has float64.

    The matrix has the bias row, if the weight has one. Returns the error in the Frobenius norm over the norm
    of the matrix.
    """
    indices = [f.indices for f in weight.format.declaration(weight.num_levels)]
    bonds = dict(zip(weight.format.bonds(weight.num_levels), weight.rank, strict=True))
    factors: dict[int, Tensor] = {k: x for k, x in enumerate(weight.factors) if x is not None}
    a = next(k for k in factors if "i" in indices[k])
    b = a if "o" in indices[a] else next(k for k in factors if "o" in indices[k])
    for k, factor in factors.items():
        if k not in (a, b):
            _pass_on(factor, indices[k], bonds, (indices[a], indices[b]))

    def assign(k: int, value: np.ndarray, axes: Sequence[str]) -> None:
        dtype = np.float64 if factors[k].dtype == torch.float64 else np.float32
        value = _with_axes(value, axes, indices[k]).astype(dtype)
        factors[k].copy_(torch.from_numpy(value).expand_as(factors[k]))

    if a == b:
        ones = np.ones([bonds.get(x, 1) for x in indices[a]])
        assign(a, to_float64(matrix) / _expert(weight, {a: ones}), ["i", "o"])
        return 0.0
    axes = {k: [mode, *(x for x in indices[k] if x in bonds)] for k, mode in ((a, "i"), (b, "o"))}
    shapes = {k: [bonds[x] for x in axes[k][1:]] for k in (a, b)}
    identities = {k: np.eye(prod(shape)).reshape(-1, *shape) for k, shape in shapes.items()}
    constant = _expert(weight, {k: _with_axes(eye, axes[k], indices[k]) for k, eye in identities.items()})
    p, d, q = np.linalg.svd(constant, full_matrices=False)
    u, s, v = np.linalg.svd(to_float64(matrix), full_matrices=False)
    rank = min(int((d > 1e-9 * d[0]).sum()), len(s))
    scale = np.sqrt(s[:rank] / d[:rank])
    assign(a, ((u[:, :rank] * scale) @ p[:, :rank].T).reshape(-1, *shapes[a]), axes[a])
    assign(b, ((v[:rank].T * scale) @ q[:rank]).reshape(-1, *shapes[b]), axes[b])
    total = np.linalg.norm(s)
    return float(np.linalg.norm(s[rank:]) / total) if total else 0.0


def _pass_on(
    factor: Tensor, indices: Sequence[str], bonds: Collection[str], ends: tuple[Sequence[str], Sequence[str]]
) -> None:
    """Make a factor neutral: one without modes, a core, between a bond of the input and one of the output."""
    axes = [k for k, x in enumerate(indices) if x in bonds]
    if len(axes) < len(indices):
        fill_neutral(factor, axes)
        return
    shared = [next((k for k in axes if indices[k] in end), None) for end in ends]
    passed = list(dict.fromkeys(k for k in shared if k is not None))
    fill_neutral(factor, passed)
    factor.div_(prod(n for k, n in enumerate(factor.shape) if k not in passed))


def _with_axes(value: np.ndarray, axes: Sequence[str], indices: Sequence[str]) -> np.ndarray:
    """An array with named axes as a factor with these indices, of size one where it has no such axis."""
    value = value.transpose([axes.index(x) for x in indices if x in axes])
    return np.expand_dims(value, [k for k, x in enumerate(indices) if x not in axes])


def _expert(weight: FactorizedTensor, replaced: dict[int, np.ndarray]) -> np.ndarray:
    """The matrix of any expert, with other factors for some of the weight's; all others are neutral."""
    declared, modes = weight.format.declaration(weight.num_levels), mode_names(weight.num_levels)
    sizes = dict.fromkeys(modes, 1)
    for k, value in replaced.items():
        sizes |= {x: n for x, n in zip(declared[k].indices, value.shape, strict=True) if n > 1}
    factors = [replaced.get(k) for k in range(len(declared))]
    for k, (f, factor) in enumerate(zip(declared, weight.factors, strict=True)):
        if factor is not None and k not in replaced:
            mode_axes = tuple(axis for axis, x in enumerate(f.indices) if x in modes)
            value = to_float64(factor).mean(mode_axes, keepdims=True)
            shape = [sizes.get(x, n) for x, n in zip(f.indices, value.shape, strict=True)]
            factors[k] = np.broadcast_to(value, shape)
    matrix: np.ndarray = to_dense(FactorizedTensor(weight.format, factors))
    return matrix.reshape(sizes["i"], sizes["o"])
