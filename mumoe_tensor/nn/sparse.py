"""Products of sparse coefficients and a factor, computed from the nonzero coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mumoe_tensor.backend import operations_of
from mumoe_tensor.calls import is_batched, is_exported, is_recorded
from mumoe_tensor.contraction.execute import arrange, views
from mumoe_tensor.contraction.layout import Program
from mumoe_tensor.contraction.machine import machine_of
from mumoe_tensor.nn import kernels
from mumoe_tensor.nn.kernels.rows import sum_of_indexed_rows, sum_of_indexed_rows_backward

#: Minimum number of experts of a level for which sparsity is used; below it, the dense product is as fast.
FEWEST_EXPERTS = 1024
#: Maximum fraction of nonzero coefficients for which individual rows of the factor are summed.
DENSEST = 0.08
#: The same on a GPU, where dense products are much faster than reading individual rows.
DENSEST_ON_GPU = 2 / machine_of("cuda", "bfloat16").element
#: Number of rows of coefficients from which this share is estimated.
SAMPLE = 32


def is_supported(coefficients: Tensor) -> bool:
    """Whether `sparse_product` can be used: for plain float tensors on a CPU."""
    is_plain = torch.compiler.is_compiling() or type(coefficients) in (Tensor, torch.nn.Parameter)
    is_float = coefficients.dtype in (torch.float32, torch.float64) and coefficients.device.type == "cpu"
    return is_plain and is_float and not is_exported() and not torch.is_autocast_enabled("cpu")


def is_indexable(z: Tensor) -> bool:
    """Whether `indexed_product` can be used for inputs: on a CPU, or by a kernel on a GPU.

    The kernel adds gradients in an arbitrary order, so it is not used with deterministic algorithms.
    """
    by_kernel = kernels.serve(z) and not (is_recorded() or torch.are_deterministic_algorithms_enabled())
    return by_kernel or is_supported(z)


class SparseCoefficients(NamedTuple):
    """Coefficients of a level in indexed form: values and experts, k of N for every input.

    Attributes
    ----------
    values : Tensor of shape (..., k)
    indices : Tensor of int64, of shape (..., k)
        The experts, without repetitions.
    num_experts : int
    """

    values: Tensor
    indices: Tensor
    num_experts: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense coefficients, (..., N)."""
        return (*self.values.shape[:-1], self.num_experts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def is_few(self) -> bool:
        """Whether `indexed_product` is faster than the product with dense coefficients."""
        k = self.values.shape[-1]
        densest = DENSEST if self.values.device.type == "cpu" else DENSEST_ON_GPU
        return self.num_experts >= FEWEST_EXPERTS and k <= densest * self.num_experts

    def reshape(self, *shape: int) -> SparseCoefficients:
        """Reshape the coefficients; the last size must be N, or -1."""
        *leading, _ = shape
        return self._replace(
            values=self.values.reshape(*leading, self.values.shape[-1]),
            indices=self.indices.reshape(*leading, self.values.shape[-1]),
        )

    def to(self, dtype: torch.dtype) -> SparseCoefficients:
        """Convert the values to a dtype."""
        return self._replace(values=self.values.to(dtype))

    def dense(self) -> Tensor:
        """The coefficients of all experts."""
        # Zeros, or NaN in rows with NaN values.
        rest = (0 * self.values.detach()[..., :1]).expand(self.shape)
        return rest.scatter(-1, self.indices, self.values)


def indexed_product(coefficients: SparseCoefficients, factor: Tensor) -> Tensor:
    """``coefficients.dense() @ factor``, from k rows of the factor for each row of coefficients."""
    result: Tensor = _IndexedProduct.apply(coefficients.values, coefficients.indices, factor)
    return result


def indexed_products(
    program: Program, products: Mapping[int, SparseProduct], operands: Sequence[Any]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The operands of the other steps, and the products of sparse coefficients and factors by position.

    `products` is the result of `.backward.sparse_products`. Coefficients that do not occur in such a product
    become dense. Coefficients that are no longer needed, or only as a sum, are replaced by their values.
    """
    rest: list[Any] = list(operands)
    network = program.network
    for position, reading in enumerate(network.readings, network.weights):
        if reading.is_summed and reading.window is None and isinstance(rest[position], SparseCoefficients):
            rest[position] = rest[position].values
    ready: dict[int, Tensor] = {}
    for position, step in program.numbered:
        product = products.get(position)
        if product is None:
            continue
        is_left = product.side == "left"
        vector, weights = step.left.position, step.right.position
        if not is_left:
            vector, weights = weights, vector
        coefficients, factor = operands[vector], operands[weights]
        is_plain = step.bias is None and program.arrange[vector] is None
        if isinstance(coefficients, SparseCoefficients) and isinstance(factor, Tensor) and is_plain:
            operations = operations_of(factor)
            factor = arrange(factor, program.arrange[weights], operations)
            if is_left:
                result = indexed_product(coefficients, views(step, None, factor, operations)[1])
            else:
                result = indexed_product(coefficients, views(step, factor, None, operations)[0].mT).mT
            ready[position] = result if step.shape is None else result.reshape(step.shape)
            rest[vector] = coefficients.values
    return [x.dense() if isinstance(x, SparseCoefficients) else x for x in rest], ready


def sparse_product(coefficients: Tensor, factor: Tensor) -> Tensor:
    """``coefficients @ factor``, computed from the rows with nonzero coefficients if these are few.

    The result is exact for all coefficients, but the gradient of zero coefficients is zero. This is correct
    only for a gate with a zero derivative wherever its coefficients are zero.
    """
    result: Tensor = _Function.apply(coefficients, factor)
    return result


@dataclass(frozen=True)
class SparseProduct:
    """``left @ right`` by `sparse_product`; `side` is the side of the coefficients."""

    side: Literal["left", "right"]

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return sparse_product(left, right) if self.side == "left" else sparse_product(right.mT, left.mT).mT

    def gradients(self, left: Tensor, right: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both operands."""
        if self.side == "left":
            of_left, of_right = sum_of_rows_backward(left, right, gradient)
        else:
            of_right, of_left = (x.mT for x in sum_of_rows_backward(right.mT, left.mT, gradient.mT))
        return of_left, of_right


class _IndexedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, factor)
        if kernels.serve(factor):
            y: Tensor = sum_of_indexed_rows(values, indices, factor)
            return y
        return torch.nn.functional.embedding_bag(indices, factor, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        values, indices, factor = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(gradient):
            # Plain operations for higher derivatives and batched gradients.
            of_values = (factor[indices] @ gradient.unsqueeze(-1)).squeeze(-1)
            parts = values.unsqueeze(-1) * gradient.unsqueeze(-2)
            of_factor = torch.zeros_like(factor).index_add(
                0, indices.flatten(), parts.reshape(-1, factor.shape[1])
            )
            return of_values, None, of_factor
        if kernels.serve(factor):
            of_values, of_factor = sum_of_indexed_rows_backward(values, indices, factor, gradient)
            return of_values, None, of_factor
        rows, k = indices.shape
        row = torch.arange(rows, device=indices.device).repeat_interleave(k)
        starts = torch.arange(0, rows * k, k, device=indices.device)
        pairs = _gradients(values.flatten(), row, indices.flatten(), starts, factor, gradient)
        return pairs[0].reshape(rows, k), None, pairs[1]


class _Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, factor: Tensor) -> Tensor:
        result: Tensor = sum_of_rows(coefficients, factor)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, factor = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Differentiable products for higher derivatives.
            return _of_dense(coefficients, factor, gradient)
        gradients: tuple[Tensor, Tensor] = sum_of_rows_backward(coefficients, factor, gradient)
        return gradients


# A compiler cannot trace the operators, since they depend on the values of the coefficients. They have no
# derivative; the autograd functions that call them do.


@torch.library.custom_op("mumoe_tensor::sum_of_rows", mutates_args=())
def sum_of_rows(coefficients: Tensor, factor: Tensor) -> Tensor:
    """``coefficients @ factor``."""
    if not _are_few(coefficients):
        return coefficients @ factor
    position, _, column, starts = _support(coefficients)
    return torch.nn.functional.embedding_bag(
        column, factor, starts, mode="sum", per_sample_weights=coefficients.reshape(-1)[position]
    )


@sum_of_rows.register_fake
def _(coefficients: Tensor, factor: Tensor) -> Tensor:
    return coefficients @ factor


@sum_of_rows.register_vmap
def _(info: Any, in_dims: Any, coefficients: Tensor, factor: Tensor) -> tuple[Tensor, int]:
    coefficients, factor = _stacked(info.batch_size, in_dims, coefficients, factor)
    return coefficients @ factor, 0


@torch.library.custom_op("mumoe_tensor::sum_of_rows_backward", mutates_args=())
def sum_of_rows_backward(coefficients: Tensor, factor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both operands; the gradients of zero coefficients are zero."""
    if not _are_few(coefficients):
        return _of_dense(coefficients, factor, gradient)
    position, row, column, starts = _support(coefficients)
    values = coefficients.reshape(-1)[position]
    of_coefficients = torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    of_coefficients.view(-1)[position], of_factor = _gradients(values, row, column, starts, factor, gradient)
    return of_coefficients, of_factor


@sum_of_rows_backward.register_fake
def _(coefficients: Tensor, factor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _of_dense(coefficients, factor, gradient)


@sum_of_rows_backward.register_vmap
def _(info: Any, in_dims: Any, *operands: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    coefficients, factor, gradient = _stacked(info.batch_size, in_dims, *operands)
    return _of_dense(coefficients, factor, gradient), (0, 0)


def _of_dense(coefficients: Tensor, factor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both operands of the plain product."""
    return gradient @ factor.mT, coefficients.mT @ gradient


def _gradients(
    values: Tensor, row: Tensor, column: Tensor, starts: Tensor, factor: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the nonzero coefficients, given by rows and columns in order, and of the factor.

    `starts` contains the start of each row.
    """
    gradient = gradient.contiguous()
    of_values = _dot_products(gradient, factor, column, starts, row)
    # The same product with exchanged roles: for every row of the factor, the rows of the batch that use it.
    order = torch.argsort(column, stable=True)
    of_factor = torch.nn.functional.embedding_bag(
        row[order], gradient, _starts(column, len(factor)), mode="sum", per_sample_weights=values[order]
    )
    return of_values, of_factor


def _dot_products(gradient: Tensor, factor: Tensor, column: Tensor, starts: Tensor, row: Tensor) -> Tensor:
    """``gradient[row] . factor[column]`` for each pair, without copying the rows.

    This uses a private operator of torch, from the backward pass of `embedding_bag`.
    """
    result: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient, factor, column, starts, row, 0
    )
    return result


def _stacked(count: int, in_dims: Sequence[int | None], *operands: Tensor) -> list[Tensor]:
    """Operands with the mapped axis first."""
    return [
        x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip(operands, in_dims, strict=True)
    ]


def _are_few(coefficients: Tensor) -> bool:
    """Whether few coefficients are nonzero, estimated from evenly spaced rows."""
    sample = coefficients[:: max(1, len(coefficients) // SAMPLE)]
    return int(torch.count_nonzero(sample)) <= DENSEST * sample.numel()


def _support(coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nonzero coefficients: flat position, row and column of each, and the start of each row."""
    position = coefficients.reshape(-1).nonzero()[:, 0]
    row = torch.div(position, coefficients.shape[1], rounding_mode="floor")
    return position, row, position - row * coefficients.shape[1], _starts(row, len(coefficients))


def _starts(index: Tensor, count: int) -> Tensor:
    """The start of each value in a sorted index."""
    counts = torch.bincount(index, minlength=count)
    return counts.cumsum(0) - counts
