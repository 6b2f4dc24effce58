"""Gradients of the forward pass, compared with gradients of the dense formula in PyTorch or JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from string import ascii_lowercase
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array
from mumoe_tensor.multilinear import multilinear_moe
from mumoe_tensor.tensors import FactorizedTensor
from mumoe_tensor.testing.oracle import assert_close, sum_of_terms, to_numpy
from mumoe_tensor.testing.strategies import Problem

Function = Callable[..., Any]


def check_gradients(problem: Problem) -> None:
    """Gradients of every factor, the input and all coefficients equal the gradients of the dense formula.

    With PyTorch in float64 they are also compared with finite differences (`torch.autograd.gradcheck`). NumPy
    has no gradients.
    """
    if problem.backend == "pytorch":
        _check_torch(problem)
    elif problem.backend == "jax":
        _check_jax(problem)


def _arguments(problem: Problem) -> list[Array]:
    """The arguments of the derivatives: factors that are not missing, coefficients, inputs."""
    return [*problem.weight.arrays, *problem.coefficients, problem.z]


def _forward(problem: Problem) -> Function:
    """The library's forward pass as a function of `_arguments`."""

    def forward(*arrays: Array) -> Array:
        remaining = iter(arrays)
        factors = [None if factor is None else next(remaining) for factor in problem.weight.factors]
        *coefficients, z = remaining
        weight = FactorizedTensor(problem.weight.format, factors, problem.weight.asked)
        return multilinear_moe(weight, z, coefficients, bias=problem.layer.bias)

    return forward


def _dense_formula(problem: Problem, einsum: Function, array: Function, concat: Function) -> Function:
    """The forward pass from the dense tensor as a function of `_arguments`."""
    weight, bias = problem.weight, problem.layer.bias
    whole = ascii_lowercase[: len(weight.shape)]
    joined = ",".join([whole, *(f"Z{x}" for x in whole[:-1])])
    shapes = weight.format.shapes(weight.shape, weight.rank)

    def formula(*arrays: Array) -> Array:
        remaining: Iterator[Array] = iter(arrays)
        factors = [
            array(np.ones(s)) if k in weight.missing else next(remaining) for k, s in enumerate(shapes)
        ]
        *coefficients, z = remaining
        tensor = sum_of_terms(weight, factors, einsum, array)
        if bias:
            z = concat([z, array(np.ones((*z.shape[:-1], 1)))])
        vectors = [x.reshape(-1, x.shape[-1]) if x.shape[-1] else x for x in (*coefficients, z)]
        return einsum(f"{joined}->Z{whole[-1]}", tensor, *vectors).reshape(*z.shape[:-1], tensor.shape[-1])

    return formula


def _check_torch(problem: Problem) -> None:
    import torch

    arrays = _arguments(problem)
    leaves = [x.detach().clone().requires_grad_() for x in arrays]
    y = _forward(problem)(*leaves)
    cotangent = torch.from_numpy(problem.generator().standard_normal(tuple(y.shape))).to(y.dtype)
    actual = torch.autograd.grad(y, leaves, cotangent)

    formula = _dense_formula(problem, torch.einsum, torch.from_numpy, lambda parts: torch.cat(parts, -1))

    def gradients(absolute: bool) -> tuple[torch.Tensor, ...]:
        doubles = [x.detach().double() for x in (*arrays, cotangent)]
        *inputs, direction = [x.abs() if absolute else x for x in doubles]
        inputs = [x.requires_grad_() for x in inputs]
        return torch.autograd.grad(formula(*inputs), inputs, direction)

    _assert_gradients_close(problem, actual, gradients(False), gradients(True))
    if problem.dtype == "float64" and y.numel():
        assert torch.autograd.gradcheck(_forward(problem), leaves, eps=1e-6, atol=1e-5, rtol=1e-5)


def _check_jax(problem: Problem) -> None:
    import jax
    import jax.numpy as jnp

    def concat(parts: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts, -1)

    arrays = _arguments(problem)
    formula = _dense_formula(problem, jnp.einsum, problem.array, concat)
    shape = (*problem.leading, problem.layer.out_features)
    cotangent = problem.array(problem.generator().standard_normal(shape))

    def gradients(function: Function, inputs: list[jax.Array], direction: jax.Array) -> Any:
        return jax.jit(lambda inputs, direction: jax.vjp(function, *inputs)[1](direction))(inputs, direction)

    actual = gradients(_forward(problem), arrays, cotangent)
    expected = gradients(formula, arrays, cotangent)
    scales = gradients(formula, [abs(x) for x in arrays], abs(cotangent))
    _assert_gradients_close(problem, actual, expected, scales)


def _assert_gradients_close(problem: Problem, actual: Any, expected: Any, scales: Any) -> None:
    for k, (ours, dense, scale) in enumerate(zip(actual, expected, scales, strict=True)):
        assert_close(ours, dense, to_numpy(scale), f"the gradient of argument {k}", problem.dtype)
