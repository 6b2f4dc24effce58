"""Matching factors with a declaration: the number of levels, the shape and the rank of a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from operator import index as constant
from typing import Any, NamedTuple

from mumoe_tensor.backend import Array, backend_of, check_floating
from mumoe_tensor.checks import as_entries, as_positive
from mumoe_tensor.formats.base import MOST_LEVELS, Format, Rank, mode_names
from mumoe_tensor.formats.splits import is_default
from mumoe_tensor.formats.sums import Sum


class Matched(NamedTuple):
    """Format, shape and rank of a weight, inferred from its factors.

    Attributes
    ----------
    format : Format
        The format, with the splits of the factors.
    factors : tuple of array or None
        All declared factors, None for missing ones.
    shape, rank : tuple of int
    asked : tuple of int or None
        The shape, if it does not follow from the factors.
    """

    format: Format
    factors: tuple[Array | None, ...]
    shape: tuple[int, ...]
    rank: Rank
    asked: tuple[int, ...] | None


def match(format: Format, factors: Sequence[Array | None], shape: Sequence[int] | None) -> Matched:
    """Match factors with a declaration, or raise an error if they do not fit. See `.FactorizedTensor`."""
    if shape is not None:
        shape = tuple(as_positive(n, "every size of a shape") for n in as_entries(shape, "shape"))
        if len(shape) < 2:
            raise ValueError(f"a shape must be (experts..., input, output), got {shape}.")
    num_levels, filled = levels_of(format, factors, shape)
    if arrays := {f"factor[{k}]": factor for k, factor in enumerate(filled) if factor is not None}:
        check_floating(arrays)
    modes = mode_names(num_levels)
    if format.is_plain:
        of_index = _index_sizes(format, num_levels, filled, 0)
        whole = tuple([of_index[mode] for mode in modes])
        if shape in (None, whole):
            rank = tuple([of_index[bond] for bond in format.bonds(num_levels)])
            return Matched(format, filled, whole, rank, None)
    summands = format.summands(num_levels)
    sizes = [_index_sizes(term, num_levels, filled, at.start) for term, at in summands]
    terms = [(term, of_term) for (term, _), of_term in zip(summands, sizes, strict=True)]
    rank = tuple(of_term[b] for term, of_term in terms for b in term.bonds(num_levels))
    follows = [_size(format.has_bias_term, terms, level, mode) for level, mode in enumerate(modes)]
    if shape is None and None in follows:
        raise ValueError(
            "a shape must be given if no factor has all entries of a mode, got None for mode "
            f"{modes[follows.index(None)]!r} of format {format!r}."
        )
    asked = None if shape is None or list(shape) == follows else tuple(shape)
    shape = asked or tuple(size for size in follows if size is not None)
    split = [
        _fitted(term, of_shape.mode_sizes, of_term)
        for (term, of_term), of_shape in zip(terms, format.terms(shape, rank), strict=True)
    ]
    if split != [term for term, _ in terms]:
        format = Sum(split) if isinstance(format, Sum) else split[0]
    return Matched(format, filled, shape, rank, asked)


def levels_of(
    format: Format, factors: Sequence[Any], shape: Sequence[int] | None = None
) -> tuple[int, tuple[Any, ...]]:
    """The number of levels at which the factors fit the declaration, and the factors, None if missing."""
    if arrays := [factor for factor in factors if factor is not None]:
        backend_of(*arrays)
    for num_levels in range(MOST_LEVELS + 1) if shape is None else (len(shape) - 2,):
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
        f"the factors of format {format.name!r} must be {expected} (for one level of experts), got arrays of "
        f"shapes {shapes or 'none'}."
    )


def _index_sizes(
    term: Format, num_levels: int, factors: Sequence[Array | None], start: int
) -> dict[str, int]:
    """The size of each index of a term, which all factors must share; the factors begin at `start`."""
    indices = {start + k: f.indices for k, f in enumerate(term.declaration(num_levels))}
    # torch.compile traces this, and supports neither `:=` here nor `min` with a default.
    arrays: dict[int, Array] = {k: factors[k] for k in indices if factors[k] is not None}
    sizes: dict[str, int] = {}
    for k, factor in arrays.items():
        for index, size in zip(indices[k], factor.shape, strict=True):
            if size == 0:
                raise ValueError(
                    f"every size must be positive, got factor[{k}] of shape {tuple(factor.shape)}."
                )
            if sizes.setdefault(index, size) != size:
                first = next(j for j in arrays if index in indices[j])
                raise ValueError(
                    f"factors that share an index must have the same size there; {index!r} has size "
                    f"{sizes[index]} in factor[{first}] and {size} in factor[{k}]."
                )
    bonds = term.bonds(num_levels) if len(arrays) < len(indices) else ()
    for k in indices.keys() - arrays.keys():
        for x in indices[k]:
            if [x in indices[j] for j in arrays].count(True) < (2 if x in bonds else 1):
                raise ValueError(
                    "a factor may be None only if other factors have its modes and its bonds still join two "
                    f"factors, got None for factor[{k}] of format {term.name!r}, which has {x!r}."
                )
    return sizes


def _size(
    has_bias_term: bool, terms: Sequence[tuple[Format, Mapping[str, int]]], level: int, mode: str
) -> int | None:
    """Size of a mode of the weight, or None if it does not follow from the factors.

    It is the smallest size among the terms, because split modes may be padded.
    """
    held = [
        prod([sizes[part] for part in term.parts(mode)]) + (mode == "i" and has_bias_term)
        for term, sizes in terms
        if term.window(level) is None and all(part in sizes for part in term.parts(mode))
    ]
    return min(held) if held else None


def _fitted(term: Format, mode_sizes: Sequence[int], sizes: Mapping[str, int]) -> Format:
    """The format of a term with the splits of its factors, checked against the sizes of the modes."""
    num_levels = len(mode_sizes) - 2
    splits = {}
    for mode, size in zip(mode_names(num_levels), term.within(mode_sizes), strict=True):
        parts = term.parts(mode)
        if not all(part in sizes for part in parts):
            continue
        held = tuple(sizes[part] for part in parts)
        if prod(held) < size or (parts == (mode,) and held != (size,)):
            raise ValueError(
                f"the sizes of the factors must match the weight; mode {mode!r} must have {size} entries, "
                f"but has {' x '.join(map(str, held))} in the factors of format {term.name!r}."
            )
        if parts == (mode,) or held == term.splits[mode]:
            continue
        if not isinstance(term.splits[mode], int):
            raise ValueError(
                f"the factors must have the same parts as the format; mode {mode!r} is split into "
                f"{term.splits[mode]} in the format, but {held} in the factors."
            )
        # Constants instead of the symbolic sizes of torch.compile.
        if not is_default(constant(size), tuple(map(constant, held))):
            splits[mode] = held
    return term.with_splits(splits) if splits else term
