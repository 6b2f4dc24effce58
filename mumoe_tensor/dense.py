"""Dense arrays of a weight: the whole tensor, the matrix of an expert, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, Operations, backend_of, context_of, operations_of
from mumoe_tensor.checks import check_flag
from mumoe_tensor.contraction.execute import execute, read
from mumoe_tensor.contraction.layout import Compiler, Program
from mumoe_tensor.contraction.network import Indices, Network, Reading, vector_of, weight_network
from mumoe_tensor.contraction.order import Orders
from mumoe_tensor.formats.base import mode_names
from mumoe_tensor.selections import Index, read_index
from mumoe_tensor.tensors import FactorizedTensor, as_factorized


def to_dense(weight: Any) -> Array:
    """Form the weight tensor, of shape (N1, ..., NE, I, O). I includes the bias row, if any."""
    weight = as_factorized(weight)
    return _added(weight, [None] * weight.num_levels)


def expert_matrix(weight: Any, index: Index, *, bias: bool = False) -> Any:
    """The matrix of one expert, and its bias.

    Parameters
    ----------
    weight : FactorizedTensor, container of TensorLy, or array
    index : int or sequence of int
        The expert, one index per level.
    bias : bool, default False
        Whether the last row of the input mode is the bias. If False, that row stays in the matrix.

    Returns
    -------
    array of shape (I, O)
        The transpose of a `torch.nn.Linear.weight`: the output of the expert is ``z @ matrix``.
    array of shape (O,)
        Only with `bias`.
    """
    weight = as_factorized(weight)
    check_bias(weight, bias)
    matrix = _added(weight, read_index(index, weight.experts))
    if not bias:
        return matrix
    operations = operations_of(matrix)
    return operations.narrow(matrix, 0, 0, matrix.shape[0] - 1), operations.select(matrix, 0, -1)


def check_bias(weight: FactorizedTensor, bias: bool) -> None:
    """Check that the weight can have a bias if `bias` is True."""
    check_flag(bias, "bias")
    format = weight.format
    if bias and format.splits_input and not format.has_bias_term:
        raise ValueError(
            "the bias of a weight that splits the input must be a term, as in sum_of('btt', Bias()), got "
            f"bias=True for format {format!r}."
        )


def mixed_matrix(weight: FactorizedTensor, coefficients: Sequence[Array]) -> Array:
    """The mixture of all experts, of shape (I, O), by one vector of coefficients per level."""
    return _added(weight, coefficients)


def _added(weight: FactorizedTensor, experts: Sequence[Any]) -> Array:
    """The sum of the terms; per level, `experts` is None (all), an int (one) or coefficients (a mixture)."""
    operations = operations_of(weight.arrays[0])
    total: Array = None
    for term in weight.terms:
        tensor = _formed(term, experts, operations)
        if weight.format.has_bias_term:
            # The bias is the last row; the other terms do not have it.
            others = weight.shape[-2] - 1
            row = (others, 0) if "i" in term.format.omits else (0, 1)
            tensor = operations.pad(tensor, tensor.ndim - 2, *row)
        total = tensor if total is None else total + tensor
    return total


def _formed(term: FactorizedTensor, experts: Sequence[Any], operations: Operations) -> Array:
    """One term of a weight, of shape (experts that are None..., I, O)."""
    format, names = term.format, mode_names(term.num_levels)
    network = _weight_network(format, term.shape, term.rank, term.missing)
    sizes = dict(network.index_sizes)
    levels = [level for level in range(len(names)) if level >= len(experts) or experts[level] is None]
    shape = tuple(term.shape[level] for level in levels)

    # 1. One expert selects an entry of each index of its mode; a mixture is a vector over these indices.
    entries: dict[str, int] = {}
    vectors: list[tuple[Indices, Array]] = []
    for level, expert in enumerate(experts):
        if expert is None:
            continue
        axes, reading = vector_of(format, network, names[level], level, term.shape) or ((), Reading())
        parts = [sizes[x] for x in axes]
        if not isinstance(expert, int):
            vectors.append((axes, read(expert, reading, operations).reshape(parts)))
        elif axes:
            start, stop = format.window(level) or (0, term.shape[level])
            if not start <= expert < stop:
                tl = backend_of(term.arrays[0])
                return tl.zeros(shape, **context_of(term.arrays[0], tl))
            entries.update(zip(axes, map(int, np.unravel_index(expert - start, parts)), strict=True))

    # 2. The contraction.
    arrays = list(term.arrays)
    for k, operand in enumerate(network.operands):
        for axis in reversed(range(len(operand))):
            if operand[axis] in entries:
                arrays[k] = operations.select(arrays[k], axis, entries[operand[axis]])
    program = _mixing(network, frozenset(entries), tuple(axes for axes, _ in vectors))
    tensor = execute(program, [*arrays, *(vector for _, vector in vectors)])
    if format.is_plain:
        return tensor

    # 3. Join the parts of each mode, cut off its padding, and set the experts of other slices to zero.
    present = [[x for x in format.parts(names[level]) if x in network.output] for level in levels]
    tensor = tensor.reshape([prod(sizes[x] for x in parts) for parts in present])
    for axis, (level, size) in enumerate(zip(levels, shape, strict=True)):
        start, stop = format.window(level) or (0, size)
        if tensor.shape[axis] > stop - start:
            tensor = operations.narrow(tensor, axis, 0, stop - start)
        if stop - start < size:
            tensor = operations.pad(tensor, axis, start, size - stop)
    # 4. The term is constant along modes that it omits. (An array expanded by NumPy is read-only.)
    return tensor if tuple(tensor.shape) == shape else operations.expand(tensor, shape)


_weight_network = lru_cache(maxsize=1024)(weight_network)


@lru_cache(maxsize=1024)
def _mixing(network: Network, entries: frozenset[str], vectors: tuple[Indices, ...]) -> Program:
    """The program with the fewest FLOPs for a weight with selected entries and vectors on its modes."""
    gone = entries.union(*vectors)
    output = tuple(x for x in network.output if x not in gone)
    mixed = network.without(set(entries)).with_vectors([(axes, Reading()) for axes in vectors], output)
    best = Orders(mixed, 1).best("flops")
    assert best is not None
    return Compiler(mixed, 1)(best[0])
