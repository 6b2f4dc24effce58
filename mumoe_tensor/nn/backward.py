"""The backward pass of a contraction: which results to save, and the gradients of the operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mumoe_tensor.backend import operations_of
from mumoe_tensor.calls import is_batched, is_transformed
from mumoe_tensor.contraction.execute import run, views
from mumoe_tensor.contraction.layout import Arrangement, Bias, Operand, Program, Step
from mumoe_tensor.nn import kernels
from mumoe_tensor.nn.kernels.pairs import product_backward
from mumoe_tensor.nn.products import (
    Joined,
    permuted_product,
    product_above_sum,
    spread_product,
    summed_product,
)
from mumoe_tensor.nn.sparse import FEWEST_EXPERTS, SparseProduct

#: An intermediate is recomputed instead of saved if this takes at most this many FLOPs per element.
CHEAP = 32

TORCH = operations_of(torch.empty(0))
Activation = Callable[..., Tensor]


@dataclass(frozen=True)
class SavePolicy:
    """A program, and the results that are saved for the backward pass.

    Attributes
    ----------
    program : Program
    saved : frozenset of int
        Positions of the results that are saved; the others are recomputed.
    sparse : mapping of int to SparseProduct
        The products of sparse coefficients and a factor, by the position of their result.
    """

    program: Program
    saved: frozenset[int] = frozenset()
    sparse: Mapping[int, SparseProduct] = field(default_factory=dict)

    #: The last product, if it must reorder the parts of a split output.
    joined: Joined | None = field(init=False, compare=False, repr=False)
    #: Replacements of the matrix product, by position of the result.
    products: Mapping[int, Callable[[Tensor, Tensor], Tensor]] = field(init=False, compare=False, repr=False)
    #: The conversion of the last result to the output.
    output: Arrangement | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        program, output, joined = self.program, self.program.output, None
        last = program.steps[-1] if program.steps else None
        if last and last.kind != "mul" and last.shape is None and program.output_is_copied:
            assert output is not None and output.order is not None
            joined, output = Joined(output.order), output._replace(order=None)
        products = {position: spread_product for position, step in program.numbered if step.is_spread}
        products |= self.sparse
        if joined is not None:
            products[program.result] = joined
        for name, value in (("joined", joined), ("products", products), ("output", output)):
            object.__setattr__(self, name, value)


def saved_results(program: Program, recompute: bool) -> frozenset[int]:
    """Positions of the intermediates to save for the backward pass.

    Elementwise products and other cheap products are recomputed. With `recompute`, so are the products that
    do not depend on the input vector: products of coefficients and of weights.
    """
    sizes = dict(program.network.index_sizes)
    depend_on_input = {program.network.vector_of_input}
    saved = set()
    for position, step in program.numbered:
        if not depend_on_input.isdisjoint((step.left.position, step.right.position)):
            depend_on_input.add(position)
        is_cheap = 2 * prod(sizes[x] for x in step.summed) <= CHEAP
        if not is_cheap and (position in depend_on_input or not recompute):
            saved.add(position)
    return frozenset(saved - {program.result})  # the gradient does not depend on the output


def sparse_products(program: Program) -> dict[int, SparseProduct]:
    """The products of one factor with the coefficients of a level with many experts, by position."""
    network = program.network
    sizes = dict(network.index_sizes)
    products = {}
    for position, step in program.numbered:
        factor, vector = sorted((step.left.position, step.right.position))
        is_expert_step = factor < network.weights <= vector < len(network.operands) - 1 and step.kind == "mm"
        if is_expert_step and prod(sizes[x] for x in step.summed) >= FEWEST_EXPERTS:
            products[position] = SparseProduct("left" if vector == step.left.position else "right")
    return products


class _Values(dict[int, Tensor]):
    """Operands and saved results by position; other results are recomputed on access."""

    def __init__(self, policy: SavePolicy, saved: Mapping[int, Tensor]):
        super().__init__(saved)
        self._policy = policy

    def __missing__(self, position: int) -> Tensor:
        program = self._policy.program
        step = program.numbered[position - len(program.network.operands)]
        run([step], self, TORCH, self._policy.products)
        return self[position]


def gradients_of(
    policy: SavePolicy,
    activation: Activation | None,
    operands: Sequence[Tensor],
    results: Mapping[int, Tensor],
    gradient: Tensor,
    needed: Sequence[bool],
    ready: Mapping[int, bool],
) -> list[Tensor | None]:
    """Gradients of the operands, given the gradient of the result; None for operands that need none.

    An activation computes the input vector from the last operands, one for each of its arguments. `results`
    contains the saved results, by position. Those in `ready` were passed to the contraction, not computed by
    it; their gradients follow the gradients of the operands.
    """
    program = policy.program
    last = len(program.network.operands) - 1
    values = _Values(policy, {**dict(enumerate(operands[: last + 1])), **results})
    if activation is not None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in operands[last:]]
            z = activation(*inputs)
        values[last] = z.detach()
    is_needed = [*needed[:last], any(needed[last:])]
    for position, step in program.numbered:
        of_operands = is_needed[step.left.position] or is_needed[step.right.position]
        is_needed.append(ready.get(position, of_operands))
    gradients: dict[int, Tensor] = {program.result: gradient}
    for position, step in reversed(program.numbered):
        values.pop(position, None)
        if position in gradients and position not in ready:
            product = policy.sparse.get(position)
            gradients |= _gradients_of_step(step, gradients.pop(position), values, is_needed, product)
    of_ready = [gradients.get(position) for position in ready]
    if activation is not None and last in gradients:
        gradients |= enumerate(torch.autograd.grad(z, inputs, gradients[last]), last)
    return [*(gradients.get(position) for position in range(len(operands))), *of_ready]


def _gradients_of_step(
    step: Step, gradient: Tensor, values: _Values, is_needed: Sequence[bool], sparse: SparseProduct | None
) -> dict[int, Tensor]:
    """The needed gradients of the operands of one product, by position."""
    operands = (step.left, step.right)
    wholes = (values[step.left.position], values[step.right.position])
    left, right, _ = views(step, *wholes, TORCH)
    if step.kind != "mul":
        stack = left.shape[:-2]
        if right.shape[:-2] != stack:
            stack = torch.broadcast_shapes(stack, right.shape[:-2])
        gradient = _reshaped(gradient, (*stack, left.shape[-2], right.shape[-1]))
    of_views = None
    if sparse is not None:
        of_views = sparse.gradients(left, right, gradient)
    elif (
        step.kind == "mul"
        and all(is_needed[x.position] for x in operands)
        and _is_one_kernel(gradient, left, right)
    ):
        of_views = product_backward(gradient, left, right)
    gradients = {}
    for side, (operand, whole) in enumerate(zip(operands, wholes, strict=True)):
        if not is_needed[operand.position]:
            continue
        view, other = (left, right) if side == 0 else (right, left)
        # The gradient of the view, with axes in memory order.
        if of_views is not None:
            of_view = unpermuted(of_views[side], operand.axes)
        elif step.kind == "mul":
            of_view = _product_summed_to(view.shape, gradient, other)
        else:
            a, b = (gradient, other.mT) if side == 0 else (other.mT, gradient)
            if _is_last_row(step, side):
                a, b = (a, b) if side == 1 else (b.mT, a.mT)
                gradients[operand.position] = _reshaped(product_above_sum(a, b), whole.shape)
                continue
            product = permuted_product if view.shape[:-2] == stack else summed_product
            of_view = product(a, b, _inverse(operand.axes))
        bias = step.bias
        if bias is None or bias.side != side:
            gradients[operand.position] = _of_whole(of_view, operand, whole.shape)
            continue
        shape = list(whole.shape)
        shape[bias.axis] -= 1
        parts = (_of_whole(of_view, operand, shape), _of_bias_row(gradient, bias, shape))
        gradients[operand.position] = torch.cat(parts, dim=bias.axis)
    return gradients


def _is_one_kernel(gradient: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether one kernel can compute both gradients of a product: no broadcasting, no strides."""
    arrays = (gradient, left, right)
    return (
        kernels.serve(gradient)
        and not (is_transformed() or is_batched(gradient))
        and all(x.shape == gradient.shape and x.dtype == gradient.dtype for x in arrays)
        and all(x.is_contiguous() for x in arrays)
    )


def _product_summed_to(shape: Sequence[int], gradient: Tensor, other: Tensor) -> Tensor:
    """``gradient * other``, summed over the axes along which a view of this shape was broadcast."""
    if shape == gradient.shape:
        return gradient * other

    def axes(shape: Sequence[int]) -> list[int]:
        """Axes of the gradient along which a shape is not broadcast."""
        skipped = gradient.ndim - len(shape)
        return [k + skipped for k, size in enumerate(shape) if size == gradient.shape[k + skipped]]

    kept = axes(shape)
    if kept[-1:] == [gradient.ndim - 1] or is_batched(gradient):
        # Adjacent entries belong to different sums, which torch computes fast, one axis at a time. (einsum
        # does not support batched gradients.)
        product = gradient * other
        for axis in reversed([k for k in range(gradient.ndim) if k not in kept]):
            product = product.sum(axis)
        return product.reshape(shape)
    everywhere, of_other = axes(gradient.shape), axes(other.shape)
    squeezed = other.reshape([gradient.shape[k] for k in of_other])
    # A sum of products that never stores all the products.
    return torch.einsum(gradient, everywhere, squeezed, of_other, kept).reshape(shape)


def _of_whole(gradient: Tensor, operand: Operand, shape: Sequence[int]) -> Tensor:
    """The gradient of an operand of this shape, given the gradient of its view with axes in memory order."""
    permuted = shape if operand.copy_order is None else [shape[axis] for axis in operand.copy_order]
    return unpermuted(_reshaped(gradient, permuted), operand.copy_order)


def _reshaped(array: Tensor, shape: Sequence[int]) -> Tensor:
    # A trivial view would take as long as a small sum.
    return array if array.shape == tuple(shape) else array.reshape(shape)


def _is_last_row(step: Step, side: int) -> bool:
    """Whether one operand is, in memory order, a matrix whose last row is the bias row."""
    operand, bias = (step.left, step.right)[side], step.bias
    return (
        step.kind == "mm"
        and bias is not None
        and (bias.side, bias.axis, bias.order, operand.copy_order) == (side, 0, None, None)
        and (operand.axes is None) == (side == 1)
    )


def _of_bias_row(gradient: Tensor, bias: Bias, shape: Sequence[int]) -> Tensor:
    """The gradient of the bias row of an operand of this shape, with an axis of size one."""
    # The row is broadcast over the batch: the rows of the product if it is on the right, otherwise the
    # columns.
    row = gradient.sum(-2 if bias.side == 1 else -1)
    row_shape = [size for axis, size in enumerate(shape) if axis != bias.axis]
    ordered = row_shape if bias.order is None else [row_shape[axis] for axis in bias.order]
    return unpermuted(row.reshape(ordered), bias.order).unsqueeze(bias.axis)


def unpermuted(array: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Undo a permutation of axes."""
    inverse = _inverse(order)
    return array if inverse is None else array.permute(inverse)


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(order.index(k) for k in range(len(order)))
