"""The multilinear mixture of experts as a function: y = W x_1 a_1 ... x_E a_E x_(E+1) z."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from math import prod
from operator import index
from typing import Any

from mumoe_tensor.backend import Array, check_floating, device_kind, dtype_name, is_traced
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.contraction.execute import execute, fold
from mumoe_tensor.contraction.layout import Program
from mumoe_tensor.contraction.machine import AnyMachine, as_machine, machine_of
from mumoe_tensor.contraction.network import Network, forward_networks
from mumoe_tensor.contraction.order import Objective
from mumoe_tensor.contraction.plan import Implementation, Plan, plan_terms
from mumoe_tensor.dense import check_bias
from mumoe_tensor.formats.base import Format
from mumoe_tensor.tensors import FactorizedTensor, as_factorized

#: The batch size to plan for when a function is compiled or exported for any batch size.
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
    machine: AnyMachine | None = None,
    plan: Plan | None = None,
) -> Array:
    """Mix the outputs of all experts: ``y = W x_1 a_1 … x_E a_E x_(E+1) z``.

    Equation (1) of Oldfield et al. (2024), for any number of levels of experts and any format. The weight
    tensor is only formed if `implementation` allows it.

    Parameters
    ----------
    weight : FactorizedTensor, container of TensorLy, or array
        A weight of shape (N1, ..., NE, I, O). With ``bias=True``, it has shape (N1, ..., NE, I + 1, O), and
        the last row of the input mode is the bias.
    z : array of shape (..., I)
        Inputs.
    coefficients : sequence of array of shape (..., Ne)
        One array of expert coefficients per level, with the leading shape of `z`.
    minimize, implementation, memory_limit : optional
        See the function `plan`.
    machine : str, Machine or mapping, optional
        The machine to plan for; see the function `plan`. The default follows from the device and dtype of the
        arrays.
    plan : ContractionPlan or SumPlan, optional
        Run this plan, which must have been made for these sizes. `minimize`, `implementation`, `memory_limit`
        and `machine` are then ignored.

    Returns
    -------
    array of shape (..., O)
        The outputs, in the backend, dtype and device of the inputs.

    Raises
    ------
    ValueError, TypeError
        If the arrays differ in backend, device or floating dtype, shapes or the number of levels do not
        match, or no contraction path stays within `memory_limit`.

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
        # A symbolic batch size of JAX or torch is not an int.
        hint = batch if isinstance(batch, int) and not is_traced(z) else TRACED_BATCH
        chosen = as_machine(machine) if isinstance(machine, Mapping) else machine
        place = device_kind(z), dtype_name(z), chosen
        programs = _programs(*_key(weight, bias), hint, minimize, implementation, memory_limit, place)
    else:
        programs = _check_plan(plan, weight, bias)
    vectors = [x.reshape(batch, x.shape[-1]) for x in (*coefficients, z)]
    return _mixed(weight, programs, vectors).reshape(*leading, weight.shape[-1])


def bind(plan: Plan, weight: Any, *, bias: bool = False) -> Callable[[Array, Sequence[Array]], Array]:
    """Precompute the products of weights in a plan, and return a function for repeated calls.

    Parameters
    ----------
    plan : ContractionPlan or SumPlan
        Usually one made with ``fold_weights=True``.
    weight : FactorizedTensor, container of TensorLy, or array
        The weight for which the plan was made. Later changes to it have no effect.

    Returns
    -------
    callable
        A function ``f(z, coefficients)``, see `multilinear_moe`.
    """
    weight = as_factorized(weight)
    check_bias(weight, bias)
    programs = _check_plan(plan, weight, bias)
    folded = [fold(program, arrays) for program, arrays in zip(programs, _arrays(weight), strict=True)]

    def forward(z: Array, coefficients: Sequence[Array]) -> Array:
        leading = _check_inputs(weight, z, coefficients, bias)
        vectors = [x.reshape(prod(leading), x.shape[-1]) for x in (*coefficients, z)]
        return _mixed(weight, programs, vectors, folded).reshape(*leading, weight.shape[-1])

    return forward


def _arrays(weight: FactorizedTensor) -> list[list[Array]]:
    """For each term, its factors that are not missing."""
    if weight.format.is_plain:
        return [list(weight.arrays)]
    summands = weight.format.summands(weight.num_levels)
    return [[factor for factor in weight.factors[at] if factor is not None] for _, at in summands]


def _mixed(
    weight: FactorizedTensor,
    programs: Sequence[Program],
    vectors: Sequence[Array],
    folded: Sequence[Mapping[int, Array]] | None = None,
) -> Array:
    """The sum of the outputs of all terms, for vectors of shape (batch, size of the mode)."""
    y: Array = None
    for k, (program, arrays) in enumerate(zip(programs, _arrays(weight), strict=True)):
        taken = vectors[: len(program.network.readings)]  # a bias term does not read the inputs
        term = execute(program, [*arrays, *taken], {} if folded is None else folded[k])
        y = term if y is None else y + term
    return y


_forward_networks = lru_cache(maxsize=1024)(forward_networks)


@constant_under_compile
def _programs(
    format: Format,
    modes: tuple[int, ...],
    rank: tuple[int, ...],
    missing: tuple[int, ...],
    bias: bool,
    batch: int,
    minimize: Objective,
    implementation: Implementation,
    memory_limit: int | None,
    place: tuple[str, str, AnyMachine | None],
) -> tuple[Program, ...]:
    if memory_limit is None:
        # Batches of similar size share a plan. (A memory limit applies to the exact batch size.)
        batch = 1 << max(batch - 1, 0).bit_length()
    options = (minimize, implementation, memory_limit, place)
    return _planned(format, modes, rank, missing, bias, batch, *options)


@lru_cache(maxsize=4096)
def _planned(
    format: Format,
    modes: tuple[int, ...],
    rank: tuple[int, ...],
    missing: tuple[int, ...],
    bias: bool,
    batch: int,
    minimize: Objective,
    implementation: Implementation,
    memory_limit: int | None,
    place: tuple[str, str, AnyMachine | None],
) -> tuple[Program, ...]:
    networks = _forward_networks(format, modes, rank, missing, bias)
    options = (minimize, implementation, memory_limit, False, None, machine_of(*place))
    plan = plan_terms(networks, batch, *options)
    return tuple(term.program for term in plan.terms)


def _key(
    weight: FactorizedTensor, bias: bool
) -> tuple[Format, tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    # index() turns a size that torch.compile would keep symbolic into a constant.
    modes, rank = (tuple(index(size) for size in sizes) for sizes in (weight.shape, weight.rank))
    return weight.format, modes, rank, weight.missing, bias


def _check_plan(plan: Plan, weight: FactorizedTensor, bias: bool) -> tuple[Program, ...]:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a ContractionPlan or a SumPlan, got {type(plan).__name__}.")
    networks = _forward_networks(*_key(weight, bias))
    programs = tuple(term.program for term in plan.terms)
    planned = tuple(program.network for program in programs)
    for ours, theirs in zip_longest(networks, planned):
        if ours != theirs:
            raise ValueError(
                f"a plan must have been made for the weight; it has {_described(theirs)}, the weight "
                f"{_described(ours)}."
            )
    return programs


def _described(network: Network | None) -> str:
    if network is None:
        return "no further term"
    return f"{network.weights} factors of sizes {dict(network.index_sizes)} with bias={network.bias}"


def _check_inputs(
    weight: FactorizedTensor, z: Array, coefficients: Sequence[Array], bias: bool
) -> tuple[int, ...]:
    """Check that inputs fit a weight, and return their leading shape."""
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(
            "coefficients must be a list with one array per level of experts, got "
            f"{type(coefficients).__name__}."
        )
    check_bias(weight, bias)
    if weight.format.has_bias_term and not bias:
        raise ValueError(
            f"bias must be True for a weight with a bias, got False for format {weight.format!r}."
        )
    if len(coefficients) != weight.num_levels:
        raise ValueError(
            f"coefficients must have one array per level, {weight.num_levels} for this weight, got "
            f"{len(coefficients)}."
        )
    named = {f"coefficients[{e}]": a for e, a in enumerate(coefficients)}
    named |= {"z": z, "weight": weight.arrays[0]}
    check_floating(named)
    *experts, in_features, _ = weight.shape
    if bias and in_features == 1:
        raise ValueError(
            "with a bias, the input mode must have at least one row besides the bias, got size 1."
        )
    if z.shape[-1:] != (in_features - bias,):
        row = " (the input mode of the weight without its bias row)" if bias else ""
        hint = " If the last row of the weight's input mode is the bias, pass bias=True."
        raise ValueError(
            f"z must have {in_features - bias} features{row} in its last axis, got shape {tuple(z.shape)}."
            + (hint if not bias and z.shape[-1:] == (in_features - 1,) else "")
        )
    leading = tuple(z.shape[:-1])
    for e, (a, n) in enumerate(zip(coefficients, experts, strict=True)):
        if tuple(a.shape) != (*leading, n):
            raise ValueError(
                f"coefficients must have the leading shape of z and one entry per expert; coefficients[{e}] "
                f"must have shape {(*leading, n)}, got {tuple(a.shape)}."
            )
    return leading
