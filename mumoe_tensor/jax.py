"""Register `.FactorizedTensor` with JAX: import this module to use jit, grad and vmap on weights."""

from __future__ import annotations

from typing import Any

import jax

from mumoe_tensor.formats.base import Format
from mumoe_tensor.tensors import FactorizedTensor

#: Format, and the shape or None if it follows from the factors.
Kind = tuple[Format, tuple[int, ...] | None]


def _flatten(weight: FactorizedTensor) -> tuple[tuple[Any, ...], Kind]:
    return weight.factors, (weight.format, weight.asked)


def _unflatten(kind: Kind, factors: tuple[Any, ...]) -> FactorizedTensor:
    format, shape = kind
    try:
        return FactorizedTensor(format, factors, shape)
    except (TypeError, ValueError):
        # JAX also builds trees whose leaves are not a valid weight, such as placeholders and batched arrays.
        weight = object.__new__(FactorizedTensor)
        weight.format, weight.factors, weight.asked = format, tuple(factors), shape
        weight.arrays = tuple(factor for factor in factors if factor is not None)
        return weight


jax.tree_util.register_pytree_node(FactorizedTensor, _flatten, _unflatten)
