"""Run a program on the arrays of any backend."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import matmul
from typing import Any

from mumoe_tensor.backend import Array, Operations, operations_of
from mumoe_tensor.contraction.layout import Arrangement, Program, Step
from mumoe_tensor.contraction.network import Reading

_NONE: Mapping[int, Any] = {}


def execute(program: Program, operands: Sequence[Array], folded: Mapping[int, Array] = _NONE) -> Array:
    """Contract the operands of a network in the order of a program.

    Parameters
    ----------
    operands : sequence of array
        One array for each operand of ``program.network``, with the same order of axes.
    folded : mapping of int to array, optional
        Results of `fold`, which are not recomputed.

    Returns
    -------
    array
        The result, with the axes ``program.network.output``.
    """
    operations = operations_of(operands[0])
    values = {**dict(enumerate(arranged(program, operands, operations))), **folded}
    run(program.numbered, values, operations, keep=())
    return arrange(values[program.result], program.output, operations)


def fold(program: Program, weights: Sequence[Array]) -> dict[int, Array]:
    """Run the steps that depend only on weights; return their results by position, for `execute`."""
    operations = operations_of(weights[0])
    values = dict(enumerate(arranged(program, weights, operations)))
    run([each for each in program.numbered if each[0] in program.constant], values, operations)
    return {position: values[position] for position in program.constant}


def run(
    steps: Iterable[tuple[int, Step]],
    values: dict[int, Array],
    operations: Operations,
    products: Mapping[int, Callable[[Array, Array], Array]] = _NONE,
    keep: Container[int] | None = None,
) -> None:
    """Run steps, and add their results to the values.

    Parameters
    ----------
    steps : iterable of (int, Step)
        Steps with the positions of their results, as in `Program.numbered`.
    values : dict of int to array
        Operands in memory order, and results, by position. Existing results are not recomputed.
    operations : Operations
        Operations of the backend.
    products : mapping of int to callable, optional
        Replacements of the matrix product, by the position of the result.
    keep : container of int, optional
        Positions of the values to keep after they have been read. By default, all are kept.
    """
    for position, step in steps:
        if position in values:
            continue
        left, right, row = values[step.left.position], values[step.right.position], None
        if not step.is_bare:
            left, right, row = views(step, left, right, operations)
        if step.kind == "mul":
            result = left * right
        elif row is None:
            result = products.get(position, matmul)(left, right)
        else:
            result = (operations.addmm if step.kind == "mm" else operations.baddbmm)(row, left, right)
        values[position] = result if step.shape is None else result.reshape(step.shape)
        if keep is not None:
            for read in (step.left.position, step.right.position):  # no other step reads these
                if read not in keep:
                    del values[read]


def views(step: Step, left: Array, right: Array, operations: Operations) -> tuple[Array, Array, Array | None]:
    """Views of both operands (or of one, if the other is None) for the product, and the bias row to add."""
    arrays, row, bias = [left, right], None, step.bias
    if bias is not None:
        weights = arrays[bias.side]
        row = operations.select(weights, bias.axis, -1)
        arrays[bias.side] = operations.narrow(weights, bias.axis, 0, weights.shape[bias.axis] - 1)
        if bias.order is not None:
            row = operations.permute(row, bias.order)
        if bias.shape is not None:
            row = row.reshape(bias.shape)
    for side, operand in enumerate((step.left, step.right)):
        if arrays[side] is None:
            continue
        if operand.copy_order is not None:
            arrays[side] = operations.permute(arrays[side], operand.copy_order)
        if operand.shape is not None:
            arrays[side] = arrays[side].reshape(operand.shape)
        if operand.axes is not None:
            arrays[side] = operations.permute(arrays[side], operand.axes)
    return arrays[0], arrays[1], row


def arranged(program: Program, operands: Sequence[Array], operations: Operations) -> list[Array]:
    """The operands in memory order; trailing operands may be omitted."""
    return [
        array if arrangement is None else arrange(array, arrangement, operations)
        for array, arrangement in zip(operands, program.arrange, strict=False)
    ]


def arrange(array: Array, arrangement: Arrangement | None, operations: Operations) -> Array:
    """Select entries of a vector; permute, split or join axes; and drop padding."""
    if arrangement is None:
        return array
    if arrangement.reading is not None:
        array = read(array, arrangement.reading, operations)
    if arrangement.order is not None:
        array = operations.permute(array, arrangement.order)
    if arrangement.shape is not None:
        array = array.reshape(arrangement.shape)
    return (
        array if arrangement.size is None else operations.narrow(array, array.ndim - 1, 0, arrangement.size)
    )


def read(vector: Array, reading: Reading, operations: Operations) -> Array:
    """Apply a `Reading` to a vector or a batch of vectors: a window, a sum, or padding with zeros."""
    axis = vector.ndim - 1
    if reading.window is not None:
        start, stop = reading.window
        vector = operations.narrow(vector, axis, start, stop - start)
    if reading.is_summed:
        vector = vector.sum(axis)
    return operations.pad(vector, axis, 0, reading.padding) if reading.padding else vector
