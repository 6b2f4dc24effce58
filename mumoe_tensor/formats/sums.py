"""Sums of formats: weights that are sums of tensor networks, each for all experts, for some, or shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Self

from mumoe_tensor.checks import as_integer, as_positive
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.formats.base import Factor, Format, Rank, Term, mode_names
from mumoe_tensor.formats.registry import AnyFormat, composed, get_format, label


class _Wrapped(Format):
    """A format that wraps another format and has the same splits."""

    format: Format

    def __init__(self, format: AnyFormat):
        self.format = _single(format)

    @property
    def of_one_expert(self) -> Format:
        return self.format

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.name} {self.format.title}"

    @property
    def splits(self) -> Mapping[str, int | tuple[int, ...]]:  # type: ignore[override]
        return self.format.splits

    def with_splits(self, splits: Mapping[str, int | Sequence[int]]) -> Self:
        changed = object.__new__(type(self))
        changed.__dict__ |= self.__dict__ | {"format": self.format.with_splits(splits)}
        return changed


@composed
class Shared(_Wrapped):
    """One matrix for all experts, constant along the expert modes.

    Its output is weighted by the sum of the coefficients of each level.
    """

    name = "shared"
    omits = ("n",)

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return list(self.format.declaration(0))

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        return self.format.default_rank(mode_sizes[-len(self.format.modes(0)) :], t)

    def __repr__(self) -> str:
        return f"shared({label(self.format)!r})"


@composed
class Sliced(_Wrapped):
    """A format for the experts of a level from `start` to `stop` (exclusive); other experts are zero."""

    name = "sliced"

    def __init__(self, format: AnyFormat, start: int, stop: int, level: int = 0):
        super().__init__(format)
        self.start, self.stop = as_integer(start, "start"), as_positive(stop, "stop")
        self.level = as_integer(level, "level")
        if not 0 <= self.start < self.stop or self.level < 0:
            raise ValueError(
                "a slice must have 0 <= start < stop and a level of at least 0, got "
                f"start={self.start}, stop={self.stop}, level={self.level}."
            )

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return self.format.factors(modes)

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        return self.format.default_rank(mode_sizes, t)

    def part_sizes(self, mode_sizes: Sequence[int]) -> tuple[int, ...]:
        return self.format.part_sizes(self.within(mode_sizes))

    def within(self, mode_sizes: Sequence[int]) -> tuple[int, ...]:
        sizes, levels = list(mode_sizes), len(mode_sizes) - 2
        if self.level >= levels or self.stop > sizes[self.level]:
            raise ValueError(
                f"a slice must be within the experts of a level; {self!r} ends at {self.stop} in level "
                f"{self.level}, of levels with {tuple(sizes[:-2])} experts."
            )
        sizes[self.level] = self.stop - self.start
        return tuple(sizes)

    @property
    def is_plain(self) -> bool:
        return False

    def window(self, level: int) -> tuple[int, int] | None:
        return (self.start, self.stop) if level == self.level else None

    def __repr__(self) -> str:
        level = f", level={self.level}" if self.level else ""
        return f"sliced({label(self.format)!r}, {self.start}, {self.stop}{level})"


@composed
class Bias(Format):
    """One bias for all experts: a row of the input mode that only this term has.

    The bias is weighted by the sum of the coefficients of each level. It is needed only if a term splits the
    input. Otherwise the bias is a row of the input mode of the other terms, and differs between experts.
    """

    name = "bias"
    title = "bias"
    omits = ("n", "i")

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(" ".join(x for x in modes if x[0] == "o"))]


@composed
class Sum(Format):
    """A sum of terms, each with its own format; see `sum_of`."""

    name = "sum"

    def __init__(self, formats: Sequence[AnyFormat]):
        if isinstance(formats, (str, Mapping, Format)):
            raise TypeError(f"the terms of a sum must be a list of formats, got {formats!r}.")
        parts = [get_format(format) for format in formats]
        self.formats: tuple[Format, ...] = tuple(
            f for part in parts for f in (part.formats if isinstance(part, Sum) else (part,))
        )
        biases = [f for f in self.formats if "i" in f.omits]
        if len(self.formats) == len(biases) or len(biases) > 1:
            raise ValueError(
                f"a sum must have a term that is not a bias, and at most one bias, got {list(self.formats)}."
            )

    @property
    def title(self) -> str:  # type: ignore[override]
        """The titles of the terms."""
        return " + ".join(format.title for format in self.formats)

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return list(self.declaration(sum(mode[0] == "n" for mode in modes)))

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def has_bias_term(self) -> bool:
        return any("i" in format.omits for format in self.formats)

    @property
    def splits_input(self) -> bool:
        return any(format.splits_input for format in self.formats)

    @property
    def is_split(self) -> bool:
        return any(format.is_split for format in self.formats)

    @constant_under_compile
    def declaration(self, num_levels: int) -> tuple[Factor, ...]:
        """The factors of all terms. Indices that only one term has, like bonds, get a prefix: ``t1_r``."""
        return _named(self, num_levels)[0]

    @constant_under_compile
    def bonds(self, num_levels: int) -> tuple[str, ...]:
        return _named(self, num_levels)[1]

    def index_sizes(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> dict[str, int]:
        raise TypeError("index sizes differ between the terms of a sum: use those of each of its `terms`.")

    def shapes(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> list[tuple[int, ...]]:
        terms = self.terms(mode_sizes, rank)
        return [shape for term in terms for shape in term.format.shapes(term.mode_sizes, term.rank)]

    def summands(self, num_levels: int) -> tuple[tuple[Format, slice], ...]:
        factors = _slices(len(format.declaration(num_levels)) for format in self.formats)
        return tuple(zip(self.formats, factors, strict=True))

    def terms(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> tuple[Term, ...]:
        num_levels = len(mode_sizes) - 2
        entries, sizes = self.full_rank(rank, num_levels), self._mode_sizes(mode_sizes)
        bonds = _slices(len(format.bonds(num_levels)) for format in self.formats)
        return tuple(
            Term(format, shape, entries[of_rank], factors)
            for (format, factors), shape, of_rank in zip(self.summands(num_levels), sizes, bonds, strict=True)
        )

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        pairs = zip(self.formats, self._mode_sizes(mode_sizes), strict=True)
        return tuple(r for format, sizes in pairs for r in format.rank_family(sizes, t))

    def with_splits(self, splits: Mapping[str, int | Sequence[int]]) -> Self:
        raise TypeError(f"splits must be set on the terms of a sum, got {splits!r} for {self!r}.")

    def _mode_sizes(self, mode_sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Shape of each term. If there is a bias term, only this term has the bias row."""
        *experts, i, o = mode_sizes
        if not self.has_bias_term:
            return [tuple(mode_sizes)] * len(self.formats)
        return [(*experts, 1 if "i" in format.omits else i - 1, o) for format in self.formats]

    def __repr__(self) -> str:
        return f"sum_of({', '.join(repr(label(format)) for format in self.formats)})"


def shared(format: AnyFormat) -> Shared:
    """A term of `sum_of` that is the same for all experts.

    The term is constant along the expert modes, so its output is multiplied by the sum of the coefficients of
    each level. For a path that is independent of the coefficients, add a `torch.nn.Linear`.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> mt.sum_of(mt.shared("dense"), "cp")
    sum_of(shared('dense'), 'cp')
    """
    return Shared(format)


def sliced(format: AnyFormat, start: int, stop: int, level: int = 0) -> Sliced:
    """A term of `sum_of` for the experts of a level from `start` to `stop` (exclusive).

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> mt.sum_of(mt.sliced("cp", 0, 48), mt.sliced("cp", 48, 64))
    sum_of(sliced('cp', 0, 48), sliced('cp', 48, 64))
    """
    return Sliced(format, start, stop, level)


def sum_of(*formats: AnyFormat) -> Sum:
    """A format whose weight is a sum of terms, which may be `shared`, `sliced`, or formats for all experts.

    The rank of the sum is the concatenation of the ranks of the terms.

    Raises
    ------
    ValueError, TypeError
        If there is no term, or a term is not a format.
    """
    return Sum(formats)


@lru_cache(maxsize=1024)
def with_bias(format: Format) -> Format:
    """The format of a weight with a bias: if a term splits the input, a `Bias` term is added."""
    return Sum((format, Bias())) if format.splits_input and not format.has_bias_term else format


def _single(format: AnyFormat) -> Format:
    read = get_format(format)
    if isinstance(read, (Sum, Shared, Sliced, Bias)):
        raise TypeError(f"a shared or sliced term must not wrap a sum or another term, got {read!r}.")
    return read


@lru_cache(maxsize=1024)
def _named(format: Sum, num_levels: int) -> tuple[tuple[Factor, ...], tuple[str, ...]]:
    """Factors and bonds of all terms, with a prefix for each term except on common modes."""
    factors: list[Factor] = []
    bonds: list[str] = []
    for k, term in enumerate(format.formats, start=1):
        common = {m for e, m in enumerate(mode_names(num_levels)) if term.window(e) is None}
        names = {
            x: x if x in common else f"t{k}_{x}" for x in (*term.modes(num_levels), *term.bonds(num_levels))
        }
        bonds += [names[x] for x in term.bonds(num_levels)]
        for f in term.declaration(num_levels):
            indices, order = (" ".join(names[x] for x in axes) for axes in (f.indices, f.memory_order))
            factors.append(Factor(indices, order, f.optional))
    return tuple(factors), tuple(bonds)


def _slices(counts: Any) -> list[slice]:
    """Consecutive slices of these lengths."""
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
