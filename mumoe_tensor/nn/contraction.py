"""A contraction as one differentiable function that keeps little for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mumoe_tensor.backend import load_backend
from mumoe_tensor.contraction.execute import arrange, arranged, execute, read, run
from mumoe_tensor.contraction.layout import Bias, Operand, Program, Step

#: An intermediate is formed again rather than kept if that takes at most this many FLOPs an element.
CHEAP = 32

Activation = Callable[[Tensor], Tensor]


class Recipe(NamedTuple):
    """What to contract, and what of it to keep for the backward pass.

    Attributes
    ----------
    program : Program
    kept : frozenset of int
        Positions of the results that are kept, counted as in the program; others are formed again.
    activation : callable or None
        An elementwise function, applied to the input vector first; its result is formed again.
    """

    program: Program
    kept: frozenset[int]
    activation: Activation | None = None


def kept_results(program: Program, recompute: bool) -> frozenset[int]:
    """Positions of the intermediates to keep for the backward pass.

    Elementwise products, and others that are as cheap, are formed again. With `recompute` so is all that does
    not depend on the input vector: products of coefficients and of weights.
    """
    count, sizes = len(program.network.operands), dict(program.network.sizes)
    has_input = {program.network.vector_of_input}
    kept = set()
    for position, step in enumerate(program.steps, start=count):
        if step.left.position in has_input or step.right.position in has_input:
            has_input.add(position)
        is_cheap = 2 * prod(sizes[x] for x in step.summed) <= CHEAP
        if not is_cheap and (position in has_input or not recompute):
            kept.add(position)
    # The last result is the output, of which the gradient is no function.
    return frozenset(kept - {count + len(program.steps) - 1})


def contract(recipe: Recipe, operands: Sequence[Tensor]) -> Tensor:
    """Contract operands, the input vector last, through the activation of the recipe.

    The same as `execute`, but for what is kept for the backward pass. A compiler decides that by itself, and
    sees the plain steps.
    """
    program, activation = recipe.program, recipe.activation
    backend = load_backend("pytorch")
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _plain(program, activation, operands, backend)
    arrays = arranged(program, _cast(operands), backend)
    device = arrays[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            y, *_ = _Contraction.apply(recipe, *arrays)
    else:
        y, *_ = _Contraction.apply(recipe, *arrays)
    return arrange(y, program.output, backend)


def _plain(program: Program, activation: Activation | None, operands: Sequence[Tensor], backend: Any) -> Any:
    if activation is not None:
        operands = [*operands[:-1], activation(operands[-1])]
    return execute(program, operands, backend)


def _cast(operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """Under autocast the operands in its dtype: it does not reach into a function's backward pass."""
    device = operands[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return [x if x.dtype == torch.float64 else x.to(dtype) for x in operands]
    return operands


class _Contraction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: Recipe, *arrays: Tensor) -> tuple[Tensor, ...]:
        backend = load_backend("pytorch")
        values: list[Any] = list(arrays)
        if recipe.activation is not None:
            values[-1] = recipe.activation(values[-1])
        kept = {}
        for position, step in enumerate(recipe.program.steps, start=len(arrays)):
            values.append(run(step, values, backend))
            values[step.left.position] = values[step.right.position] = None
            if position in recipe.kept:
                kept[position] = values[-1]
        return values[-1], *kept.values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, *arrays = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
        recipe, saved = ctx.recipe, ctx.saved_tensors
        count = len(recipe.program.network.operands)
        if gradient is None:
            return (None,) * (1 + count)
        arrays = saved[:count]
        backend = load_backend("pytorch")
        if torch.is_grad_enabled():
            # The gradient is to have one itself: as a function of the operands, not of what was kept.
            def again(*operands: Tensor) -> Tensor:
                if recipe.activation is not None:
                    operands = (*operands[:-1], recipe.activation(operands[-1]))
                values: list[Any] = list(operands)
                for step in recipe.program.steps:
                    values.append(run(step, values, backend))
                result: Tensor = values[-1]
                return result

            _, pullback = torch.func.vjp(again, *arrays)
            return None, *pullback(gradient)
        kept = dict(zip(sorted(recipe.kept), saved[count:], strict=True))
        return None, *_gradients(recipe, dict(enumerate(arrays)) | kept, gradient, ctx.needs_input_grad[1:])


class _Values(dict[int, Any]):
    """Operands and intermediates by position; one that is not there is formed again."""

    def __init__(self, values: dict[int, Tensor], steps: Sequence[Step], count: int):
        super().__init__(values)
        self.steps, self.count = steps, count

    def __missing__(self, position: int) -> Tensor:
        value: Tensor = run(self.steps[position - self.count], self, load_backend("pytorch"))
        self[position] = value
        return value


def _gradients(
    recipe: Recipe, arrays: dict[int, Tensor], gradient: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the operands that are wanted."""
    steps, count = recipe.program.steps, len(wanted)
    last = count - 1
    values = _Values(arrays, steps, count)
    if recipe.activation is not None:
        with torch.enable_grad():
            before = arrays[last].detach().requires_grad_()
            after = recipe.activation(before)
        values[last] = after.detach()
    needed = list(wanted)
    for step in steps:
        needed.append(needed[step.left.position] or needed[step.right.position])
    gradients: dict[int, Tensor] = {count + len(steps) - 1: gradient}
    for position in reversed(range(count, count + len(steps))):
        step = steps[position - count]
        sides = (step.left.position, step.right.position)
        values.pop(position, None)
        if position not in gradients:
            continue
        found = _of_step(step, gradients.pop(position), values, [needed[p] for p in sides])
        gradients |= {p: g for p, g in zip(sides, found, strict=True) if g is not None}
    if recipe.activation is not None and last in gradients:
        (gradients[last],) = torch.autograd.grad(after, before, gradients[last])
    return [gradients.get(k) for k in range(count)]


def _of_step(step: Step, gradient: Tensor, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of both operands of one product."""
    left, right, _ = read(step, values, load_backend("pytorch"))
    if step.kind == "mul":
        pairs = ((step.left, left, right), (step.right, right, left))
        return [
            _unread(_summed_product(gradient, other, own), operand, values[operand.position].shape)
            if want
            else None
            for (operand, own, other), want in zip(pairs, wanted, strict=True)
        ]
    gradient = gradient.reshape(*left.shape[:-1], right.shape[-1])
    found: list[Tensor | None] = [None, None]
    for side, (operand, want) in enumerate(zip((step.left, step.right), wanted, strict=True)):
        if not want:
            continue
        factors = (gradient, right.mT) if side == 0 else (left.mT, gradient)
        if operand.axes is not None and operand.axes[-2:] == (len(operand.axes) - 1, len(operand.axes) - 2):
            # The product reads it transposed: have the gradient in the memory order it has itself.
            product = (factors[1].mT @ factors[0].mT).mT
        else:
            product = factors[0] @ factors[1]
        bias = step.bias if step.bias is not None and step.bias.side == side else None
        shape = list(values[operand.position].shape)
        if bias is None:
            found[side] = _unread(product, operand, shape)
            continue
        row_shape = [n for axis, n in enumerate(shape) if axis != bias.axis]
        shape[bias.axis] -= 1
        parts = (_unread(product, operand, shape), _of_row(gradient, bias, row_shape))
        found[side] = torch.cat(parts, dim=bias.axis)
    return found


def _of_row(gradient: Tensor, bias: Bias, shape: Sequence[int]) -> Tensor:
    """Gradient of the bias row, with the input mode as an axis of size one."""
    # It was broadcast over the batch: the rows of the product if it stands on the right, else its columns.
    row = gradient.sum(-2 if bias.side == 1 else -1)
    ordered = shape if bias.order is None else [shape[axis] for axis in bias.order]
    return _inverted(row.reshape(ordered), bias.order).unsqueeze(bias.axis)


def _summed_product(gradient: Tensor, other: Tensor, own: Tensor) -> Tensor:
    """``gradient * other``, summed where `own` was broadcast."""
    if own.shape == gradient.shape:
        return gradient * other
    axes = [chr(ord("a") + k) for k in range(gradient.ndim)]
    shapes = (list(gradient.shape), *([1] * (gradient.ndim - x.ndim) + list(x.shape) for x in (other, own)))
    names = ["".join(a for a, n, full in zip(axes, s, shapes[0], strict=True) if n == full) for s in shapes]
    views = [
        x.reshape([n for n, full in zip(s, shapes[0], strict=True) if n == full])
        for x, s in zip((gradient, other), shapes, strict=False)
    ]
    return torch.einsum(f"{names[0]},{names[1]}->{names[2]}", *views).reshape(own.shape)


def _unread(gradient: Tensor, operand: Operand, shape: Sequence[int]) -> Tensor:
    """The gradient of an operand from that of the view a product takes."""
    gradient = _inverted(gradient, operand.axes)
    permuted = shape if operand.copy_order is None else [shape[axis] for axis in operand.copy_order]
    return _inverted(gradient.reshape(permuted), operand.copy_order)


def _inverted(array: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return array if order is None else array.permute([order.index(k) for k in range(len(order))])
