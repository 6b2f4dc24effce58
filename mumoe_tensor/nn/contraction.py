"""A contraction as one differentiable function that keeps little for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mumoe_tensor.backend import load_backend
from mumoe_tensor.contraction.execute import arrange, arranged, read, run
from mumoe_tensor.contraction.layout import Bias, Operand, Program, Step
from mumoe_tensor.nn.sparse import FEWEST_EXPERTS, sparse_product, sum_of_rows_backward
from mumoe_tensor.recording import is_recorded

#: An intermediate is formed again rather than kept if that takes at most this many FLOPs an element.
CHEAP = 32

BACKEND = load_backend("pytorch")
#: Kinds of devices. (Not asked in a call: torch 2.11 cannot compile the question.)
_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)
Activation = Callable[[Tensor], Tensor]
_NONE: Mapping[int, Tensor] = {}


class Recipe(NamedTuple):
    """What to contract, and what of it to keep for the backward pass.

    Attributes
    ----------
    program : Program
    kept : frozenset of int
        Positions of the results that are kept, counted as in the program; others are formed again.
    sparse : frozenset of int
        Positions of products of coefficients and a factor that `sparse_product` is to make.
    """

    program: Program
    kept: frozenset[int]
    sparse: frozenset[int] = frozenset()


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


def sparse_products(program: Program) -> frozenset[int]:
    """Positions of the products of one factor and the coefficients of a level of many experts."""
    network = program.network
    count, sizes = len(network.operands), dict(network.sizes)
    found = set()
    for position, step in enumerate(program.steps, start=count):
        vector, factor = sorted((step.left.position, step.right.position), reverse=True)
        is_expert_step = factor < network.weights <= vector < count - 1 and step.kind == "mm"
        if is_expert_step and prod(sizes[x] for x in step.summed) >= FEWEST_EXPERTS:
            found.add(position)
    return frozenset(found)


def contract(
    recipe: Recipe,
    operands: Sequence[Tensor],
    activation: Activation | None = None,
    folded: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Contract operands, the input vector last.

    The same as `execute`, but for what is kept for the backward pass. What is recorded are the plain steps: a
    compiler decides by itself what to keep.

    Parameters
    ----------
    recipe : Recipe
    operands : sequence of Tensor
    activation : callable, optional
        An elementwise function, applied to the input vector first; its result is formed again.
    folded : mapping of int to Tensor, optional
        Results of `fold`, for a pass without gradients.
    """
    dtype = autocast_dtype(operands[0].device)
    if dtype is not None:
        # Autocast does not reach into the backward pass of a function.
        operands = [x if x.dtype == torch.float64 else x.to(dtype) for x in operands]
        with torch.autocast(operands[0].device.type, enabled=False):
            return contract(recipe, operands, activation, folded)
    arrays = arranged(recipe.program, operands, BACKEND)
    if not torch.is_grad_enabled() or is_recorded():
        y = _run(recipe, activation, arrays, folded or _NONE)[0]
    else:
        y = _Contraction.apply(recipe, activation, *arrays)[0]
    return arrange(y, recipe.program.output, BACKEND)


def check_dense(x: Tensor) -> None:
    """Raise a TypeError unless an input is a tensor with a value for every entry."""
    if not isinstance(x, Tensor):
        # Most often a Proxy of torch.fx.
        raise TypeError(
            f"an input must be a torch.Tensor, got {type(x).__name__}; a Tracer of torch.fx must take the "
            "layers as leaves, see its method is_leaf_module."
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor: pad it" if x.is_nested else f"layout {x.layout}: make it dense"
        raise TypeError(f"an input must be a dense tensor, got {kind}.")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this device, None where it is off."""
    kind = device.type
    if kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _run(
    recipe: Recipe,
    activation: Activation | None,
    arrays: Sequence[Tensor],
    folded: Mapping[int, Tensor] = _NONE,
) -> tuple[Tensor, list[Tensor]]:
    """The result, and the results to keep in the order of their positions."""
    values: list[Any] = list(arrays)
    if activation is not None:
        values[-1] = activation(values[-1])
    kept = []
    for position, step in enumerate(recipe.program.steps, start=len(arrays)):
        if position in folded:
            values.append(folded[position])
            continue
        values.append(_sparse(step, values) if position in recipe.sparse else run(step, values, BACKEND))
        # Every intermediate is read once: let go of it.
        values[step.left.position] = values[step.right.position] = None
        if position in recipe.kept:
            kept.append(values[-1])
    return values[-1], kept


def _sparse(step: Step, values: Any) -> Tensor:
    """One step by `sparse_product`."""
    left, right, _ = read(step, values, BACKEND)
    is_vector_left = step.left.position > step.right.position
    result = sparse_product(left, right) if is_vector_left else sparse_product(right.mT, left.mT).mT
    return result if step.shape is None else result.reshape(step.shape)


class _Contraction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: Recipe, activation: Activation | None, *arrays: Tensor) -> tuple[Tensor, ...]:
        result, kept = _run(recipe, activation, arrays)
        if recipe.program.steps[-1].shape is not None:
            # A view that a function returns must not be changed in place, as activations do.
            result = result.clone()
        return result, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, ctx.activation, *arrays = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
        recipe, activation, saved = ctx.recipe, ctx.activation, ctx.saved_tensors
        count = len(recipe.program.network.operands)
        if gradient is None:
            return (None,) * (2 + count)
        arrays = saved[:count]
        if torch.is_grad_enabled():
            # The gradient is to have one itself: as a function of the operands, not of what was kept.
            plain = recipe._replace(sparse=frozenset())
            pullback = torch.func.vjp(lambda *operands: _run(plain, activation, operands)[0], *arrays)[1]
            return None, None, *pullback(gradient)
        values = dict(enumerate(arrays)) | dict(zip(sorted(recipe.kept), saved[count:], strict=True))
        return None, None, *_gradients(recipe, activation, values, gradient, ctx.needs_input_grad[2:])


class _Values(dict[int, Any]):
    """Operands and intermediates by position; one that is not there is formed again."""

    def __init__(self, values: dict[int, Tensor], recipe: Recipe):
        super().__init__(values)
        self.recipe = recipe

    def __missing__(self, position: int) -> Tensor:
        program = self.recipe.program
        step = program.steps[position - len(program.network.operands)]
        is_sparse = position in self.recipe.sparse
        self[position] = value = _sparse(step, self) if is_sparse else run(step, self, BACKEND)
        return value


def _gradients(
    recipe: Recipe,
    activation: Activation | None,
    arrays: dict[int, Tensor],
    gradient: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the operands that are wanted."""
    steps, count = recipe.program.steps, len(wanted)
    last = count - 1
    values = _Values(arrays, recipe)
    if activation is not None:
        with torch.enable_grad():
            before = arrays[last].detach().requires_grad_()
            after = activation(before)
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
        found = _of_step(
            step, gradients.pop(position), values, [needed[p] for p in sides], position in recipe.sparse
        )
        gradients |= {p: g for p, g in zip(sides, found, strict=True) if g is not None}
    if activation is not None and last in gradients:
        (gradients[last],) = torch.autograd.grad(after, before, gradients[last])
    return [gradients.get(k) for k in range(count)]


def _of_step(
    step: Step, gradient: Tensor, values: _Values, wanted: Sequence[bool], is_sparse: bool
) -> list[Tensor | None]:
    """Gradients of both operands of one product."""
    left, right, _ = read(step, values, BACKEND)
    if step.kind == "mul":
        pairs = ((step.left, left, right), (step.right, right, left))
        return [
            _unread(_summed_product(gradient, other, own), operand, values[operand.position].shape)
            if want
            else None
            for (operand, own, other), want in zip(pairs, wanted, strict=True)
        ]
    gradient = gradient.reshape(*left.shape[:-1], right.shape[-1])
    operands = (step.left, step.right)
    shapes = [values[operand.position].shape for operand in operands]
    if is_sparse:
        if step.left.position > step.right.position:
            views: Any = sum_of_rows_backward(left, right, gradient)
        else:
            of_vector, of_factor = sum_of_rows_backward(right.mT, left.mT, gradient.mT)
            views = (of_factor.mT, of_vector.mT)
        return [_unread(*each) for each in zip(views, operands, shapes, strict=True)]
    found: list[Tensor | None] = [None, None]
    for side, (operand, want) in enumerate(zip(operands, wanted, strict=True)):
        if not want:
            continue
        factors = (gradient, right.mT) if side == 0 else (left.mT, gradient)
        if operand.axes is not None and operand.axes[-2:] == (len(operand.axes) - 1, len(operand.axes) - 2):
            # The product reads it transposed: have the gradient in the memory order it has itself.
            product = (factors[1].mT @ factors[0].mT).mT
        else:
            product = factors[0] @ factors[1]
        bias = step.bias if step.bias is not None and step.bias.side == side else None
        shape = list(shapes[side])
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
