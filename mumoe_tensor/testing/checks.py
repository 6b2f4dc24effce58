"""Checks of properties of every format, each a function of one problem.

A check raises an AssertionError if its property does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, backend_of, tensorly_backend
from mumoe_tensor.contraction.execute import execute
from mumoe_tensor.contraction.layout import Compiler
from mumoe_tensor.contraction.network import Network, Tree, forward_networks
from mumoe_tensor.contraction.plan import plan_network, plan_terms
from mumoe_tensor.dense import expert_matrix, to_dense
from mumoe_tensor.formats import Format, get_format, mode_names
from mumoe_tensor.formats.base import MOST_LEVELS
from mumoe_tensor.multilinear import bind
from mumoe_tensor.tensors import FactorizedTensor
from mumoe_tensor.testing.gradients import check_gradients
from mumoe_tensor.testing.oracle import Float64, assert_close, dense_moe, dense_weight, magnitude, to_numpy
from mumoe_tensor.testing.strategies import Problem, fewest_experts, fewest_levels

#: TensorLy container -> module and name of its reconstruction function.
RECONSTRUCTIONS = {
    "CPTensor": ("tensorly.cp_tensor", "cp_to_tensor"),
    "TuckerTensor": ("tensorly.tucker_tensor", "tucker_to_tensor"),
    "TRTensor": ("tensorly.tr_tensor", "tr_to_tensor"),
    "TTTensor": ("tensorly.tt_tensor", "tt_to_tensor"),
}


def check_equals_dense(problem: Problem) -> None:
    """The forward pass and `to_dense` equal a naive sum over all indices, also for the dense tensor."""
    dense = dense_weight(problem.weight)
    formed = to_dense(problem.weight)
    assert_close(formed, dense, dense_weight(problem.weight, absolute=True), "to_dense", problem.dtype)
    expected, scale = _dense_output(problem, dense), _magnitude(problem)
    assert_close(problem.output(), expected, scale, "multilinear_moe", problem.dtype)
    what = "multilinear_moe of the dense tensor"
    assert_close(problem.output(formed), expected, scale, what, problem.dtype)


def check_equals_tensorly(problem: Problem) -> None:
    """The weight equals TensorLy's reconstruction of its container, if it has one.

    The container is accepted in place of the weight, and converts back to the same factors.
    """
    weight = problem.weight
    try:
        container = weight.to_tensorly()
    except TypeError:
        assert weight.format.container is None or weight.format.splits
        return
    tensor = container
    if type(container).__name__ in RECONSTRUCTIONS:
        module, name = RECONSTRUCTIONS[type(container).__name__]
        with tensorly_backend(problem.backend):
            tensor = getattr(import_module(module), name)(container)
    scale = dense_weight(weight, absolute=True)
    assert_close(to_dense(weight), tensor, scale, "TensorLy's tensor", problem.dtype)
    scale = _magnitude(problem)
    assert_close(problem.output(container), problem.output(), scale, "the container's result", problem.dtype)
    if weight.format.container is None:
        return
    back = FactorizedTensor.from_tensorly(container)
    assert (back.format, back.shape, back.rank) == (weight.format, weight.shape, weight.rank)
    declared = back.format.declaration(back.num_levels)
    for factor, read, f in zip(weight.factors, back.factors, declared, strict=True):
        if factor is None:
            assert f.optional
            assert read is None or np.all(to_numpy(read) == 1)
        else:
            np.testing.assert_array_equal(to_numpy(factor), to_numpy(read))


def check_result_kind(problem: Problem) -> None:
    """The result has the leading shape, backend, dtype and device of the inputs."""
    weight = problem.weight
    *_, i, o = weight.shape
    results = {
        "multilinear_moe": (problem.output(), (*problem.leading, o)),
        "to_dense": (to_dense(weight), weight.shape),
        "expert_matrix": (expert_matrix(weight, (0,) * weight.num_levels), (i, o)),
    }
    for name, (result, shape) in results.items():
        assert backend_of(result) is backend_of(problem.z), f"{name} changed the backend."
        assert result.dtype == problem.z.dtype, f"{name} is {result.dtype}, not {problem.z.dtype}."
        assert tuple(result.shape) == shape, f"{name} has shape {tuple(result.shape)}, not {shape}."
        if problem.backend != "numpy":
            assert result.device == problem.z.device, f"{name} is on {result.device}, not {problem.z.device}."


def check_linear_in_input(problem: Problem) -> None:
    """The output is linear in the inputs, or affine with a bias."""
    generator = problem.generator()
    alpha, beta = generator.uniform(-2, 2, 2)
    zeros = problem.array(np.zeros(problem.z.shape))
    inputs = [problem.z, problem.array(generator.standard_normal(problem.z.shape)), zeros]
    _assert_linear(problem, inputs, [alpha, beta, 1 - alpha - beta], lambda z: {"z": z}, "inputs")
    if not problem.layer.bias:
        assert not np.any(to_numpy(problem.output(z=zeros))), "without a bias, input 0 must give 0."


def check_linear_in_coefficients(problem: Problem) -> None:
    """The output is linear in the coefficients of each level."""
    generator = problem.generator()
    for level, a in enumerate(problem.coefficients):

        def at(x: Array, level: int = level) -> dict[str, Any]:
            return {"coefficients": [*problem.coefficients[:level], x, *problem.coefficients[level + 1 :]]}

        other = problem.array(generator.standard_normal(a.shape))
        shares = generator.uniform(-2, 2, 2).tolist()
        _assert_linear(problem, [a, other], shares, at, f"coefficients of level {level + 1}")


def check_linear_in_factors(problem: Problem) -> None:
    """The output is linear in each factor with the others fixed, or affine if there are other terms."""
    generator, factors = problem.generator(), problem.weight.factors
    has_others = len(problem.weight.terms) > 1
    for k, factor in enumerate(factors):
        if factor is None:
            continue

        def at(x: Array, k: int = k) -> dict[str, Any]:
            changed = [*factors[:k], x, *factors[k + 1 :]]
            return {"weight": _with_factors(problem.weight, changed)}

        arrays = [factor, problem.array(generator.standard_normal(factor.shape))]
        shares = generator.uniform(-2, 2, 2).tolist()
        if has_others:
            arrays.append(problem.array(np.zeros(factor.shape)))
            shares.append(1 - sum(shares))
        _assert_linear(problem, arrays, shares, at, f"factor {k}")


def check_expert_permutation(problem: Problem) -> None:
    """Permuting experts together with their coefficients does not change the result.

    Experts of a slice are permuted within it. Experts of a level that a term splits keep their order.
    """
    generator, weight = problem.generator(), problem.weight
    orders = [_order_of_experts(weight, level, generator) for level in range(weight.num_levels)]
    factors = list(weight.factors)
    for format, of_term in weight.format.summands(weight.num_levels):
        declared = format.declaration(weight.num_levels)
        for k, f in enumerate(declared, start=of_term.start):
            for level, mode in enumerate(mode_names(weight.num_levels)[:-2]):
                if mode in f.indices and factors[k] is not None:
                    start, stop = format.window(level) or (0, weight.shape[level])
                    values = to_numpy(factors[k]).take(
                        orders[level][start:stop] - start, f.indices.index(mode)
                    )
                    factors[k] = problem.array(values)
    permuted = _with_factors(weight, factors)
    coefficients = [
        problem.array(to_numpy(a)[..., p]) for a, p in zip(problem.coefficients, orders, strict=True)
    ]
    result = problem.output(permuted, coefficients=coefficients)
    what = "the result with permuted experts"
    assert_close(result, problem.output(), _magnitude(problem), what, problem.dtype)


def check_one_hot(problem: Problem) -> None:
    """With one-hot coefficients, the output is that of one expert, as returned by `expert_matrix`."""
    generator, weight, bias = problem.generator(), problem.weight, problem.layer.bias
    expert = tuple(int(generator.integers(n)) for n in weight.experts)
    matrix, scale = (dense_weight(weight, absolute=absolute)[expert] for absolute in (False, True))
    what = f"the matrix of expert {expert}"
    assert_close(expert_matrix(weight, expert), matrix, scale, what, problem.dtype)
    if bias:
        split, row = expert_matrix(weight, expert, bias=True)
        assert_close(split, matrix[:-1], scale[:-1], what, problem.dtype)
        assert_close(row, matrix[-1], scale[-1], f"the bias of expert {expert}", problem.dtype)
    one_hot = [
        problem.array(np.broadcast_to(np.eye(n)[k], (*problem.leading, n)))
        for n, k in zip(weight.experts, expert, strict=True)
    ]
    assert_close(
        problem.output(coefficients=one_hot),
        dense_moe(matrix, to_numpy(problem.z), [], bias=bias),
        _magnitude(problem, coefficients=one_hot),
        f"the result for expert {expert} alone",
        problem.dtype,
    )


def check_gauge(problem: Problem) -> None:
    """The tensor does not depend on the basis of a bond of two factors, or on the scale of any bond.

    Inserting a matrix and its inverse into a bond that joins two factors does not change the tensor (as for
    Tucker's factors and the cores of a ring). Neither does permuting the entries of any bond in all its
    factors, or scaling them in one factor and inversely in another (as for the components of CP).
    """
    generator, weight = problem.generator(), problem.weight
    declared, bonds = weight.format.declaration(weight.num_levels), weight.format.bonds(weight.num_levels)
    for bond, size in zip(bonds, weight.rank, strict=True):
        holders = [
            k
            for k, (f, factor) in enumerate(zip(declared, weight.factors, strict=True))
            if factor is not None and bond in f.indices
        ]
        order = generator.permutation(size)
        matrix = np.diag(generator.choice([-1, 1], size) * generator.uniform(0.5, 2, size))[order]
        if len(holders) == 2:
            matrix = np.linalg.qr(generator.standard_normal(matrix.shape))[0] @ matrix
        first, second, *_ = generator.permutation(holders).tolist()
        changes = dict.fromkeys(holders, np.eye(size)[order])
        changes |= {first: matrix, second: np.linalg.inv(matrix).T}
        # The rounding errors of the changed factors are relative to the terms of each entry.
        factors, bound = list(weight.factors), list(weight.factors)
        for k, change in changes.items():
            axis = declared[k].indices.index(bond)
            values = np.moveaxis(to_numpy(factors[k]), axis, -1)
            factors[k] = problem.array(np.moveaxis(values @ change, -1, axis))
            bound[k] = problem.array(np.moveaxis(abs(values) @ abs(change), -1, axis))
        assert_close(
            problem.output(_with_factors(weight, factors)),
            problem.output(),
            _magnitude(problem, _with_factors(weight, bound)),
            f"the result after a change of basis of {bond}",
            problem.dtype,
        )


def check_level_of_one(problem: Problem) -> None:
    """A level with a single expert and coefficient 1 does not change the result.

    A weight with one expert in a level has the same output as its dense tensor without this level. Levels
    with slices are skipped.
    """
    layer, formats = problem.layer, [f for f, _ in problem.weight.format.summands(problem.weight.num_levels)]
    for e in range(problem.weight.num_levels):
        if any(format.window(e) for format in formats):
            continue
        experts = (*layer.experts[:e], 1, *layer.experts[e + 1 :])
        single = replace(problem, layer=replace(layer, experts=experts)).weight
        others = [*problem.coefficients[:e], *problem.coefficients[e + 1 :]]
        one = problem.array(np.ones((*problem.leading, 1)))
        coefficients = [*others[:e], one, *others[e:]]
        dense = problem.array(dense_weight(single).squeeze(e))
        assert_close(
            problem.output(single, coefficients=coefficients),
            problem.output(dense, coefficients=others),
            _magnitude(problem, single, coefficients=coefficients),
            f"the result with a single expert in level {e + 1}",
            problem.dtype,
        )


def check_paths(problem: Problem) -> None:
    """The result does not depend on the contraction path.

    The check covers all combinations of objective, implementation and folded weights, planned for some batch
    size and bound to the weight, and random pairwise orders.
    """
    generator = problem.generator()
    expected, scale = _dense_output(problem, dense_weight(problem.weight)), _magnitude(problem)
    networks, arrays = _networks(problem), problem.weight.factors
    batches = (1, max(1, prod(problem.leading)), 65_536)
    choices: list[tuple[Any, Any, Any]] = list(
        product(("time", "flops", "peak"), ("factorized", "reconstructed", "auto"), (False, True))
    )
    if problem.backend == "jax":  # only a few combinations, since JAX compiles every operation
        choices = [choices[k] for k in generator.choice(len(choices), 3, replace=False)]
    for minimize, implementation, fold_weights in choices:
        batch = int(generator.choice(batches))
        plan = plan_terms(networks, batch, minimize, implementation, None, fold_weights)
        what = f"{minimize=}, {implementation=}, {fold_weights=}, {batch=}: the result"
        assert_close(problem.output(plan=plan), expected, scale, what, problem.dtype)
        bound = bind(plan, problem.weight, bias=problem.layer.bias)
        for _ in range(2):
            result = bound(problem.z, problem.coefficients)
            assert_close(result, expected, scale, f"{what} of bind", problem.dtype)
    batch = prod(problem.leading)
    vectors = [x.reshape(batch, x.shape[-1]) for x in (*problem.coefficients, problem.z)]
    summands = problem.weight.format.summands(problem.weight.num_levels)
    for _ in range(2 if problem.backend == "jax" else 5):
        trees = [random_tree(network, generator) for network in networks]
        total: Array = 0
        for network, tree, (_, of_term) in zip(networks, trees, summands, strict=True):
            program = Compiler(network, int(generator.choice(batches)))(tree)
            factors = [factor for factor in arrays[of_term] if factor is not None]
            total = total + execute(program, [*factors, *vectors[: len(network.readings)]])
        assert_close(
            total, expected.reshape(total.shape), scale.reshape(total.shape), f"orders {trees}: the result"
        )


def check_plan(problem: Problem) -> None:
    """Plans have their documented properties.

    Steps are pairwise. ``"factorized"`` forms no intermediate with all experts, the input and the output,
    unless a factor has all of them (ignoring modes of size one). ``"auto"`` selects the cheaper
    implementation. ``"time"`` uses at most 5 % more FLOPs than ``"flops"``. No plan costs more than the
    format's closed form.
    """
    weight, batch = problem.weight, max(1, prod(problem.leading))
    terms = weight.format.terms(weight.shape, weight.rank)
    for network, term in zip(_networks(problem), terms, strict=True):
        sizes = dict(network.index_sizes)
        modes = {x for x in term.format.modes(weight.num_levels) if sizes.get(x, 1) > 1}
        has_all = any(modes <= {*axes} for axes in network.operands[: network.weights])
        flops = {}
        for implementation in ("factorized", "reconstructed", "auto"):
            plan = plan_network(network, batch, "flops", implementation)
            flops[implementation] = plan.flops
            assert len(plan.steps) == len(network.operands) - 1, "n operands take n - 1 pairwise steps."
            if plan.implementation == "factorized" and len(modes) > 1 and not has_all:
                for step in plan.steps[:-1]:
                    formed = step.equation.partition(" -> ")[2].split()
                    assert not modes <= set(formed), f"{step.equation} forms the weight tensor."
            timed = plan_network(network, batch, "time", implementation)
            assert plan.flops <= timed.flops <= 1.05 * plan.flops, "the default may spend 5 % more FLOPs."
        assert flops["auto"] == min(flops["factorized"], flops["reconstructed"])
        closed = term.format.closed_form(term.mode_sizes, term.rank)
        missing = term.positions(weight.missing)
        if closed is not None and missing == term.format.optional(weight.num_levels):
            assert min(flops.values()) <= closed * batch, "a plan must not cost more than the closed form."


def check_declaration(format: str | Format) -> None:
    """A declaration is a valid tensor network, is deterministic, and has a default rank.

    Raises
    ------
    ValueError, TypeError
        If the declaration is invalid; see `register`.
    AssertionError
        If another property does not hold.
    """
    format = get_format(format)
    for num_levels in range(fewest_levels(format), MOST_LEVELS + 1):
        modes, bonds = format.modes(num_levels), format.bonds(num_levels)
        declared = format.declaration(num_levels)
        mode_sizes = (*fewest_experts(format, num_levels), 1 + format.has_bias_term, 1)
        assert len(format.shapes(mode_sizes, (2,) * len(bonds))) == len(declared)
        default = format.rank_family(mode_sizes, 1)
        assert format.check_rank(default, num_levels) == default
        assert tuple(format.factors(modes)) == declared, f"{format!r} declares other factors each time."


#: All checks of a problem by name.
CHECKS: dict[str, Callable[[Problem], None]] = {
    check.__name__: check
    for check in (
        check_equals_dense,
        check_equals_tensorly,
        check_result_kind,
        check_linear_in_input,
        check_linear_in_coefficients,
        check_linear_in_factors,
        check_expert_permutation,
        check_one_hot,
        check_gauge,
        check_level_of_one,
        check_gradients,
        check_paths,
        check_plan,
    )
}


def random_tree(network: Network, generator: np.random.Generator) -> Tree:
    """Draw a random pairwise contraction order of a network.

    With a bias, the input vector is multiplied by all weights of the input mode in one step, as required.
    """
    nodes: list[tuple[Tree, frozenset[int]]] = [(k, frozenset([k])) for k in range(len(network.operands))]
    vector = network.vector_of_input if network.bias else None
    with_input = {k for k in range(network.weights) if "i" in network.operands[k]}
    while len(nodes) > 1:
        first, second = (int(k) for k in generator.choice(len(nodes), 2, replace=False))
        (left, left_leaves), (right, right_leaves) = nodes[first], nodes[second]
        if (left == vector and not with_input <= right_leaves) or (
            right == vector and not with_input <= left_leaves
        ):
            continue
        nodes = [node for k, node in enumerate(nodes) if k not in (first, second)]
        nodes.append(((left, right), left_leaves | right_leaves))
    return nodes[0][0]


# ---- helpers ---------------------------------------------------------------------------------------


def _dense_output(problem: Problem, dense: Float64) -> Float64:
    """The forward pass of the dense reference."""
    coefficients = [to_numpy(a) for a in problem.coefficients]
    return dense_moe(dense, to_numpy(problem.z), coefficients, bias=problem.layer.bias)


def _magnitude(
    problem: Problem,
    weight: FactorizedTensor | None = None,
    *,
    z: Array = None,
    coefficients: list[Array] | None = None,
) -> Float64:
    """The scale of rounding errors of `Problem.output` with the same arguments."""
    return magnitude(
        problem.weight if weight is None else weight,
        problem.z if z is None else z,
        problem.coefficients if coefficients is None else coefficients,
        bias=problem.layer.bias,
    )


def _assert_linear(
    problem: Problem,
    arrays: Sequence[Array],
    shares: Sequence[float],
    at: Callable[[Array], dict[str, Any]],
    what: str,
) -> None:
    """Assert that the output is linear in an array; `at` maps it to keyword arguments of `Problem.output`."""
    combined = problem.array(sum(share * to_numpy(x) for share, x in zip(shares, arrays, strict=True)))
    expected = sum(s * to_numpy(problem.output(**at(x))) for s, x in zip(shares, arrays, strict=True))
    scale = sum(abs(s) * _magnitude(problem, **at(x)) for s, x in zip(shares, arrays, strict=True))
    what = f"the result for a combination of {what}"
    assert_close(problem.output(**at(combined)), expected, scale, what, problem.dtype)


def _networks(problem: Problem) -> tuple[Network, ...]:
    weight = problem.weight
    return forward_networks(weight.format, weight.shape, weight.rank, weight.missing, problem.layer.bias)


def _with_factors(weight: FactorizedTensor, factors: Sequence[Array | None]) -> FactorizedTensor:
    return FactorizedTensor(weight.format, factors, weight.asked)


def _order_of_experts(weight: FactorizedTensor, level: int, generator: np.random.Generator) -> Any:
    """A random permutation of the experts of a level that is compatible with splits and slices."""
    mode, size = mode_names(weight.num_levels)[level], weight.shape[level]
    formats = [format for format, _ in weight.format.summands(weight.num_levels)]
    if any(format.parts(mode) != (mode,) for format in formats):
        return np.arange(size)
    cuts = sorted({0, size}.union(*(format.window(level) or () for format in formats)))
    return np.concatenate([a + generator.permutation(b - a) for a, b in pairwise(cuts)])
