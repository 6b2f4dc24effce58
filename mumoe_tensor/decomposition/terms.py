"""The part of a tensor that a term fits: its experts, its rows, and an axis for each part of a mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from opt_einsum import contract_expression, get_symbol

from mumoe_tensor.formats.base import Format, Term, mode_names

Indices = tuple[str, ...]


def split(format: Format, dense: Any) -> Any:
    """The tensor with an axis for each part of a mode. Where parts hold more entries, these are zero."""
    sizes = iter(format.part_sizes(dense.shape))
    parts = [[next(sizes) for _ in format.parts(mode)] for mode in mode_names(dense.ndim - 2)]
    padding = [(0, prod(group) - n) for group, n in zip(parts, dense.shape, strict=True)]
    return np.pad(dense, padding).reshape([n for group in parts for n in group])


def views(format: Format, shape: Sequence[int]) -> list[TermView]:
    """The terms of a weight of this shape."""
    rank = (1,) * len(format.bonds(len(shape) - 2))
    return [TermView(term, shape, format.has_bias_term) for term in format.terms(shape, rank)]


def balanced(format: Format, num_levels: int, factors: Sequence[Any], exponent: int) -> list[Any]:
    """Bring 2^exponent into the factors of each term, by powers of two and so without rounding.

    The norms of the factors of a term then differ by a factor of four at most.
    """
    scaled = list(factors)
    for _, positions in format.summands(num_levels):
        held = [k for k in range(len(factors))[positions] if factors[k] is not None]
        exponents = {k: int(np.frexp(np.linalg.norm(factors[k]))[1]) for k in held}
        each, more = divmod(sum(exponents.values()) + exponent, len(held))
        for position, k in enumerate(held):
            scaled[k] = np.ldexp(factors[k], each + (position < more) - exponents[k])
    return scaled


class TermView:
    """A term's share of a tensor of the shape of the weight.

    Attributes
    ----------
    indices : dict of int to tuple of str
        By the position of a factor among those of the weight.
    modes : tuple of str
        The parts of modes that the term has; `shape` are their sizes.
    is_padded : bool
        Whether they hold more entries than the modes.
    rows : slice
        The rows of the input mode that the term has.
    copies : int
        How many entries of the tensor are one of the term, along modes that it does not have.
    """

    def __init__(self, term: Term, whole: Sequence[int], has_bias_term: bool):
        format, num_levels = term.format, len(whole) - 2
        declared = format.declaration(num_levels)
        present = {x for f in declared for x in f.indices}
        sizes = format.index_sizes(term.mode_sizes, term.rank)
        names = mode_names(num_levels)
        parts = [[x for x in format.parts(mode) if x in present] for mode in names]
        self.indices = {term.factors.start + k: f.indices for k, f in enumerate(declared)}
        self.modes = tuple(x for group in parts for x in group)
        self.shape = tuple(sizes[x] for x in self.modes)
        self._whole = tuple(whole)
        self._region = tuple(slice(*(format.window(e) or (None,))) for e in range(num_levels))
        rows = slice(None)
        if has_bias_term:  # the bias is the last row, which the other terms do not have
            rows = slice(-1, None) if "i" in format.omits else slice(-1)
        self._region += (rows, slice(None))
        self.rows = rows
        self._constant = tuple(axis for axis, group in enumerate(parts) if not group)
        self._held = tuple(prod(sizes[x] for x in group) for group in parts)
        ranges = [range(n)[region] for n, region in zip(whole, self._region, strict=True)]
        taken = [1 if axis in self._constant else len(r) for axis, r in enumerate(ranges)]
        self.copies = prod(len(ranges[axis]) for axis in self._constant)
        self._padding = [(0, held - n) for held, n in zip(self._held, taken, strict=True)]
        self._cut = tuple(map(slice, taken))
        self.is_padded = any(more for _, more in self._padding)

    def take(self, tensor: Any) -> Any:
        """The term's part of a tensor: the mean along modes that it has not, and zeros as padding."""
        taken = tensor[self._region].mean(self._constant, keepdims=True)
        return np.pad(taken, self._padding).reshape(self.shape)

    def put(self, part: Any) -> Any:
        """The tensor of which the term is a part."""
        tensor = np.zeros(self._whole)
        tensor[self._region] = part.reshape(self._held)[self._cut]
        return tensor

    def operands(self, factors: Sequence[Any]) -> dict[Any, tuple[Indices, Sequence[int]]]:
        """Indices and shape of each factor of the term that is not missing."""
        return {k: (axes, factors[k].shape) for k, axes in self.indices.items() if factors[k] is not None}


def contraction(operands: dict[Any, tuple[Indices, Sequence[int]]], output: Indices) -> Callable[..., Any]:
    """The contraction of arrays of these indices and shapes, its path chosen once."""
    if not operands:
        return lambda: np.ones(())
    names = sorted({x for indices, _ in operands.values() for x in indices})
    symbols = {x: get_symbol(n) for n, x in enumerate(names)}
    *inputs, result = (
        "".join(symbols[x] for x in indices) for indices in (*(i for i, _ in operands.values()), output)
    )
    expression: Callable[..., Any] = contract_expression(
        f"{','.join(inputs)}->{result}", *(tuple(shape) for _, shape in operands.values())
    )
    return expression
