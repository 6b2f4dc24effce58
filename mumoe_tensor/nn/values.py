"""Copying the values of a weight to the factors of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.backend import to_float64
from mumoe_tensor.formats.base import Format, Rank, mode_names
from mumoe_tensor.nn.init import declared, index_sizes
from mumoe_tensor.tensors import FactorizedTensor


@torch.no_grad()
def copy_weight(weight: FactorizedTensor, target: FactorizedTensor) -> None:
    """Copy a weight of any backend to the weight of a layer; raises a ValueError if it does not fit."""
    got, expected = _outline(weight), _outline(target)
    if got != expected:
        raise ValueError(
            "the weight of these experts must have (format, shape, rank) "
            f"{', '.join(map(str, expected))}, including bias rows; got {', '.join(map(str, got))}."
        )
    factors = [factor for place in target.terms for factor in place.factors]
    values = [value for term in weight.terms for value in _values_of(term)]
    # All values are computed before the first is copied, since some may be views of the factors.
    copies = [(x, _like(x, value)) for x, value in zip(factors, values, strict=True) if x is not None]
    for factor, value in copies:
        factor.copy_(value)


def _like(factor: Tensor, value: Tensor) -> Tensor:
    """A copy of values with the shape, dtype, device and sharding of a factor."""
    value = value.to(factor.device, factor.dtype, copy=True).expand(factor.shape)
    if is_distributed(factor):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(factor, DTensor)
        return distribute_tensor(value, factor.device_mesh, factor.placements)
    return value


def _outline(weight: FactorizedTensor) -> list[tuple[Format, tuple[int, ...], Rank]]:
    """Format, shape and rank of each term; the format includes the sizes of its parts, even if default."""
    outline = []
    for term in weight.terms:
        sizes, parts = index_sizes(term), {x: term.format.parts(x) for x in mode_names(term.num_levels)}
        splits = {x: [sizes[part] for part in p] for x, p in parts.items() if p != (x,) and {*p} <= {*sizes}}
        outline.append((term.format.with_splits(splits), term.shape, term.rank))
    return outline


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is divided over processes, as by FSDP2."""
    return hasattr(tensor, "placements")


def _values_of(term: FactorizedTensor) -> list[Tensor]:
    """The factors of a term, with ones for missing factors.

    Optional factors, which layers do not have, are multiplied into the first factor with the same axes.
    """
    values = [
        torch.ones(())
        if factor is None
        else factor.detach()
        if isinstance(factor, Tensor)
        else torch.from_numpy(to_float64(factor))
        for factor in term.factors
    ]
    indices = [f.indices for f in declared(term)]
    for k, f in enumerate(declared(term)):
        if f.optional and term.factors[k] is not None:
            j = next(j for j, other in enumerate(indices) if j != k and set(f.indices) <= set(other))
            weights = values[k].permute([f.indices.index(x) for x in indices[j] if x in f.indices])
            weights = weights[tuple(slice(None) if x in f.indices else None for x in indices[j])]
            values[j] = values[j].to(torch.promote_types(weights.dtype, torch.float32)) * weights
    return values
