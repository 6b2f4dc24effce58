"""Factorized weights: a format and the arrays of its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Unpack

import numpy as np

from mumoe_tensor.backend import (
    Array,
    backend_of,
    cast,
    check_floating,
    context_of,
    dtype_name,
    is_array,
    tensorly_backend,
)
from mumoe_tensor.formats.base import MOST_LEVELS, Factor, Format, mode_names
from mumoe_tensor.formats.registry import formats, get_format, label
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec


class FactorizedTensor:
    """A weight tensor of shape (experts..., input, output), as the factors of a format.

    Parameters
    ----------
    format : str or Format
        A registered name, or a format that need not be registered.
    factors : sequence of array or None
        In the order of the declaration, their axes too. None stands for a factor of all ones; an optional
        factor (the weights of CP) may also be left out.

    Attributes
    ----------
    format : Format
    factors : tuple of array or None
        All declared factors, None for those that are missing.
    arrays : tuple of array
        The factors that are not missing.
    missing : tuple of int
        Positions of the missing factors, which stand for ones.
    num_levels : int
        Number of levels of experts.

    Raises
    ------
    ValueError, TypeError
        If the factors are not as declared, or differ in backend, device, dtype or the size of an index.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> mt.FactorizedTensor("hadamard", [np.ones((4, 5)), np.ones((3, 5))])
    FactorizedTensor('hadamard', shape=(4, 3, 5), rank=(), float64, numpy)
    """

    __slots__ = ("arrays", "factors", "format", "missing", "num_levels", "rank", "shape")

    def __init__(self, format: str | Format, factors: Sequence[Array | None]):
        self.format = get_format(format)
        if not isinstance(factors, (list, tuple)):
            raise TypeError(f"factors must be a list or a tuple of arrays, got {type(factors).__name__}.")
        self.num_levels, self.factors = _match(self.format, factors)
        arrays = {k: factor for k, factor in enumerate(self.factors) if factor is not None}
        self.arrays = tuple(arrays.values())
        self.missing = tuple(sorted(set(range(len(self.factors))).difference(arrays)))
        index_sizes = _index_sizes(self.format, self.num_levels, arrays)
        self.shape = tuple(index_sizes[m] for m in mode_names(self.num_levels))
        self.rank = tuple(index_sizes[b] for b in self.format.bonds(self.num_levels))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a FactorizedTensor has no attribute {name!r}: it holds factors, and to_dense makes a tensor of "
            "them."
        )

    @property
    def dtype(self) -> Any:
        """The dtype of the factors, as their backend has it."""
        return self.arrays[0].dtype

    @property
    def device(self) -> Any:
        """The device of the factors, as their backend has it."""
        return self.arrays[0].device

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each level."""
        return self.shape[:-2]

    @classmethod
    def from_tensorly(cls, container: Any) -> FactorizedTensor:
        """The weight of a `CPTensor`, `TuckerTensor`, `TRTensor` or `TTTensor`, its arrays shared."""
        names = {base.__name__ for base in type(container).__mro__}
        for format in formats().values():
            if format.container in names:
                factors = list(format.from_container(container))
                num_levels, _ = _match(format, factors)
                for k in format.optional(num_levels):
                    # TensorLy makes weights of one in its default dtype, whatever the factors have.
                    if factors[k] is not None:
                        factors[k] = cast(factors[k], dtype_name(factors[-1]))
                return cls(format, factors)
        raise TypeError(
            "a weight is a FactorizedTensor, a container of TensorLy or a plain array, "
            f"got {type(container).__name__}."
        )

    def to_tensorly(self) -> Any:
        """TensorLy's container of the weight; of a dense one its array.

        Hadamard becomes a `CPTensor` whose output factor is the identity. A format without a container is a
        TypeError.
        """
        with tensorly_backend(backend_of(*self.arrays).backend_name) as tl:
            return self.format.to_container(self.factors, tl)

    @classmethod
    def random(
        cls,
        format: str | Format | LayerSpec,
        *,
        like: Array | None = None,
        seed: int | None = None,
        **sizes: Unpack[Sizes],
    ) -> FactorizedTensor:
        """Draw a weight with normal factors, scaled so that its entries have variance 1 / in_features.

        Parameters
        ----------
        format : str, Format or LayerSpec
            A single layer, such as one of the `layers` of a block: its spec, or its format with `sizes`.
        like : array, optional
            The factors take its backend, dtype and device. NumPy's float64 by default.
        seed : int, optional
        **sizes
            The arguments of a `LayerSpec`, unless `format` is one.
        """
        spec = as_spec(format, **sizes)
        index_sizes = spec.format.index_sizes(spec.mode_sizes, spec.full_rank)
        like = np.empty(0) if like is None else like
        check_floating({"like": like})
        generator = np.random.default_rng(seed)
        declared = spec.format.declaration(spec.num_levels)
        # An entry is a sum over the bonds of products of independent factors: variances multiply and add.
        terms = prod(index_sizes[b] for b in spec.format.bonds(spec.num_levels))
        scale = (1 / (spec.in_features * terms)) ** (0.5 / sum(not f.optional for f in declared))

        def factor(f: Factor) -> Array:
            shape = [index_sizes[x] for x in f.memory_order]
            return as_factor(scale * generator.standard_normal(shape), f, like)

        return cls(spec.format, [None if f.optional else factor(f) for f in declared])

    def __repr__(self) -> str:
        if not hasattr(self, "shape"):  # a tree of JAX, whose leaves may be anything
            factors = ", ".join(map(_described, self.factors))
            return f"FactorizedTensor({label(self.format)!r}, factors=({factors}))"
        kind = f"{dtype_name(self.arrays[0])}, {backend_of(*self.arrays).backend_name}"
        return f"FactorizedTensor({label(self.format)!r}, shape={self.shape}, rank={self.rank}, {kind})"


def _described(factor: Any) -> str:
    return f"{type(factor).__name__}{tuple(factor.shape)}" if hasattr(factor, "shape") else repr(factor)


def as_factor(values: Any, f: Factor, like: Array) -> Array:
    """An array of the kind of `like` for a factor, from NumPy's values with axes in its memory order."""
    tl = backend_of(like)
    array = tl.tensor(np.ascontiguousarray(values), **context_of(like, tl))
    return tl.transpose(array, [f.memory_order.index(x) for x in f.indices])


def as_factorized(weight: Any) -> FactorizedTensor:
    """A weight in any form as a `FactorizedTensor`; a dense array becomes format ``dense``."""
    if isinstance(weight, FactorizedTensor):
        return weight
    if is_array(weight):
        return FactorizedTensor("dense", [weight])
    return FactorizedTensor.from_tensorly(weight)


def _match(format: Format, factors: Sequence[Any]) -> tuple[int, tuple[Any, ...]]:
    """The number of levels whose declaration the factors fit, and all of them, None for missing ones."""
    if arrays := [factor for factor in factors if factor is not None]:
        backend_of(*arrays)
    for num_levels in range(MOST_LEVELS + 1):
        declared = format.declaration(num_levels)
        optional = [k for k, f in enumerate(declared) if f.optional]
        filled = list(factors)
        if len(filled) == len(declared) - len(optional):
            for k in optional:
                filled.insert(k, None)
        if len(filled) == len(declared) and all(
            factor is None or len(factor.shape) == len(f.indices)
            for factor, f in zip(filled, declared, strict=True)
        ):
            return num_levels, tuple(filled)
    expected = " | ".join(" ".join(f.indices) for f in format.declaration(1))
    shapes = ", ".join("None" if factor is None else str(tuple(factor.shape)) for factor in factors)
    raise ValueError(
        f"the factors of format {format.name!r} are {expected} (for one level of experts), got arrays of "
        f"shapes {shapes or 'none'}."
    )


def _index_sizes(format: Format, num_levels: int, arrays: Mapping[int, Array]) -> dict[str, int]:
    """Size of every index, checked to be the same wherever it occurs, from the factors by their position."""
    if arrays:
        check_floating({f"factor[{k}]": factor for k, factor in arrays.items()})
    indices = [f.indices for f in format.declaration(num_levels)]
    sizes: dict[str, int] = {}
    for k, factor in arrays.items():
        for index, size in zip(indices[k], factor.shape, strict=True):
            if size == 0:
                raise ValueError(f"every size must be positive, factor[{k}] has shape {tuple(factor.shape)}.")
            if sizes.setdefault(index, size) != size:
                first = next(j for j in arrays if index in indices[j])
                raise ValueError(
                    f"factors that share an index must agree in its size; {index!r} has size "
                    f"{sizes[index]} in factor[{first}] and {size} in factor[{k}]."
                )
    modes = mode_names(num_levels)
    for k in set(range(len(indices))).difference(arrays):
        for x in indices[k]:
            if [x in indices[j] for j in arrays].count(True) < (1 if x in modes else 2):
                raise ValueError(
                    "a factor may be None only where others have its modes, and its bonds still join two of "
                    f"them; factor[{k}] of format {format.name!r} has {x!r}."
                )
    return sizes
