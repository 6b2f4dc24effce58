"""The multilinear mixture of experts as a function: y = W x_1 a_1 ... x_E a_E x_(E+1) z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from operator import index
from typing import Any

from mumoe_tensor.backend import Array, check_floating, is_traced, operations_of
from mumoe_tensor.checks import check_flag
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.contraction.execute import execute, fold
from mumoe_tensor.contraction.layout import Compiler, Program
from mumoe_tensor.contraction.network import Network, forward_network, weight_network
from mumoe_tensor.contraction.order import Objective, Orders
from mumoe_tensor.contraction.plan import ContractionPlan, Implementation, plan_network
from mumoe_tensor.formats.base import Format
from mumoe_tensor.selections import Index, read_index
from mumoe_tensor.tensors import FactorizedTensor, as_factorized

#: A function that is compiled or exported for any batch plans for this one.
TRACED_BATCH = 1024


def multilinear_moe(
    weight: Any,
    z: Array,
    coefficients: Sequence[Array],
    *,
    bias: bool = False,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    plan: ContractionPlan | None = None,
) -> Array:
    """Mix the outputs of all experts: ``y = W x_1 a_1 … x_E a_E x_(E+1) z``.

    Equation (1) of Oldfield et al. (2024), for any number of levels of experts and any format. The weight
    tensor is never formed unless the implementation says so.

    Parameters
    ----------
    weight : FactorizedTensor, container of TensorLy, or array
        Of shape (N1, ..., NE, I, O); with ``bias=True`` (N1, ..., NE, I + 1, O), the last row of the input
        mode being the bias.
    z : array of shape (..., I)
        Inputs.
    coefficients : sequence of array of shape (..., Ne)
        One array of expert coefficients a level, with the leading shape of `z`.
    minimize, implementation, memory_limit : optional
        See the function `plan`.
    plan : ContractionPlan, optional
        Run this plan, made for these sizes, instead of asking for one. `minimize`, `implementation` and
        `memory_limit` are then not looked at.

    Returns
    -------
    array of shape (..., O)
        Of the backend, dtype and device of the inputs.

    Raises
    ------
    ValueError, TypeError
        If the arrays differ in backend, device or floating dtype, shapes or the number of levels do not
        match, or no order keeps within `memory_limit`.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> W = mt.FactorizedTensor.random("cp", experts=4, in_features=3, out_features=2, rank=5)
    >>> a = mt.softmax(np.ones((7, 4)))
    >>> mt.multilinear_moe(W, np.ones((7, 3)), [a]).shape
    (7, 2)
    """
    weight = as_factorized(weight)
    leading = _check_inputs(weight, z, coefficients, bias)
    batch = prod(leading)
    if plan is None:
        # (A symbolic batch of JAX or torch is no int.)
        hint = batch if isinstance(batch, int) and not is_traced(z) else TRACED_BATCH
        program = _program(*_key(weight, bias), hint, minimize, implementation, memory_limit)
    else:
        program = _check_plan(plan, weight, bias)
    vectors = [x.reshape(batch, x.shape[-1]) for x in (*coefficients, z)]
    y = execute(program, [*weight.arrays, *vectors])
    return y.reshape(*leading, weight.shape[-1])


def bind(
    plan: ContractionPlan, weight: Any, *, bias: bool = False
) -> Callable[[Array, Sequence[Array]], Array]:
    """Make the products of weights alone that a plan has, once, for many calls.

    Parameters
    ----------
    plan : ContractionPlan
        Usually one made with ``fold_weights=True``.
    weight : FactorizedTensor, container of TensorLy, or array
        The weight the plan was made for. Later changes of it are not seen.

    Returns
    -------
    callable
        ``f(z, coefficients)`` as `multilinear_moe`.
    """
    weight = as_factorized(weight)
    check_flag(bias, "bias")
    program = _check_plan(plan, weight, bias)
    folded = fold(program, weight.arrays)

    def forward(z: Array, coefficients: Sequence[Array]) -> Array:
        leading = _check_inputs(weight, z, coefficients, bias)
        vectors = [x.reshape(prod(leading), x.shape[-1]) for x in (*coefficients, z)]
        return execute(program, [*weight.arrays, *vectors], folded).reshape(*leading, weight.shape[-1])

    return forward


def to_dense(weight: Any) -> Array:
    """Form the weight tensor, of shape (N1, ..., NE, I, O). I counts the bias row, if there is one."""
    weight = as_factorized(weight)
    network = weight_network(weight.format, weight.shape, weight.rank, weight.missing)
    return execute(_whole(network), weight.arrays)


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
    entries = read_index(index, weight.experts)
    network = weight_network(weight.format, weight.shape, weight.rank, weight.missing)
    of_mode = dict(zip(network.output, entries, strict=False))
    arrays, operations = list(weight.arrays), operations_of(weight.arrays[0])
    for k, operand in enumerate(network.operands):
        for axis in reversed(range(len(operand))):
            if operand[axis] in of_mode:
                arrays[k] = operations.select(arrays[k], axis, of_mode[operand[axis]])
    sliced = network.without(set(of_mode))
    matrix = execute(_whole(sliced), arrays)
    if not bias:
        return matrix
    return operations.narrow(matrix, 0, 0, matrix.shape[0] - 1), operations.select(matrix, 0, -1)


def mixed_matrix(weight: FactorizedTensor, coefficients: Sequence[Array]) -> Array:
    """The matrix of shape (I, O) that mixes all experts by coefficients, one vector a level."""
    network = weight_network(weight.format, weight.shape, weight.rank, weight.missing)
    mixed = network.with_vectors([(mode,) for mode in network.output[:-2]], network.output[-2:])
    return execute(_whole(mixed), [*weight.arrays, *coefficients])


@lru_cache(maxsize=1024)
def _whole(network: Network) -> Program:
    """Program of fewest FLOPs for a network of weights alone."""
    best = Orders(network, 1).best("flops")
    assert best is not None
    return Compiler(network, 1)(best[0])


_forward_network = lru_cache(maxsize=1024)(forward_network)


@constant_under_compile
def _program(
    format: Format,
    modes: tuple[int, ...],
    rank: tuple[int, ...],
    missing: tuple[int, ...],
    bias: bool,
    batch: int,
    minimize: Objective,
    implementation: Implementation,
    memory_limit: int | None,
) -> Program:
    if memory_limit is None:
        # Batches of about the same size share a plan. (A limit is for the batch itself.)
        batch = 1 << max(batch - 1, 0).bit_length()
    network = _forward_network(format, modes, rank, missing, bias)
    return plan_network(network, batch, minimize, implementation, memory_limit).program


def _key(
    weight: FactorizedTensor, bias: bool
) -> tuple[Format, tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    # index() makes a constant of a size that torch.compile would leave symbolic.
    modes, rank = (tuple(index(size) for size in sizes) for sizes in (weight.shape, weight.rank))
    return weight.format, modes, rank, weight.missing, bias


def _check_plan(plan: ContractionPlan, weight: FactorizedTensor, bias: bool) -> Program:
    if not isinstance(plan, ContractionPlan):
        raise TypeError(f"plan must be a ContractionPlan, got {type(plan).__name__}.")
    network = _forward_network(*_key(weight, bias))
    planned = plan.program.network
    if planned != network:
        theirs, ours = dict(planned.index_sizes), dict(network.index_sizes)
        raise ValueError(
            f"a plan runs only on the network it was made for; it has {planned.weights} factors of sizes "
            f"{theirs} with bias={planned.bias}, the weight {network.weights} of {ours} with "
            f"bias={network.bias}."
        )
    return plan.program


def _check_inputs(
    weight: FactorizedTensor, z: Array, coefficients: Sequence[Array], bias: bool
) -> tuple[int, ...]:
    """Check inputs against a weight; return their leading shape."""
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(
            "coefficients must be a list with one array a level of experts, got "
            f"{type(coefficients).__name__}."
        )
    check_flag(bias, "bias")
    if len(coefficients) != weight.num_levels:
        raise ValueError(
            f"there must be one array of coefficients a level; the weight has {weight.num_levels} level(s), "
            f"got {len(coefficients)} array(s)."
        )
    named = {f"coefficients[{e}]": a for e, a in enumerate(coefficients)}
    named |= {"z": z, "weight": weight.arrays[0]}
    check_floating(named)
    *experts, in_features, _ = weight.shape
    if bias and in_features == 1:
        raise ValueError(
            "with a bias the input mode must have a row besides it, got an input mode of size 1."
        )
    if z.shape[-1:] != (in_features - bias,):
        row = " (the input mode of the weight less its bias row)" if bias else ""
        hint = " If the last row of the weight's input mode is the bias, pass bias=True."
        raise ValueError(
            f"z must have {in_features - bias} features{row} in its last axis, got shape {tuple(z.shape)}."
            + (hint if not bias and z.shape[-1:] == (in_features - 1,) else "")
        )
    leading = tuple(z.shape[:-1])
    for e, (a, n) in enumerate(zip(coefficients, experts, strict=True)):
        if tuple(a.shape) != (*leading, n):
            raise ValueError(
                f"coefficients must have the leading shape of z and one entry an expert; coefficients[{e}] "
                f"should have shape {(*leading, n)}, got {tuple(a.shape)}."
            )
    return leading
