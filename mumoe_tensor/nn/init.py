"""Initialisation of factors: every expert starts close to the same randomly initialised linear layer."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from mumoe_tensor.dense import mixed_matrix
from mumoe_tensor.formats.base import Factor
from mumoe_tensor.tensors import FactorizedTensor


@torch.no_grad()
def draw(weight: FactorizedTensor, in_features: int) -> None:
    """Fill the factors of a weight in place with the published initialisation, for any format and levels.

    `in_features` does not include the bias row. If the input is split, `_summed` replaces I and the bonds.
    (Oldfield et al., "Multilinear Mixture of Experts", NeurIPS 2024.)
    """
    for term in weight.terms:
        if is_bias(term):
            term.arrays[0].uniform_(-(in_features**-0.5), in_features**-0.5)
            continue
        sizes = index_sizes(term)
        if "i" in sizes:
            sizes["i"] = in_features
        matrix_factors = of_matrix(term)
        experts, modes = term.format.parts("n1"), term.format.modes(term.num_levels)
        for k, factor in enumerate(term.factors):
            indices = declared(term)[k].indices
            if factor is None:
                continue
            if k in matrix_factors:
                bound = prod(sizes[x] for x in _summed(term, k)) ** -0.5
                factor.uniform_(-bound, bound)
            elif any(x in modes for x in indices):
                fill_neutral(factor, [axis for axis, x in enumerate(indices) if x not in modes])
                if any(x in experts for x in indices):
                    factor.mul_(1 + torch.randn_like(factor))
            else:
                factor.normal_()
                factor.div_(torch.linalg.vector_norm(factor))


def _summed(term: FactorizedTensor, k: int) -> Collection[str]:
    """The indices that a factor of the matrix sums over.

    A factor of the output sums over its bonds. A factor of the input sums over its parts of the input and its
    bonds with earlier factors, unless a later factor also has them.
    """
    inputs, modes = term.format.parts("i"), term.format.modes(term.num_levels)
    indices = {j: declared(term)[j].indices for j in of_matrix(term)}
    if not set(indices[k]) & set(inputs):
        return [x for x in indices[k] if x not in modes]
    earlier = {x for j, each in indices.items() if j < k and set(each) & set(inputs) for x in each}
    later = {x for j, each in indices.items() if j > k for x in each}
    return [x for x in indices[k] if x not in later and (x in inputs or (x in earlier and x not in modes))]


@torch.no_grad()
def scale_to_linear(weight: FactorizedTensor, in_features: int) -> None:
    """Scale the factors of the input so that the mean expert has the variance of a linear layer's weight.

    The entries of the mean expert have variance 1 / (3 I), to which the terms of a sum contribute equally.
    With coefficients 1 / N, as a gate initially returns, the outputs then have the same variance as the
    outputs of `torch.nn.Linear`. If the input is split, the factors of all its parts are scaled equally.
    """
    like = weight.arrays[0]
    uniform = [torch.full((n,), 1 / n, device=like.device, dtype=like.dtype) for n in weight.experts]
    terms = [term for term in weight.terms if not is_bias(term)]
    for term in terms:
        variance = mixed_matrix(term, uniform).square().mean()
        inputs = set(term.format.parts("i"))
        scaled = [term.factors[k] for k in of_matrix(term) if inputs & set(declared(term)[k].indices)]
        for factor in scaled:
            assert factor is not None
            factor.mul_((3 * in_features * len(terms) * variance).rsqrt() ** (1 / len(scaled)))


@torch.no_grad()
def make_zero(weight: FactorizedTensor) -> None:
    """Set a weight to zero through the last factor of each term (the factor of the output in most formats).

    The other factors keep their values, so that gradients flow to the last factor; they receive gradients
    themselves once it is nonzero.
    """
    for term in weight.terms:
        term.arrays[-1].zero_()


def of_matrix(term: FactorizedTensor) -> list[int]:
    """Positions of the factors that form the matrix of an expert: the factors with the input or the output.

    A factor that also has expert modes is included only if no factor without expert modes has these modes.
    Otherwise it scales the matrix, as in Hadamard and Monarch, and starts neutral.
    """
    matrix = {*term.format.parts("i"), *term.format.parts("o")}
    experts = set(term.format.modes(term.num_levels)) - matrix
    indices = [set(f.indices) for f in declared(term)]
    without = {x for each in indices if not each & experts for x in each}
    return [
        k
        for k, each in enumerate(indices)
        if each & matrix and (not each & experts or each & matrix - without)
    ]


def declared(term: FactorizedTensor) -> tuple[Factor, ...]:
    """The declaration of the factors of a term."""
    return term.format.declaration(term.num_levels)


def index_sizes(term: FactorizedTensor) -> dict[str, int]:
    """The size of every index of a term."""
    return {
        x: n
        for f, factor in zip(declared(term), term.factors, strict=True)
        if factor is not None
        for x, n in zip(f.indices, factor.shape, strict=True)
    }


def is_bias(term: FactorizedTensor) -> bool:
    """Whether a term of a sum is a bias, which has no input mode."""
    return "i" in term.format.omits


def fill_neutral(factor: Tensor, bonds: list[int]) -> None:
    """Make a factor neutral: the identity between two bonds, otherwise ones."""
    if len(bonds) != 2:
        factor.fill_(1)
        return
    shape = [n if k in bonds else 1 for k, n in enumerate(factor.shape)]
    rows, columns = (factor.shape[k] for k in bonds)
    eye = torch.eye(rows, columns, device=factor.device, dtype=factor.dtype)
    factor.copy_(eye.reshape(shape).expand_as(factor))
