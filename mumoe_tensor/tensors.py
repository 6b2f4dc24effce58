"""The one container of factorized weights: a format and the arrays of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Unpack

from mumoe_tensor.backend import (
    Array,
    backend_of,
    cast,
    check_floating,
    dtype_name,
    is_array,
    tensorly_backend,
)
from mumoe_tensor.formats.base import MOST_LEVELS, Format, mode_names
from mumoe_tensor.formats.registry import formats, get_format
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec


class FactorizedTensor:
    """A weight tensor of shape (experts..., input, output), held by its factors.

    Parameters
    ----------
    format : str or Format
        A registered name, or a format of one's own.
    factors : sequence of array or None
        In the order the format declares them, axes in the declared order. A factor that is all ones may
        be None; one declared as a unit (the weights of CP) may also be left out.

    Attributes
    ----------
    format : Format
    factors : tuple of array or None
        None stands for a factor of all ones, such as the weights of CP; `arrays` are those that are held.
    levels : int
        Number of levels of experts.

    Raises
    ------
    ValueError
        If the number of factors, their number of axes, or the sizes of an index that two of them share
        differ from the declaration.
    TypeError
        If a factor is no array, or the factors differ in backend, device or floating dtype.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> mt.FactorizedTensor("hadamard", [np.ones((4, 5)), np.ones((3, 5))])
    FactorizedTensor('hadamard', shape=(4, 3, 5), rank=(), float64, numpy)
    """

    __slots__ = ("factors", "format", "levels", "rank", "shape")

    def __init__(self, format: str | Format, factors: Sequence[Array | None]):
        self.format = get_format(format)
        if not isinstance(factors, (list, tuple)):
            raise TypeError(f"factors must be a list or a tuple of arrays, got {type(factors).__name__}.")
        self.levels, self.factors = _match(self.format, factors)
        sizes = _sizes(self.format, self.levels, self.factors)
        self.shape = tuple(sizes[m] for m in mode_names(self.levels))
        self.rank = tuple(sizes[b] for b in self.format.bonds(self.levels))

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

    @property
    def ones(self) -> tuple[int, ...]:
        """Positions of the factors that are all ones and not held."""
        return tuple(k for k, factor in enumerate(self.factors) if factor is None)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The factors that are held."""
        return tuple(factor for factor in self.factors if factor is not None)

    @classmethod
    def from_tensorly(cls, container: Any) -> FactorizedTensor:
        """Take over a `CPTensor`, `TuckerTensor`, `TRTensor` or `TTTensor`, by attribute.

        Parameters
        ----------
        container : CPTensor, TuckerTensor, TRTensor or TTTensor

        Raises
        ------
        TypeError
            If no registered format has a container of this type.
        """
        names = {base.__name__ for base in type(container).__mro__}
        for format in formats().values():
            if format.container in names:
                factors = list(format.from_container(container))
                levels, _ = _match(format, factors)
                for k in format.units(levels):
                    # TensorLy makes weights of one in its default dtype, whatever the factors have.
                    if factors[k] is not None:
                        factors[k] = cast(factors[k], dtype_name(factors[-1]))
                return cls(format, factors)
        raise TypeError(
            "a weight is a FactorizedTensor, a container of TensorLy or a plain array, "
            f"got {type(container).__name__}."
        )

    def to_tensorly(self) -> Any:
        """Give the weight back as TensorLy's container of its format, a dense one as its array.

        Hadamard becomes a `CPTensor` whose output factor is the identity.

        Raises
        ------
        TypeError
            If TensorLy has no container of this format.
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
            A single layer: its format, with `sizes` beside it, or its spec.
        like : array, optional
            The factors take its backend, dtype and device. NumPy's float64 by default.
        seed : int, optional
        **sizes
            The arguments of a `LayerSpec`, unless `format` is one.

        Raises
        ------
        ValueError, TypeError
            As `LayerSpec`; for a block, each of whose `layers` has its weight.
        """
        import numpy as np

        spec = as_spec(format, **sizes)
        index_sizes = spec.format.sizes(spec.mode_sizes, spec.full_rank)
        like = np.empty(0) if like is None else like
        tl = check_floating({"like": like})
        context = {key: value for key, value in tl.context(like).items() if key != "requires_grad"}
        generator = np.random.default_rng(seed)
        declared = spec.format.declaration(spec.num_levels)
        # An entry is a sum over the bonds of products of independent factors: variances multiply and add.
        terms = prod(index_sizes[b] for b in spec.format.bonds(spec.num_levels))
        scale = (1 / (spec.in_features * terms)) ** (0.5 / sum(not f.unit for f in declared))
        factors: list[Array | None] = []
        for f in declared:
            if f.unit:
                factors.append(None)
                continue
            values = scale * generator.standard_normal([index_sizes[x] for x in f.storage])
            factors.append(
                tl.transpose(tl.tensor(values, **context), [f.storage.index(x) for x in f.indices])
            )
        return cls(spec.format, factors)

    def __repr__(self) -> str:
        if not hasattr(self, "shape"):  # a tree of JAX's: arrays to map over, abstract values, anything
            factors = ", ".join(map(_described, self.factors))
            return f"FactorizedTensor({self.format.name!r}, factors=({factors}))"
        kind = f"{dtype_name(self.arrays[0])}, {backend_of(*self.arrays).backend_name}"
        return f"FactorizedTensor({self.format.name!r}, shape={self.shape}, rank={self.rank}, {kind})"


def _described(factor: Any) -> str:
    return f"{type(factor).__name__}{tuple(factor.shape)}" if hasattr(factor, "shape") else repr(factor)


def as_factorized(weight: Any) -> FactorizedTensor:
    """Whatever may stand for a weight, as a `FactorizedTensor`; a dense array becomes format ``dense``."""
    if isinstance(weight, FactorizedTensor):
        return weight
    if is_array(weight):
        return FactorizedTensor("dense", [weight])
    return FactorizedTensor.from_tensorly(weight)


def _match(format: Format, factors: Sequence[Any]) -> tuple[int, tuple[Any, ...]]:
    """Find the number of levels whose declaration these factors fit."""
    if arrays := [factor for factor in factors if factor is not None]:
        backend_of(*arrays)
    for levels in range(MOST_LEVELS + 1):
        declared = format.declaration(levels)
        filled = list(factors)
        if len(filled) == len(declared) - len(format.units(levels)):
            for k in format.units(levels):
                filled.insert(k, None)
        if len(filled) == len(declared) and all(
            factor is None or len(factor.shape) == len(f.indices)
            for factor, f in zip(filled, declared, strict=True)
        ):
            return levels, tuple(filled)
    told = " | ".join(" ".join(f.indices) for f in format.declaration(1))
    shapes = ", ".join("None" if factor is None else str(tuple(factor.shape)) for factor in factors)
    raise ValueError(
        f"the factors of format {format.name!r} are {told} (for one level of experts), got arrays of "
        f"shapes {shapes or 'none'}."
    )


def _sizes(format: Format, levels: int, factors: Sequence[Array | None]) -> dict[str, int]:
    """Size of every index, checked to be the same wherever it occurs."""
    declared = format.declaration(levels)
    arrays = {f"factor[{k}]": factor for k, factor in enumerate(factors) if factor is not None}
    if arrays:
        check_floating(arrays)
    sizes: dict[str, int] = {}
    found: dict[str, int] = {}
    for k, (factor, f) in enumerate(zip(factors, declared, strict=True)):
        if factor is None:
            continue
        for index, size in zip(f.indices, factor.shape, strict=True):
            if size == 0:
                raise ValueError(f"every size must be positive, factor[{k}] has shape {tuple(factor.shape)}.")
            if sizes.setdefault(index, size) != size:
                raise ValueError(
                    f"factors that share an index must agree in its size; {index!r} has size "
                    f"{sizes[index]} in factor[{found[index]}] and {size} in factor[{k}]."
                )
            found.setdefault(index, k)
    ends = [x for factor, f in zip(factors, declared, strict=True) if factor is not None for x in f.indices]
    modes = mode_names(levels)
    for k in (k for k, factor in enumerate(factors) if factor is None):
        missing = [x for x in declared[k].indices if ends.count(x) < (1 if x in modes else 2)]
        if missing:
            raise ValueError(
                "a factor may be None only where others have its modes, and its bonds still join two of "
                f"them; factor[{k}] of format {format.name!r} has {missing[0]!r}."
            )
    return sizes
