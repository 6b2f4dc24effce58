"""Factorized weights: a format and the arrays of its factors."""

from __future__ import annotations

from collections.abc import Sequence
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
from mumoe_tensor.formats.base import Factor
from mumoe_tensor.formats.registry import AnyFormat, formats, get_format, label
from mumoe_tensor.matching import levels_of, match
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec, most_of_an_expert


class FactorizedTensor:
    """A weight tensor of shape (experts..., input, output), represented by the factors of a format.

    Parameters
    ----------
    format : str, dict or Format
        The name of a registered format, a dict with its name and settings, or a format, registered or not.
    factors : sequence of array or None
        The factors, in the order of the declaration, with their axes in the declared order. None stands for a
        factor of all ones; an optional factor (the weights of CP) may also be omitted.
    shape : tuple of int, optional
        Shape of the weight, if it does not follow from the factors: if a mode is padded, or no factor has all
        entries of an expert mode.

    Attributes
    ----------
    format : Format
        The format, with the splits of the factors.
    factors : tuple of array or None
        All declared factors, None for missing ones.
    arrays : tuple of array
        The factors that are not missing.
    missing : tuple of int
        Positions of the missing factors, which are treated as all ones.
    num_levels : int
        Number of levels of experts.

    Raises
    ------
    ValueError, TypeError
        If the factors do not fit the declaration, or differ in backend, device, dtype or the size of an
        index.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> mt.FactorizedTensor("hadamard", [np.ones((4, 5)), np.ones((3, 5))])
    FactorizedTensor('hadamard', shape=(4, 3, 5), rank=(), float64, numpy)
    """

    __slots__ = ("arrays", "asked", "factors", "format", "missing", "num_levels", "rank", "shape")

    def __init__(
        self,
        format: AnyFormat,
        factors: Sequence[Array | None],
        shape: Sequence[int] | None = None,
    ):
        format = get_format(format)
        if not isinstance(factors, (list, tuple)):
            raise TypeError(f"factors must be a list or a tuple of arrays, got {type(factors).__name__}.")
        self.format, self.factors, self.shape, self.rank, self.asked = match(format, factors, shape)
        self.num_levels = len(self.shape) - 2
        arrays = {k: factor for k, factor in enumerate(self.factors) if factor is not None}
        self.arrays = tuple(arrays.values())
        self.missing = tuple(sorted(set(range(len(self.factors))).difference(arrays)))

    @property
    def terms(self) -> tuple[FactorizedTensor, ...]:
        """The terms of a sum, which share its arrays; a weight that is not a sum returns itself."""
        if self.format.is_plain:
            return (self,)
        terms = self.format.terms(self.shape, self.rank)
        if terms[0].format is self.format:
            return (self,)
        return tuple(
            FactorizedTensor(term.format, self.factors[term.factors], term.mode_sizes) for term in terms
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a FactorizedTensor has no attribute {name!r}: it contains factors; to_dense forms the tensor."
        )

    @property
    def dtype(self) -> Any:
        """The dtype of the factors, as an object of their backend."""
        return self.arrays[0].dtype

    @property
    def device(self) -> Any:
        """The device of the factors, as an object of their backend."""
        return self.arrays[0].device

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each level."""
        return self.shape[:-2]

    @classmethod
    def from_tensorly(cls, container: Any) -> FactorizedTensor:
        """Make a weight from a `CPTensor`, `TuckerTensor`, `TRTensor` or `TTTensor`, sharing its arrays."""
        names = {base.__name__ for base in type(container).__mro__}
        for format in formats().values():
            if format.container in names:
                factors = list(format.from_container(container))
                num_levels = levels_of(format, factors)[0]
                for k in format.optional(num_levels):
                    # TensorLy creates unit weights in its default dtype instead of the dtype of the factors.
                    if factors[k] is not None:
                        factors[k] = cast(factors[k], dtype_name(factors[-1]))
                return cls(format, factors)
        raise TypeError(
            "a weight must be a FactorizedTensor, a TensorLy container or a plain array, "
            f"got {type(container).__name__}."
        )

    def to_tensorly(self) -> Any:
        """Convert the weight to a TensorLy container; a dense weight becomes its array.

        Hadamard becomes a `CPTensor` whose output factor is the identity. A format without a container raises
        a TypeError.
        """
        if self.format.splits or len(self.terms) > 1:
            raise TypeError(f"the format must have a TensorLy container, got {label(self.format)!r}.")
        with tensorly_backend(backend_of(*self.arrays).backend_name) as tl:
            return self.format.to_container(self.factors, tl)

    @classmethod
    def random(
        cls,
        format: AnyFormat | LayerSpec,
        *,
        like: Array | None = None,
        seed: int | None = None,
        **sizes: Unpack[Sizes],
    ) -> FactorizedTensor:
        """Draw a weight with normal factors, scaled so that its entries have variance 1 / in_features.

        (In a sum this applies to the experts with the most terms; the others have a smaller variance.)

        Parameters
        ----------
        format : str, Format or LayerSpec
            The spec of a single layer (such as one of the `layers` of a block), or a format with `sizes`.
        like : array, optional
            An array with the backend, dtype and device of the factors. The default is NumPy float64.
        seed : int, optional
        **sizes
            The arguments of a `LayerSpec`, unless `format` is one.
        """
        spec = as_spec(format, **sizes)
        like = np.empty(0) if like is None else like
        check_floating({"like": like})
        generator = np.random.default_rng(seed)
        factors: list[Array | None] = []
        terms = spec.weight_format.terms(spec.mode_sizes, spec.full_rank)
        matrices = [term.format for term in terms if "i" not in term.format.omits]
        added = most_of_an_expert(matrices, spec.experts, [1] * len(matrices))
        for term in terms:
            declared = term.format.declaration(spec.num_levels)
            index_sizes = term.format.index_sizes(term.mode_sizes, term.rank)
            # An entry is a sum over the bonds of products of independent entries: variances multiply and add.
            products = prod(index_sizes[b] for b in term.format.bonds(spec.num_levels))
            share = spec.in_features * products * (added if term.format in matrices else 1)
            scale = share ** (-0.5 / sum(not f.optional for f in declared))
            for f in declared:
                shape = [index_sizes[x] for x in f.memory_order]
                values = None if f.optional else scale * generator.standard_normal(shape)
                factors.append(None if values is None else as_factor(values, f, like))
        return cls(spec.weight_format, factors, spec.mode_sizes)

    def __repr__(self) -> str:
        if not hasattr(self, "shape"):  # a JAX pytree, whose leaves may be anything
            factors = ", ".join(map(_described, self.factors))
            return f"FactorizedTensor({label(self.format)!r}, factors=({factors}))"
        kind = f"{dtype_name(self.arrays[0])}, {backend_of(*self.arrays).backend_name}"
        return f"FactorizedTensor({label(self.format)!r}, shape={self.shape}, rank={self.rank}, {kind})"


def _described(factor: Any) -> str:
    return f"{type(factor).__name__}{tuple(factor.shape)}" if hasattr(factor, "shape") else repr(factor)


def as_factor(values: Any, f: Factor, like: Array) -> Array:
    """Convert NumPy values, with axes in memory order, to a factor of the backend and dtype of `like`."""
    tl = backend_of(like)
    array = tl.tensor(np.ascontiguousarray(values), **context_of(like, tl))
    return tl.transpose(array, [f.memory_order.index(x) for x in f.indices])


def as_factorized(weight: Any) -> FactorizedTensor:
    """Convert a weight in any form to a `FactorizedTensor`; an array gets format ``dense``."""
    if isinstance(weight, FactorizedTensor):
        return weight
    if is_array(weight):
        return FactorizedTensor("dense", [weight])
    return FactorizedTensor.from_tensorly(weight)
