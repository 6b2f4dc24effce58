"""What a weight stands for: the whole tensor, the matrix of an expert, or a mixture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Form the weight tensor, of shape (N1, ..., NE, I, O). I counts the bias row, if there is one."""
    weight = as_factorized(weight)
    return _added(weight, [None] * weight.num_levels)


def expert_matrix(weight: Any, index: Index, *, bias: bool = False) -> Any:
    """The matrix of one expert, and its bias.

    Parameters
    ----------
    weight : FactorizedTensor, container of TensorLy, or array
    index : int or sequence of int
        The expert, one number a level.
    bias : bool, default False
        Whether the last row of the input mode is the bias; without it that row is one more of the matrix.

    Returns
    -------
    array of shape (I, O)
        ``z @ matrix`` is the expert's output: the transpose of `torch.nn.Linear.weight`.
    array of shape (O,)
        Only with `bias`.
    """
    weight = as_factorized(weight)
    check_flag(bias, "bias")
    matrix = _added(weight, read_index(index, weight.experts))
    if not bias:
        return matrix
    operations = operations_of(matrix)
    return operations.narrow(matrix, 0, 0, matrix.shape[0] - 1), operations.select(matrix, 0, -1)


def mixed_matrix(weight: FactorizedTensor, coefficients: Sequence[Array]) -> Array:
    """The matrix of shape (I, O) that mixes all experts by coefficients, one vector a level."""
    return _added(weight, coefficients)


def _added(weight: FactorizedTensor, experts: Sequence[Any]) -> Array:
    """The terms of a weight, added.

    Of each level `experts` takes all (None), one (an int), or a mixture by coefficients (a vector).
    """
    operations = operations_of(weight.arrays[0])
    total: Array = None
    for term in weight.terms:
        tensor = _formed(term, experts, operations)
        if weight.format.has_bias_term:
            # The bias is the last row, which the other terms do not have.
            others = weight.shape[-2] - 1
            row = (others, 0) if "i" in term.format.omits else (0, 1)
            tensor = operations.pad(tensor, tensor.ndim - 2, *row)
        total = tensor if total is None else total + tensor
    return total


def _formed(term: FactorizedTensor, experts: Sequence[Any], operations: Operations) -> Array:
    """One term of a weight, of shape (experts that are None..., I, O)."""
    format, arrays, scale = term.format, list(term.arrays), None
    network = _weight_network(format, term.shape, term.rank, term.missing)
    sizes, modes = dict(network.index_sizes), mode_names(term.num_levels)
    entries: dict[str, int] = {}
    vectors = []
    for level, (mode, expert) in enumerate(zip(modes, experts, strict=False)):
        parts, (start, stop) = format.parts(mode), format.window(level) or (0, term.shape[level])
        axes, reading = vector_of(format, network, mode, level, term.shape) or ((), Reading())
        if isinstance(expert, int) and not start <= expert < stop:
            tl = backend_of(arrays[0])
            left = [n for n, each in zip(term.shape, experts, strict=False) if each is None]
            return tl.zeros((*left, *term.shape[-2:]), **context_of(arrays[0], tl))
        if isinstance(expert, int) and axes:
            at = np.unravel_index(expert - start, [sizes[x] for x in parts])
            entries |= dict(zip(parts, map(int, at), strict=True))
        elif expert is not None and not isinstance(expert, int):
            vector = read(expert, reading, operations)
            if axes:
                vectors.append((axes, vector.reshape([sizes[x] for x in parts])))
            else:
                scale = vector if scale is None else scale * vector
    for k, operand in enumerate(network.operands):
        for axis in reversed(range(len(operand))):
            if operand[axis] in entries:
                arrays[k] = operations.select(arrays[k], axis, entries[operand[axis]])
    program = _mixing(network, frozenset(entries), tuple(axes for axes, _ in vectors))
    tensor = execute(program, [*arrays, *(vector for _, vector in vectors)])
    tensor = tensor if scale is None else tensor * scale
    return tensor if format.is_plain else _whole_modes(term, tensor, sizes, experts, operations)


def _whole_modes(
    term: FactorizedTensor,
    tensor: Array,
    sizes: Mapping[str, int],
    experts: Sequence[Any],
    operations: Operations,
) -> Array:
    """Join the parts of modes, drop what is padded, and add the experts that the term does not have."""
    format = term.format
    present = {x for f in format.declaration(term.num_levels) for x in f.indices}
    left = [
        (level, mode)
        for level, mode in enumerate(mode_names(term.num_levels))
        if level >= term.num_levels or experts[level] is None
    ]
    parts = [[x for x in format.parts(mode) if x in present] for _, mode in left]
    tensor = tensor.reshape([prod(sizes[x] for x in group) for group in parts])
    for axis, ((level, _), group) in enumerate(zip(left, parts, strict=True)):
        size = term.shape[level]
        start, stop = (format.window(level) if level < term.num_levels else None) or (0, size)
        if group and tensor.shape[axis] > stop - start:
            tensor = operations.narrow(tensor, axis, 0, stop - start)
        if group and stop - start < size:
            tensor = operations.pad(tensor, axis, start, size - stop)
    whole = tuple(term.shape[level] for level, _ in left)
    # (What NumPy expands is read-only.)
    return tensor if tuple(tensor.shape) == whole else operations.expand(tensor, whole)


_weight_network = lru_cache(maxsize=1024)(weight_network)


@lru_cache(maxsize=1024)
def _mixing(network: Network, entries: frozenset[str], vectors: tuple[Indices, ...]) -> Program:
    """Program of fewest FLOPs for weights, some of whose entries are taken, and vectors on their modes."""
    gone = entries.union(*vectors)
    output = tuple(x for x in network.output if x not in gone)
    mixed = network.without(set(entries)).with_vectors([(axes, Reading()) for axes in vectors], output)
    best = Orders(mixed, 1).best("flops")
    assert best is not None
    return Compiler(mixed, 1)(best[0])
