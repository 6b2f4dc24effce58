"""Properties that hold for every format, each a function of one problem.

A check raises an AssertionError where its property does not hold, and returns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from math import prod
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, note, settings

from mumoe_tensor.backend import Array, backend_of, tensorly_backend
from mumoe_tensor.contraction.execute import execute
from mumoe_tensor.contraction.layout import Compiler
from mumoe_tensor.contraction.network import Network, forward_network
from mumoe_tensor.contraction.plan import plan_network
from mumoe_tensor.formats import Format, get_format, mode_names
from mumoe_tensor.formats.base import MOST_LEVELS, Tree
from mumoe_tensor.multilinear import bind, expert_matrix, multilinear_moe, to_dense
from mumoe_tensor.tensors import FactorizedTensor
from mumoe_tensor.testing.oracle import (
    Float64,
    assert_close,
    dense_moe,
    dense_weight,
    magnitude,
    subscripts,
    to_numpy,
)
from mumoe_tensor.testing.strategies import Problem, installed_backends, jax_float64, problems

#: TensorLy's container -> where its own reconstruction lies.
RECONSTRUCTIONS = {
    "CPTensor": ("tensorly.cp_tensor", "cp_to_tensor"),
    "TuckerTensor": ("tensorly.tucker_tensor", "tucker_to_tensor"),
    "TRTensor": ("tensorly.tr_tensor", "tr_to_tensor"),
    "TTTensor": ("tensorly.tt_tensor", "tt_to_tensor"),
}


def check_equals_dense(problem: Problem) -> None:
    """The forward pass and `to_dense` equal a naive sum over all indices; so does the dense tensor's own.

    Parameters
    ----------
    problem : Problem
    """
    dense = dense_weight(problem.weight)
    formed = to_dense(problem.weight)
    assert_close(formed, dense, dense_weight(problem.weight, absolute=True), "to_dense", problem.dtype)
    expected = dense_moe(dense, *_inputs(problem), bias=problem.bias)
    scale = _magnitude(problem)
    assert_close(problem.output(), expected, scale, "multilinear_moe", problem.dtype)
    assert_close(
        problem.output(formed), expected, scale, "multilinear_moe of the dense tensor", problem.dtype
    )


def check_equals_tensorly(problem: Problem) -> None:
    """TensorLy's own reconstruction of the weight's container is the second oracle, if it has one.

    The container is accepted where a weight is, and read back to the same factors.

    Parameters
    ----------
    problem : Problem
    """
    try:
        container = problem.weight.to_tensorly()
    except TypeError:
        assert problem.weight.format.container is None
        return
    if type(container).__name__ in RECONSTRUCTIONS:
        module, name = RECONSTRUCTIONS[type(container).__name__]
        reconstruct = getattr(__import__(module, fromlist=[name]), name)
        with tensorly_backend(problem.backend):
            whole = reconstruct(container)
    else:
        whole = container
    scale = dense_weight(problem.weight, absolute=True)
    assert_close(to_dense(problem.weight), whole, scale, "TensorLy's tensor", problem.dtype)
    scale = _magnitude(problem)
    assert_close(problem.output(container), problem.output(), scale, "the container's result", problem.dtype)
    if problem.weight.format.container is not None:
        back = FactorizedTensor.from_tensorly(container)
        assert back.format == problem.weight.format
        assert back.shape == problem.weight.shape
        assert back.rank == problem.weight.rank
        declared = back.format.declaration(back.levels)
        for mine, theirs, f in zip(problem.weight.factors, back.factors, declared, strict=True):
            if mine is None:
                assert f.unit
                assert theirs is None or np.all(to_numpy(theirs) == 1)
            else:
                np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


def check_result_kind(problem: Problem) -> None:
    """Leading shape, backend, dtype and device of the inputs are those of the result.

    Parameters
    ----------
    problem : Problem
    """
    dense, matrix = to_dense(problem.weight), _first_expert(problem)
    results = {"multilinear_moe": problem.output(), "to_dense": dense, "expert_matrix": matrix}
    *_, i, o = problem.weight.shape
    shapes = ((*problem.leading, o), problem.weight.shape, (i, o))
    for (name, result), shape in zip(results.items(), shapes, strict=True):
        assert backend_of(result) is backend_of(problem.z), f"{name} changed the backend."
        assert result.dtype == problem.z.dtype, f"{name} is {result.dtype}, not {problem.z.dtype}."
        assert tuple(result.shape) == shape, f"{name} has shape {tuple(result.shape)}, not {shape}."
        if problem.backend != "numpy":
            assert result.device == problem.z.device, f"{name} is on {result.device}, not {problem.z.device}."


def check_linear_in_input(problem: Problem) -> None:
    """Linear in the inputs, affine with a bias.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    z = to_numpy(problem.z)
    inputs = [problem.array(x) for x in (z, generator.standard_normal(z.shape), np.zeros(z.shape))]
    alpha, beta = generator.uniform(-2, 2, 2)
    shares = [alpha, beta, 1 - alpha - beta]
    combined = problem.array(sum(s * to_numpy(x) for s, x in zip(shares, inputs, strict=True)))
    outputs = [problem.output(z=x) for x in inputs]
    if not problem.bias:
        assert not np.any(to_numpy(outputs[-1])), "without a bias, input 0 must give 0."
    _assert_combination(
        problem,
        problem.output(z=combined),
        [(s, y, _magnitude(problem, z=x)) for s, x, y in zip(shares, inputs, outputs, strict=True)],
        "the result for a combination of inputs",
    )


def check_linear_in_coefficients(problem: Problem) -> None:
    """Linear in the coefficients of each level.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    for e, a in enumerate(problem.coefficients):
        arrays = [problem.array(x) for x in (to_numpy(a), generator.standard_normal(a.shape))]
        shares = list(generator.uniform(-2, 2, 2))
        combined = problem.array(sum(s * to_numpy(x) for s, x in zip(shares, arrays, strict=True)))

        def at(x: Array, level: int = e) -> list[Array]:
            return [*problem.coefficients[:level], x, *problem.coefficients[level + 1 :]]

        _assert_combination(
            problem,
            problem.output(coefficients=at(combined)),
            [
                (s, problem.output(coefficients=at(x)), _magnitude(problem, coefficients=at(x)))
                for s, x in zip(shares, arrays, strict=True)
            ],
            f"the result for a combination of coefficients of level {e + 1}",
        )


def check_linear_in_factors(problem: Problem) -> None:
    """Linear in each factor, with the others held.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    for k, factor in enumerate(problem.weight.factors):
        if factor is None:
            continue
        arrays = [problem.array(x) for x in (to_numpy(factor), generator.standard_normal(factor.shape))]
        shares = list(generator.uniform(-2, 2, 2))
        combined = problem.array(sum(s * to_numpy(x) for s, x in zip(shares, arrays, strict=True)))

        def at(x: Array, position: int = k) -> FactorizedTensor:
            factors = list(problem.weight.factors)
            factors[position] = x
            return FactorizedTensor(problem.weight.format, factors)

        _assert_combination(
            problem,
            problem.output(at(combined)),
            [
                (s, problem.output(at(x)), _magnitude(problem, at(x)))
                for s, x in zip(shares, arrays, strict=True)
            ],
            f"the result for a combination of factor {k}",
        )


def check_expert_permutation(problem: Problem) -> None:
    """Experts permuted together with their coefficients give the same result.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    order = {m: generator.permutation(n) for m, n in _sizes(problem.weight).items() if m.startswith("n")}
    order = {m: order[m] for m in mode_names(problem.weight.levels)[:-2]}
    permuted = _transformed(problem, lambda index, values, axis: values.take(order[index], axis), order)
    coefficients = [
        problem.array(to_numpy(a)[..., p]) for a, p in zip(problem.coefficients, order.values(), strict=True)
    ]
    assert_close(
        problem.output(permuted, coefficients=coefficients),
        problem.output(),
        _magnitude(problem),
        "the result with permuted experts",
        problem.dtype,
    )


def check_one_hot(problem: Problem) -> None:
    """One-hot coefficients give the output of one expert, whose matrix and bias `expert_matrix` returns.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    weight = problem.weight
    expert = tuple(int(generator.integers(n)) for n in weight.experts)
    whole, scale = (dense_weight(weight, absolute=absolute)[expert] for absolute in (False, True))
    assert_close(expert_matrix(weight, expert), whole, scale, f"the matrix of expert {expert}", problem.dtype)
    z = to_numpy(problem.z)
    expected = z @ (whole[:-1] if problem.bias else whole)
    if problem.bias:
        matrix, bias = expert_matrix(weight, expert, bias=True)
        assert_close(matrix, whole[:-1], scale[:-1], f"the matrix of expert {expert}", problem.dtype)
        assert_close(bias, whole[-1], scale[-1], f"the bias of expert {expert}", problem.dtype)
        expected = expected + whole[-1]
    one_hot = [
        problem.array(np.broadcast_to(np.eye(n)[k], (*problem.leading, n)))
        for n, k in zip(weight.experts, expert, strict=True)
    ]
    assert_close(
        problem.output(coefficients=one_hot),
        expected,
        _magnitude(problem, coefficients=one_hot),
        f"the result for expert {expert} alone",
        problem.dtype,
    )


def check_gauge(problem: Problem) -> None:
    """What the tensor does not depend on: a basis for each bond of two factors, a scale for any bond.

    A matrix and its inverse inserted into a bond that joins two factors change nothing (the basis of
    Tucker's factors, the cores of a ring); nor do the entries of any bond, permuted in all its factors, and
    scaled in one and unscaled in another (the components of CP).

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    format, levels = problem.weight.format, problem.weight.levels
    size = _sizes(problem.weight)
    declared = format.declaration(levels)
    for bond in format.bonds(levels):
        holders = [
            k
            for k, (f, factor) in enumerate(zip(declared, problem.weight.factors, strict=True))
            if factor is not None and bond in f.indices
        ]
        order = generator.permutation(size[bond])
        matrix = np.diag(generator.choice([-1, 1], size[bond]) * generator.uniform(0.5, 2, size[bond]))[order]
        if len(holders) == 2:
            matrix = np.linalg.qr(generator.standard_normal(matrix.shape))[0] @ matrix
        first, second, *_ = generator.permutation(holders).tolist()
        changes = dict.fromkeys(holders, np.eye(size[bond])[order])
        changes |= {first: matrix, second: np.linalg.inv(matrix).T}
        # The rounding errors of the changed factors are relative to the terms of each entry.
        factors, bound = list(problem.weight.factors), list(problem.weight.factors)
        for k, change in changes.items():
            axis = declared[k].indices.index(bond)
            values = np.moveaxis(to_numpy(factors[k]), axis, -1)
            factors[k] = problem.array(np.moveaxis(values @ change, -1, axis))
            bound[k] = problem.array(np.moveaxis(abs(values) @ abs(change), -1, axis))
        assert_close(
            problem.output(FactorizedTensor(format, factors)),
            problem.output(),
            _magnitude(problem, FactorizedTensor(format, bound)),
            f"the result after a change of basis of {bond}",
            problem.dtype,
        )


def check_level_of_one(problem: Problem) -> None:
    """A level with a single expert and coefficient 1 changes nothing.

    The weight is cut to the first expert of a level; the result is that of its dense tensor without the
    level.

    Parameters
    ----------
    problem : Problem
    """
    for e in range(problem.weight.levels):
        mode = mode_names(problem.weight.levels)[e]
        single = _transformed(problem, lambda index, values, axis: values.take([0], axis), [mode])
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


def check_gradients(problem: Problem) -> None:
    """Gradients in every factor, the input and all coefficients equal those of the dense formula.

    With PyTorch in float64 also finite differences (`torch.autograd.gradcheck`). NumPy has none to check.

    Parameters
    ----------
    problem : Problem
    """
    if problem.backend == "pytorch":
        _check_torch_gradients(problem)
    elif problem.backend == "jax":
        _check_jax_gradients(problem)


def check_paths(problem: Problem) -> None:
    """Every way to contract gives the same result.

    All combinations of what to minimise, implementation and folded constants, planned for some batch and
    bound to the weight, and pairwise orders at random.

    Parameters
    ----------
    problem : Problem
    """
    generator = problem.generator()
    expected = dense_moe(dense_weight(problem.weight), *_inputs(problem), bias=problem.bias)
    scale = _magnitude(problem)
    network = _network(problem)
    batches = (1, max(1, prod(problem.leading)), 65_536)
    choices: list[tuple[Any, Any, Any]] = list(
        product(("time", "flops", "peak"), ("factorized", "reconstructed", "auto"), (None, "weights"))
    )
    if problem.backend == "jax":  # which compiles every operation: a few of them will do
        choices = [choices[k] for k in generator.choice(len(choices), 3, replace=False)]
    for minimize, implementation, constants in choices:
        batch = int(generator.choice(batches))
        plan = plan_network(network, batch, minimize, implementation, None, constants)
        what = f"{minimize=}, {implementation=}, {constants=}, {batch=}: the result"
        result = problem.output(plan=plan)
        assert_close(result, expected, scale, what, problem.dtype)
        bound = bind(plan, problem.weight, bias=problem.bias)
        for _ in range(2):
            assert_close(
                bound(problem.z, problem.coefficients), expected, scale, f"{what} of bind", problem.dtype
            )
    batch = prod(problem.leading)
    vectors = [x.reshape(batch, x.shape[-1]) for x in (*problem.coefficients, problem.z)]
    for _ in range(2 if problem.backend == "jax" else 5):
        tree = random_tree(network, generator)
        program = Compiler(network, int(generator.choice(batches)))(tree)
        result = execute(program, [*problem.weight.arrays, *vectors], backend_of(problem.z))
        assert_close(
            result, expected.reshape(result.shape), scale.reshape(result.shape), f"order {tree}: the result"
        )


def check_plan(problem: Problem) -> None:
    """Plans keep what they promise.

    Steps are pairwise; ``"factorized"`` forms no intermediate with all experts, the input and the output;
    ``"auto"`` takes the cheaper way; ``"time"`` spends at most 5 % more FLOPs than ``"flops"``; no plan costs
    more than the format's closed form.

    Parameters
    ----------
    problem : Problem
    """
    network = _network(problem)
    batch = max(1, prod(problem.leading))
    operands = len(network.operands)
    every = {*mode_names(problem.weight.levels)}
    least = {}
    for implementation in ("factorized", "reconstructed", "auto"):
        plan = plan_network(network, batch, "flops", implementation)
        least[implementation] = plan.flops
        assert len(plan.steps) == operands - 1, "n operands take n - 1 pairwise steps."
        if plan.implementation == "factorized":
            for step in plan.steps[:-1]:
                formed = step.equation.partition(" -> ")[2].split()
                assert not every <= set(formed), f"{step.equation} forms the weight tensor."
        timed = plan_network(network, batch, "time", implementation)
        assert plan.flops <= timed.flops <= 1.05 * plan.flops, "the default may spend 5 % more FLOPs."
    assert least["auto"] == min(least["factorized"], least["reconstructed"])
    closed = problem.weight.format.reference_flops(problem.weight.shape, problem.weight.rank)
    if closed is not None and problem.weight.ones == problem.weight.format.units(problem.weight.levels):
        assert min(least.values()) <= closed * batch, "a plan must not cost more than the closed form."


def check_declaration(format: str | Format) -> None:
    """A declaration is a tensor network, the same each time, and has a default rank.

    Parameters
    ----------
    format : str or Format

    Raises
    ------
    ValueError, TypeError
        If the declaration is refused; see `register`.
    AssertionError
        If anything else does not hold.
    """
    format = get_format(format)
    for levels in range(MOST_LEVELS + 1):
        modes, bonds = mode_names(levels), format.bonds(levels)
        declared = format.declaration(levels)
        mode_sizes = tuple(range(2, 2 + len(modes)))
        assert len(format.shapes(mode_sizes, (2,) * len(bonds))) == len(declared)
        default = format.default_rank(mode_sizes, 1)
        assert format.check_rank(default, levels) == default
        assert tuple(format.factors(modes)) == declared, f"{format!r} declares other factors each time."


#: All checks of a problem by their name.
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


#: Checks that take longest, and what share of the examples they get.
SHARES = {"check_paths": 4, "check_gradients": 2}


def run_check(
    check: Callable[[Problem], None],
    format: str | Format | None = None,
    *,
    backend: str = "numpy",
    share: int = 1,
) -> None:
    """Run one check on problems that Hypothesis draws, as many as its profile says.

    Parameters
    ----------
    check : callable
        A function of one `Problem`; see ``CHECKS``.
    format : str or Format, optional
        All registered formats by default.
    backend : {"numpy", "pytorch", "jax"}, default "numpy"
    share : int, default 1
        Divides the number of examples. The slowest checks divide it further, and so does JAX, which
        compiles each operation for each shape.

    Raises
    ------
    AssertionError
        If the property does not hold; Hypothesis reports the smallest problem it found.
    """
    divisor = share * SHARES.get(check.__name__, 1) * (10 if backend == "jax" else 1)

    def run(problem: Problem) -> None:
        note(f"To see it again:\n\n{pasteable(check, problem)}\n")
        check(problem)

    # Hypothesis tells tests apart, and remembers what failed, by their names.
    name = "any" if format is None else get_format(format).name
    run.__name__ = run.__qualname__ = re.sub(r"\W", "_", f"{check.__name__}_{name}_{backend}")
    options = settings(
        max_examples=max(2, settings().max_examples // divisor),
        # JAX compiles, and checks of many sizes take long: that is no fault of the format.
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with jax_float64() if backend == "jax" else nullcontext():
        options(given(problems(format, backend=backend))(run))()


def pasteable(check: Callable[[Problem], None], problem: Problem) -> str:
    """Lines that run a check on a problem again.

    Parameters
    ----------
    check : callable
    problem : Problem
    """
    format = type(get_format(problem.format))
    lines = ["from mumoe_tensor.testing import Problem, jax_float64"]
    # (What is defined within a function cannot be imported.)
    objects = [x for x in (check, format) if "<" not in x.__qualname__]
    lines += [f"from {x.__module__} import {x.__qualname__}" for x in objects]
    call = f"{check.__name__}({problem!r})"
    return "\n".join([*lines, "", f"with jax_float64():\n    {call}" if problem.backend == "jax" else call])


def check_format(format: str | Format) -> None:
    """Run every check on a format, over levels, sizes, ranks, dtypes and all backends that are installed.

    The number of problems follows the Hypothesis profile in use. It takes about half a minute with the
    default one.

    Parameters
    ----------
    format : str or Format
        A registered name, or an instance of a format of one's own, registered or not.

    Raises
    ------
    AssertionError
        If a property does not hold; Hypothesis reports the smallest problem it found.

    Examples
    --------
    >>> from mumoe_tensor.testing import check_format
    >>> check_format("cp")  # doctest: +SKIP
    """
    format = get_format(format)
    check_declaration(format)
    for check in CHECKS.values():
        for backend in installed_backends():
            run_check(check, format, backend=backend, share=4)


def random_tree(network: Network, generator: np.random.Generator) -> Tree:
    """Draw a pairwise order of contraction of a network.

    With a bias the input vector meets all weights of the input mode at once, as the executor asks.
    """
    nodes: list[tuple[Tree, frozenset[int]]] = [(k, frozenset([k])) for k in range(len(network.operands))]
    vector = network.vector_of_input if network.bias else None
    with_input = {k for k in range(network.weights) if "i" in network.operands[k]}
    while len(nodes) > 1:
        first, second = (int(k) for k in generator.choice(len(nodes), 2, replace=False))
        (left, has), (right, adds) = nodes[first], nodes[second]
        if (left == vector and not with_input <= adds) or (right == vector and not with_input <= has):
            continue
        nodes = [node for k, node in enumerate(nodes) if k not in (first, second)]
        nodes.append(((left, right), has | adds))
    return nodes[0][0]


# ---- helpers ---------------------------------------------------------------------------------------


def _inputs(problem: Problem) -> tuple[Float64, list[Float64]]:
    return to_numpy(problem.z), [to_numpy(a) for a in problem.coefficients]


def _magnitude(
    problem: Problem,
    weight: FactorizedTensor | None = None,
    *,
    z: Array = None,
    coefficients: list[Array] | None = None,
) -> Float64:
    return magnitude(
        problem.weight if weight is None else weight,
        problem.z if z is None else z,
        problem.coefficients if coefficients is None else coefficients,
        bias=problem.bias,
    )


def _assert_combination(
    problem: Problem, actual: Array, terms: list[tuple[float, Array, Float64]], what: str
) -> None:
    """Assert that a result is the sum of (share, result, magnitude) terms."""
    expected = sum(share * to_numpy(y) for share, y, _ in terms)
    scale = sum(abs(share) * size for share, _, size in terms)
    assert_close(actual, expected, scale, what, problem.dtype)


def _sizes(weight: FactorizedTensor) -> dict[str, int]:
    return weight.format.sizes(weight.shape, weight.rank)


def _network(problem: Problem) -> Network:
    weight = problem.weight
    return forward_network(weight.format, weight.shape, weight.rank, weight.ones, problem.bias)


def _first_expert(problem: Problem) -> Array:
    return expert_matrix(problem.weight, (0,) * problem.weight.levels)


def _transformed(
    problem: Problem, transform: Callable[[str, Float64, int], Float64], indices: Any
) -> FactorizedTensor:
    """The weight with every axis that belongs to one of the indices transformed."""
    weight = problem.weight
    factors: list[Array | None] = []
    for f, factor in zip(weight.format.declaration(weight.levels), weight.factors, strict=True):
        if factor is not None:
            values = to_numpy(factor)
            for axis, index in enumerate(f.indices):
                values = transform(index, values, axis) if index in indices else values
            factor = problem.array(values)
        factors.append(factor)
    return FactorizedTensor(weight.format, factors)


def _dense_formula(problem: Problem, einsum: Callable, ones: Callable, concat: Callable) -> Callable:
    """The forward pass from the dense tensor as a function of (held factors..., coefficients..., z)."""
    weight, bias = problem.weight, problem.bias
    size, declared = _sizes(weight), weight.format.declaration(weight.levels)
    factor_letters, whole = subscripts(weight.format, weight.levels)
    *attached, o = list(whole)
    joined = ",".join([whole, *(f"Z{x}" for x in attached)])
    shapes = [tuple(size[x] for x in f.indices) for f in declared]

    def formula(*arrays: Array) -> Array:
        held: Iterator[Array] = iter(arrays)
        factors = [ones(s) if k in weight.ones else next(held) for k, s in enumerate(shapes)]
        *coefficients, z = held
        tensor = einsum(f"{','.join(factor_letters)}->{whole}", *factors)
        if bias:
            z = concat([z, ones((*z.shape[:-1], 1))])
        vectors = [x.reshape(-1, x.shape[-1]) if x.shape[-1] else x for x in (*coefficients, z)]
        return einsum(f"{joined}->Z{o}", tensor, *vectors).reshape(*z.shape[:-1], tensor.shape[-1])

    return formula


def _forward(problem: Problem) -> Callable:
    """The library's forward pass as a function of (held factors..., coefficients..., z)."""

    def forward(*arrays: Array) -> Array:
        held = iter(arrays)
        factors = [None if factor is None else next(held) for factor in problem.weight.factors]
        *coefficients, z = held
        return multilinear_moe(
            FactorizedTensor(problem.weight.format, factors), z, coefficients, bias=problem.bias
        )

    return forward


def _check_torch_gradients(problem: Problem) -> None:
    import torch

    def ones(shape: tuple[int, ...], like: torch.Tensor = problem.z) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float64)

    arrays = [*problem.weight.arrays, *problem.coefficients, problem.z]
    leaves = [x.detach().clone().requires_grad_() for x in arrays]
    y = _forward(problem)(*leaves)
    cotangent = torch.from_numpy(problem.generator().standard_normal(tuple(y.shape))).to(y.dtype)
    found = torch.autograd.grad(y, leaves, cotangent)

    formula = _dense_formula(problem, torch.einsum, ones, lambda parts: torch.cat(parts, -1))

    def gradients(absolute: bool) -> tuple[torch.Tensor, ...]:
        doubles = [x.detach().double() for x in (*arrays, cotangent)]
        *inputs, direction = [x.abs() if absolute else x for x in doubles]
        inputs = [x.requires_grad_() for x in inputs]
        return torch.autograd.grad(formula(*inputs), inputs, direction)

    for k, (mine, expected, scale) in enumerate(zip(found, gradients(False), gradients(True), strict=True)):
        assert_close(mine, expected, to_numpy(scale), f"the gradient of argument {k}", problem.dtype)
    if problem.dtype == "float64" and y.numel():
        assert torch.autograd.gradcheck(_forward(problem), leaves, eps=1e-6, atol=1e-5, rtol=1e-5)


def _check_jax_gradients(problem: Problem) -> None:
    import jax
    import jax.numpy as jnp

    def ones(shape: tuple[int, ...]) -> jax.Array:
        return jnp.ones(shape, problem.z.dtype)

    def concat(parts: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts, -1)

    arrays = [*problem.weight.arrays, *problem.coefficients, problem.z]
    formula = _dense_formula(problem, jnp.einsum, ones, concat)
    shape = (*problem.leading, problem.weight.shape[-1])
    cotangent = problem.array(problem.generator().standard_normal(shape))

    def gradients(function: Callable, inputs: list[jax.Array], direction: jax.Array) -> Any:
        return jax.jit(lambda inputs, direction: jax.vjp(function, *inputs)[1](direction))(inputs, direction)

    found = gradients(_forward(problem), arrays, cotangent)
    expected = gradients(formula, arrays, cotangent)
    scales = gradients(formula, [abs(x) for x in arrays], abs(cotangent))
    for k, (mine, theirs, scale) in enumerate(zip(found, expected, scales, strict=True)):
        assert_close(mine, theirs, to_numpy(scale), f"the gradient of argument {k}", problem.dtype)
