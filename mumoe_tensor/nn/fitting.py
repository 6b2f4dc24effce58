"""Fitting experts to given matrices: all to the same matrix, or each to a different one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from opt_einsum import contract
from torch import Tensor

from mumoe_tensor.backend import to_float64
from mumoe_tensor.decomposition import decompose
from mumoe_tensor.dense import expert_matrix, to_dense
from mumoe_tensor.formats.base import Factor, Format
from mumoe_tensor.nn.init import declared, fill_neutral, index_sizes, is_bias, make_zero, of_matrix
from mumoe_tensor.nn.values import copy_weight
from mumoe_tensor.tensors import FactorizedTensor

#: Maximum number of sweeps over the factors of a format fitted by alternating least squares.
SWEEPS = 100


@torch.no_grad()
def fit_every_expert(weight: FactorizedTensor, matrix: Tensor) -> float:
    """Fill the factors in place so that every expert is the given matrix, or its best fit at this rank.

    The terms of a sum are fitted in order, shared terms first, each to the residual of the previous terms. If
    the residual is zero, the last factor of a term is set to zero: the term then adds nothing, but can learn.

    The matrix includes the bias row, if the weight has one. The computation uses NumPy, because not every
    device supports float64. Returns the error of the worst expert in the Frobenius norm, relative to the norm
    of the matrix.
    """
    target = to_float64(matrix)
    if len(weight.terms) == 1:
        return _fit(weight, target)
    norm = float(np.linalg.norm(target)) or 1.0
    terms = [term for term in weight.terms if not is_bias(term)]
    for bias in weight.terms:
        if is_bias(bias):
            _assign(bias, 0, target[-1].reshape(bias.arrays[0].shape), declared(bias)[0].indices)
            target = target[:-1]
    fitted: list[FactorizedTensor] = []

    def rest(expert: Sequence[int]) -> np.ndarray:
        matrices = [expert_matrix(term, expert) for term in fitted]
        return target - sum(matrices, np.zeros_like(target))

    for term in sorted(terms, key=lambda term: "n" not in term.format.omits):
        windows = [term.format.window(level) for level in range(term.num_levels)]
        left = rest([window[0] if window else 0 for window in windows])
        if np.linalg.norm(left) <= 8 * torch.finfo(matrix.dtype).eps * norm:  # zero up to rounding
            make_zero(term)
        else:
            _fit(term, left)
        exact = [None if factor is None else to_float64(factor) for factor in term.factors]
        fitted.append(FactorizedTensor(term.format, exact, term.shape))
    # Experts differ only where a slice starts or stops.
    levels = [
        {0, *(n for term in terms for n in term.format.window(level) or () if n < count)}
        for level, count in enumerate(weight.experts)
    ]
    return max(float(np.linalg.norm(rest(expert))) for expert in product(*levels)) / norm


@torch.no_grad()
def fit_experts(
    weight: FactorizedTensor, stack: Tensor, bias: bool, **options: Any
) -> tuple[float, float | None]:
    """Fill the factors in place so that the weight is a stack of matrices, or the best fit to it.

    The options are those of `decompose`. The stack includes the bias rows, if the weight has a bias. Returns
    the relative error in the Frobenius norm, and with an `input_covariance` that of the outputs, else None.
    """
    # NumPy supports float32, and half precision converts to it without rounding.
    dense = stack.detach().cpu().to(torch.float64 if stack.dtype == torch.float64 else torch.float32)
    fitted, error = decompose(dense, weight.format, weight.rank, bias=bias, **options)
    copy_weight(fitted, weight)
    if options.get("input_covariance") is None:
        return error, None
    rest = to_dense(fitted) - dense
    return float(torch.linalg.vector_norm(rest) / (torch.linalg.vector_norm(dense) or 1)), error


def _fit(term: FactorizedTensor, target: np.ndarray) -> float:
    """Fit every expert of one term; see `fit_every_expert`."""
    return _fit_split(term, target) if term.format.is_split else _fit_whole(term, target)


def _fit_split(term: FactorizedTensor, target: np.ndarray) -> float:
    """Fit a term that splits the input or the output, by `decompose` in its format without experts.

    The fitted factors are used for every expert, and all other factors become neutral. If the factors of one
    expert differ from those that the format declares without experts, the format is `_OfOneExpert`.
    """
    format, sizes, axes = term.format.of_one_expert, index_sizes(term), _axes_of_an_expert(term)
    alone = _declared_alone(format)
    if [len(indices) for indices in alone.values()] != [len(names) for names in axes.values()]:
        format = _OfOneExpert(tuple(map(" ".join, axes.values())), format.splits)
        alone = _declared_alone(format)
    size_of = {
        x: sizes[y]
        for indices, names in zip(alone.values(), axes.values(), strict=True)
        for x, y in zip(indices, names, strict=True)
    }
    rank = [size_of[bond] for bond in format.bonds(0)]
    one, _ = decompose(target, format, rank, n_restarts=1, n_iter=SWEEPS)
    for k, factor in enumerate(term.factors):
        if factor is not None and k not in axes:
            modes = term.format.modes(term.num_levels)
            fill_neutral(factor, [axis for axis, x in enumerate(declared(term)[k].indices) if x not in modes])
    for k, j in zip(axes, alone, strict=True):
        _assign(term, k, np.asarray(one.factors[j]), axes[k])
    # Sums over the bonds of neutral factors add equal matrices; a scale corrects this.
    first, shape = next(iter(axes)), target.shape
    matrix = _expert(term).reshape([prod(sizes[x] for x in term.format.parts(mode)) for mode in "io"])
    matrix = matrix[: shape[0], : shape[1]]
    times = np.vdot(matrix, matrix) and np.vdot(matrix, expert_matrix(one, ())) / np.vdot(matrix, matrix)
    factor = term.factors[first]
    assert factor is not None
    factor.mul_(float(times))
    return float(np.linalg.norm(times * matrix - target) / (np.linalg.norm(target) or 1))


class _OfOneExpert(Format):
    """The network of the factors of a single expert."""

    name = title = "expert"

    def __init__(self, indices: tuple[str, ...], splits: Mapping[str, int | tuple[int, ...]]):
        super().__init__(splits=splits)
        self.indices = indices

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return list(map(Factor, self.indices))


def _declared_alone(format: Format) -> dict[int, tuple[str, ...]]:
    """The indices of the factors of a format without experts, by position."""
    return {k: f.indices for k, f in enumerate(format.declaration(0)) if not f.optional}


def _axes_of_an_expert(term: FactorizedTensor) -> dict[int, list[str]]:
    """The factors of a single expert with their axes, without expert modes and bonds between experts."""
    experts = {x for x in term.format.modes(term.num_levels) if x[0] == "n"}
    modes = set(term.format.modes(term.num_levels))
    cores = [k for k, f in enumerate(declared(term)) if not f.optional and not modes & set(f.indices)]
    held = {k: declared(term)[k].indices for k in sorted((*cores, *of_matrix(term)))}
    counts = Counter(x for indices in held.values() for x in indices)
    return {
        k: [x for x in indices if x not in experts and (x in modes or counts[x] > 1)]
        for k, indices in held.items()
    }


def _fit_whole(term: FactorizedTensor, target: np.ndarray) -> float:
    """Fit a term that does not split the input or the output.

    All factors become neutral except A, the factor of the input, and B, the factor of the output. The matrix
    of an expert is then ``A K B`` with a constant K. The best approximation with the rank of K follows from
    the singular value decompositions of K and of the matrix.
    """
    indices = [f.indices for f in declared(term)]
    bonds = dict(zip(term.format.bonds(term.num_levels), term.rank, strict=True))
    factors: dict[int, Tensor] = {k: x for k, x in enumerate(term.factors) if x is not None}
    a = next(k for k in factors if "i" in indices[k])
    b = a if "o" in indices[a] else next(k for k in factors if "o" in indices[k])
    for k, factor in factors.items():
        if k not in (a, b):
            _pass_on(factor, indices[k], bonds, (indices[a], indices[b]))
    if a == b:
        ones = np.ones([bonds.get(x, 1) for x in indices[a]])
        _assign(term, a, target / _expert(term, {a: ones}), ["i", "o"])
        return 0.0
    axes = {k: [mode, *(x for x in indices[k] if x in bonds)] for k, mode in ((a, "i"), (b, "o"))}
    shapes = {k: [bonds[x] for x in axes[k][1:]] for k in (a, b)}
    identities = {k: np.eye(prod(shape)).reshape(-1, *shape) for k, shape in shapes.items()}
    constant = _expert(term, {k: _with_axes(eye, axes[k], indices[k]) for k, eye in identities.items()})
    p, d, q = np.linalg.svd(constant, full_matrices=False)
    u, s, v = np.linalg.svd(target, full_matrices=False)
    rank = min(int((d > 1e-9 * d[0]).sum()), len(s))
    scale = np.sqrt(s[:rank] / d[:rank])
    _assign(term, a, ((u[:, :rank] * scale) @ p[:, :rank].T).reshape(-1, *shapes[a]), axes[a])
    _assign(term, b, ((v[:rank].T * scale) @ q[:rank]).reshape(-1, *shapes[b]), axes[b])
    total = np.linalg.norm(s)
    return float(np.linalg.norm(s[rank:]) / total) if total else 0.0


def _pass_on(
    factor: Tensor, indices: Sequence[str], bonds: Collection[str], ends: tuple[Sequence[str], Sequence[str]]
) -> None:
    """Make a factor neutral; a core passes a bond of the input on to a bond of the output."""
    axes = [k for k, x in enumerate(indices) if x in bonds]
    if len(axes) < len(indices):
        fill_neutral(factor, axes)
        return
    shared = [next((k for k in axes if indices[k] in end), None) for end in ends]
    passed = list(dict.fromkeys(k for k in shared if k is not None))
    fill_neutral(factor, passed)
    factor.div_(prod(n for k, n in enumerate(factor.shape) if k not in passed))


def _assign(term: FactorizedTensor, k: int, value: np.ndarray, axes: Sequence[str]) -> None:
    """Copy an array with named axes to a factor, broadcast along the other axes."""
    factor = term.factors[k]
    assert factor is not None
    dtype = np.float64 if factor.dtype == torch.float64 else np.float32
    value = np.ascontiguousarray(_with_axes(value, axes, declared(term)[k].indices), dtype)
    factor.copy_(torch.from_numpy(value).expand_as(factor))


def _with_axes(value: np.ndarray, axes: Sequence[str], indices: Sequence[str]) -> np.ndarray:
    """Permute an array with named axes to these indices, with size one for missing axes."""
    value = value.transpose([axes.index(x) for x in indices if x in axes])
    return np.expand_dims(value, [k for k, x in enumerate(indices) if x not in axes])


def _expert(term: FactorizedTensor, replaced: Mapping[int, np.ndarray] | None = None) -> np.ndarray:
    """The matrix of any expert, with the parts of its modes as axes. All experts must have the same matrix.

    `replaced` contains other values for some factors. The remaining factors must then be neutral, with equal
    entries along all modes.
    """
    format, operands = term.format, []
    matrix = (*format.parts("i"), *format.parts("o"))
    modes = format.modes(term.num_levels)
    for k, (f, factor) in enumerate(zip(declared(term), term.factors, strict=True)):
        if factor is None:
            continue
        value = to_float64(factor) if replaced is None or k not in replaced else replaced[k]
        has_matrix = replaced is None or k in replaced
        left = [x for x in f.indices if x not in modes or (x in matrix and has_matrix)]
        operands += [value[tuple(slice(None) if x in left else 0 for x in f.indices)], left]
    result: np.ndarray = contract(*operands, matrix)
    return result
