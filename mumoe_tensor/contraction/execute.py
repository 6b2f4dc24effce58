"""Run a program on the arrays of any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mumoe_tensor.backend import Array, add_product, select, without_last
from mumoe_tensor.contraction.layout import Arrangement, Operand, Program, Step


def execute(
    program: Program, operands: Sequence[Array], backend: Any, folded: dict[int, Array] | None = None
) -> Array:
    """Contract the operands of a network in the order of a program.

    Parameters
    ----------
    program : Program
    operands : sequence of array
        One array an operand of ``program.network``, with its axes in that order.
    backend : TensorLy backend
        The backend of the arrays.
    folded : dict of int to array, optional
        Results of `fold`, which are then not computed again.

    Returns
    -------
    array
        With the axes of ``program.network.output``.
    """
    arrays = arranged(program, operands, backend)
    for position, step in enumerate(program.steps, start=len(arrays)):
        if folded and position in folded:
            arrays.append(folded[position])
            continue
        arrays.append(run(step, arrays, backend))
        # Every intermediate is read once: let go of it.
        arrays[step.left.position] = arrays[step.right.position] = None
    return arrange(arrays[-1], program.output, backend)


def fold(program: Program, weights: Sequence[Array], backend: Any) -> dict[int, Array]:
    """Run the steps that multiply weights alone, for `execute` to take up.

    Returns
    -------
    dict of int to array
        Results by the position of their step.
    """
    count = len(program.network.operands)
    arrays = arranged(program, [*weights, *(None,) * (count - len(weights))], backend)
    folded: dict[int, Array] = {}
    for position, step in enumerate(program.steps, start=count):
        pair = (step.left.position, step.right.position)
        if all(p < len(weights) or p in folded for p in pair):
            folded[position] = run(step, arrays, backend)
        arrays.append(folded.get(position))
    return folded


def arranged(program: Program, operands: Sequence[Array | None], backend: Any) -> list[Array]:
    """The operands as the steps take them; None for one that is not there."""
    return [
        array if arrangement is None or array is None else arrange(array, arrangement, backend)
        for array, arrangement in zip(operands, program.arrange, strict=True)
    ]


def arrange(array: Array, arrangement: Arrangement | None, backend: Any) -> Array:
    """Permute the axes, and drop or add those of size one."""
    if arrangement is None:
        return array
    if arrangement.order is not None:
        array = backend.transpose(array, arrangement.order)
    return array if arrangement.shape is None else array.reshape(arrangement.shape)


def run(step: Step, arrays: Any, backend: Any) -> Array:
    """One product, of operands found in `arrays` by position."""
    if step.is_bare:
        left, right = arrays[step.left.position], arrays[step.right.position]
        return left * right if step.kind == "mul" else left @ right
    left, right, row = read(step, arrays, backend)
    if row is not None:
        result = add_product(row, left, right)
    else:
        result = left * right if step.kind == "mul" else left @ right
    return result if step.shape is None else result.reshape(step.shape)


def read(step: Step, arrays: Any, backend: Any) -> tuple[Array, Array, Array | None]:
    """Both operands as the product takes them, and the bias row to add."""
    left, right, row = arrays[step.left.position], arrays[step.right.position], None
    if step.bias is not None:
        bias, sides = step.bias, [left, right]
        weights = sides[bias.side]
        sides[bias.side] = without_last(weights, bias.axis)
        left, right = sides
        row = select(weights, bias.axis, -1)
        if bias.order is not None:
            row = backend.transpose(row, bias.order)
        if bias.shape is not None:
            row = row.reshape(bias.shape)
    if not step.left.is_bare:
        left = _viewed(left, step.left, backend)
    if not step.right.is_bare:
        right = _viewed(right, step.right, backend)
    return left, right, row


def _viewed(array: Array, operand: Operand, backend: Any) -> Array:
    if operand.copy_order is not None:
        array = backend.transpose(array, operand.copy_order)
    if operand.shape is not None:
        array = array.reshape(operand.shape)
    if operand.axes is not None:
        array = backend.transpose(array, operand.axes)
    return array
