"""The product of sparse coefficients and a factor, from the coefficients that are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.recording import is_exported

#: Fewest experts of a level for which zeros are looked for: below, the dense product takes no longer.
FEWEST_EXPERTS = 1024
#: Largest share of coefficients that are not zero at which the rows they name are summed.
DENSEST = 0.08
#: Rows of coefficients that the share is measured on.
SAMPLE = 32


def is_supported(coefficients: Tensor) -> bool:
    """Whether `sparse_product` takes them: plain tensors on a CPU, as it is measured there only."""
    plain = torch.compiler.is_compiling() or type(coefficients) in (Tensor, torch.nn.Parameter)
    known = coefficients.dtype in (torch.float32, torch.float64) and coefficients.device.type == "cpu"
    return plain and known and not is_exported() and not torch.is_autocast_enabled("cpu")


def sparse_product(coefficients: Tensor, factor: Tensor) -> Tensor:
    """``coefficients @ factor``, from the rows of the factor that it needs where these are few.

    Exact whatever the coefficients are. But the gradient of the coefficients is zero where they are: that is
    enough for a gate whose own derivative is zero there, and wrong for anything else.

    Parameters
    ----------
    coefficients : Tensor of shape (B, N)
    factor : Tensor of shape (N, R)

    Returns
    -------
    Tensor of shape (B, R)
    """
    result: Tensor = _SparseProduct.apply(coefficients, factor)
    return result


class _SparseProduct(torch.autograd.Function):
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
            # The gradient is to have one itself: by products that have derivatives.
            return _of_dense(coefficients, factor, gradient)
        found: tuple[Tensor, Tensor] = sum_of_rows_backward(coefficients, factor, gradient)
        return found


# Operations of their own, that a compiler does not look into: what they do depends on the coefficients. They
# have no derivative; the functions that call them have.


@torch.library.custom_op("mumoe_tensor::sum_of_rows", mutates_args=())
def sum_of_rows(coefficients: Tensor, factor: Tensor) -> Tensor:
    """The product."""
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
    """Gradients of both operands, that of the coefficients zero where they are zero."""
    if not _are_few(coefficients):
        return _of_dense(coefficients, factor, gradient)
    position, row, column, starts = _support(coefficients)
    gradient = gradient.contiguous()
    of_coefficients = torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    of_coefficients.view(-1)[position] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient, factor, column, starts, row, 0
    )
    # The same product with the roles changed: of every row of the factor, the rows of the batch it is in.
    order = torch.argsort(column, stable=True)
    of_factor = torch.nn.functional.embedding_bag(
        row[order],
        gradient,
        _starts(column, len(factor)),
        mode="sum",
        per_sample_weights=coefficients.reshape(-1)[position[order]],
    )
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


def _stacked(count: int, in_dims: Sequence[int | None], *operands: Tensor) -> list[Tensor]:
    """Operands with the axis that is mapped over in front."""
    return [
        x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip(operands, in_dims, strict=True)
    ]


def _are_few(coefficients: Tensor) -> bool:
    """Whether few coefficients are not zero, as far as some evenly spaced rows tell."""
    sample = coefficients[:: max(1, len(coefficients) // SAMPLE)]
    return int(torch.count_nonzero(sample)) <= DENSEST * sample.numel()


def _support(coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where coefficients are not zero: position, row, column, and the start of every row among these."""
    position = coefficients.reshape(-1).nonzero()[:, 0]
    row = torch.div(position, coefficients.shape[1], rounding_mode="floor")
    return position, row, position - row * coefficients.shape[1], _starts(row, len(coefficients))


def _starts(index: Tensor, count: int) -> Tensor:
    """Where every value of an index starts, once it is sorted."""
    counts = torch.bincount(index, minlength=count)
    return counts.cumsum(0) - counts
