"""Registers `.FactorizedTensor` with JAX: import this module to use jit, grad and vmap over weights."""

from __future__ import annotations

from typing import Any

import jax

from mumoe_tensor.formats.base import Format
from mumoe_tensor.tensors import FactorizedTensor


def _flatten(weight: FactorizedTensor) -> tuple[tuple[Any, ...], Format]:
    return weight.factors, weight.format


def _unflatten(format: Format, factors: tuple[Any, ...]) -> FactorizedTensor:
    try:
        return FactorizedTensor(format, factors)
    except (TypeError, ValueError):
        # JAX also builds trees whose leaves make no weight: placeholders, stacks to map over.
        weight = object.__new__(FactorizedTensor)
        weight.format, weight.factors = format, tuple(factors)
        weight.arrays = tuple(factor for factor in factors if factor is not None)
        return weight


jax.tree_util.register_pytree_node(FactorizedTensor, _flatten, _unflatten)
