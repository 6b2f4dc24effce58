"""The part of a tensor that a term fits: its experts and rows, with one axis per part of a mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from opt_einsum import contract_expression, get_symbol

from mumoe_tensor.formats.base import Format, Term, mode_names

Indices = tuple[str, ...]


def split(format: Format, dense: Any) -> Any:
    """Reshape a tensor to the parts of split modes, padding with zeros if necessary."""
    sizes = iter(format.part_sizes(dense.shape))
    parts = [[next(sizes) for _ in format.parts(mode)] for mode in mode_names(dense.ndim - 2)]
    padding = [(0, prod(group) - n) for group, n in zip(parts, dense.shape, strict=True)]
    return np.pad(dense, padding).reshape([n for group in parts for n in group])


def views(format: Format, shape: Sequence[int]) -> list[TermView]:
    """A view for each term of a weight of this shape."""
    rank = (1,) * len(format.bonds(len(shape) - 2))
    return [TermView(term, shape, format.has_bias_term) for term in format.terms(shape, rank)]


def balanced(format: Format, num_levels: int, factors: Sequence[Any], exponent: int) -> list[Any]:
    """Multiply each term by 2^exponent and balance its factors.

    The scales are powers of two, so nothing is rounded. The norms of the factors of a term then differ by at
    most a factor of four.
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
    """The entries of the weight that belong to a term.

    Attributes
    ----------
    indices : dict of int to tuple of str
        Indices of each factor, by its position among the factors of the weight.
    modes : tuple of str
        The modes of the term, with split modes replaced by their parts; their sizes are `shape`.
    is_padded : bool
        Whether a mode is padded.
    rows : slice
        The rows of the input mode that belong to the term.
    copies : int
        Number of entries of the weight for each entry of the term, along modes that the term omits.
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
        if has_bias_term:  # the last row belongs only to the bias term
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
        """The part of a tensor for the term: the mean along omitted modes, padded with zeros."""
        taken = tensor[self._region].mean(self._constant, keepdims=True)
        return np.pad(taken, self._padding).reshape(self.shape)

    def put(self, part: Any) -> Any:
        """A tensor with the shape of the weight that is zero except for the term."""
        tensor = np.zeros(self._whole)
        tensor[self._region] = part.reshape(self._held)[self._cut]
        return tensor

    def operands(self, factors: Sequence[Any]) -> dict[Any, tuple[Indices, Sequence[int]]]:
        """Indices and shape of each factor of the term, without missing factors."""
        return {k: (axes, factors[k].shape) for k, axes in self.indices.items() if factors[k] is not None}


def contraction(operands: dict[Any, tuple[Indices, Sequence[int]]], output: Indices) -> Callable[..., Any]:
    """A function that contracts arrays with these indices and shapes, along a path chosen once."""
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
