"""The base class of formats. A format is declared by the index strings of its factors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple, Self

from mumoe_tensor.checks import as_entries, as_positive, check_flag
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.formats.splits import Splits

Rank = tuple[int, ...]
#: Index of the batch in a contraction.
BATCH = "B"
#: Maximum number of levels of experts for which declarations are checked and factors are matched.
MOST_LEVELS = 16


@dataclass(frozen=True, init=False)
class Factor:
    """One factor of a format: the indices of its axes.

    Parameters
    ----------
    indices : str
        Names of the axes, separated by spaces, e.g. ``"b1 n1 b2"``. A name that is not a mode is a bond,
        whose size is an entry of the rank. Names must be identifiers. A bond must not have the name ``B``
        (the batch) or the name of a mode of another level (``n2`` with one level).
    memory_order : str, optional
        The same names in the memory order that suits the factor's usual product, slowest first. Defaults to
        `indices`.
    optional : bool, default False
        Whether the factor may be missing, like the weights of a CP tensor. A missing factor is all ones, and
        adds no parameters and no contraction step.
    """

    indices: tuple[str, ...]
    memory_order: tuple[str, ...]
    optional: bool

    def __init__(self, indices: str, memory_order: str | None = None, optional: bool = False):
        memory_order = indices if memory_order is None else memory_order
        for text in (indices, memory_order):
            if not isinstance(text, str):
                raise TypeError(f"a factor's indices must be a string such as 'b1 n1 b2', got {text!r}.")
        check_flag(optional, "optional")
        object.__setattr__(self, "indices", tuple(indices.split()))
        object.__setattr__(self, "memory_order", tuple(memory_order.split()))
        object.__setattr__(self, "optional", optional)
        for name in self.indices:
            if not name.isidentifier():
                raise ValueError(f"every index must be an identifier, such as 'r' or 'b1', got {name!r}.")
        if len(set(self.indices)) != len(self.indices):
            raise ValueError(f"a factor's indices must differ from each other, got {indices!r}.")
        if sorted(self.indices) != sorted(self.memory_order):
            raise ValueError(
                f"memory_order must reorder the factor's indices {indices!r}, got {memory_order!r}."
            )


class Term(NamedTuple):
    """A term of a weight that is a sum of tensor networks.

    Attributes
    ----------
    format : Format
    mode_sizes : tuple of int
        Shape of the term. If one term of the weight is a bias, that term has only the bias row, and the other
        terms have no bias row; see `.Bias`.
    rank : tuple of int
    factors : slice
        The position of its factors among the factors of the weight.
    """

    format: Format
    mode_sizes: tuple[int, ...]
    rank: Rank
    factors: slice

    def positions(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Select the positions that belong to this term, counted from its first factor."""
        start, stop = self.factors.start, self.factors.stop
        return tuple(k - start for k in positions if start <= k < stop)


class Format(ABC):
    """A tensor format, declared by the index strings of its factors.

    Subclasses set `name` and `title` and implement `factors`. The library derives everything else from that
    declaration. Optional methods add conventions of the literature: `default_rank`, `reference_flops`, and
    the ``*_container`` methods if TensorLy has the format.

    A format is a value. Its settings are arguments of the class with defaults, stored as attributes with the
    same names. Two formats are equal if their classes and attributes are equal. Settings must be hashable and
    must not change once the format is in use.

    Parameters
    ----------
    splits : dict, optional
        Modes that are split into parts, in row-major order: for ``"i"``, ``"o"``, ``"n1"``, ... the number of
        parts or their sizes. They are merged with the splits of the class. If only the number is given, the
        parts are the most balanced factorization of the size. If the product of the given sizes exceeds the
        mode, the mode is padded with zeros.
    """

    name: str
    title: str
    #: Name of TensorLy's class for this format, if it has one.
    container: str | None = None
    #: Modes that every format of the class splits; see the argument `splits`.
    splits: Mapping[str, int | tuple[int, ...]] = Splits()
    #: Kinds of modes that may be missing in all factors: ``"n"`` for experts, along which the weight is then
    #: constant, and ``"i"`` for the input, in which case the weight is only a bias.
    omits: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if isinstance(splits := cls.__dict__.get("splits"), Mapping):
            cls.splits = Splits.read(splits)

    def __init__(self, *, splits: Mapping[str, int | Sequence[int]] | None = None):
        merged = Splits.read({**self.splits, **({} if splits is None else Splits.read(splits))})
        if merged != self.splits:
            self.splits = merged

    @abstractmethod
    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        """Declare the factors.

        Parameters
        ----------
        modes : tuple of str
            ``("n1", ..., "nE", "i", "o")``: the expert mode of each level, input, output. A split mode is
            replaced by its parts, ``"i1", "i2", ...`` or ``"n1_1", "n1_2", ...``.
        """

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        """The conventional rank, as a family that grows with ``t >= 1``; `fit_rank` solves for ``t``.

        Parameters
        ----------
        mode_sizes : tuple of int
            Sizes of the modes that are passed to `factors`; a split mode is replaced by its parts.
        t : int
        """
        num_levels = next(e for e in range(MOST_LEVELS + 1) if len(self.modes(e)) == len(mode_sizes))
        return (t,) * len(self.bonds(num_levels))

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int | None:
        """FLOPs for one input by a published closed form, or None if there is none.

        Not called if modes are split.
        """
        return None

    def from_container(self, container: Any) -> list[Any]:
        """The factors in a TensorLy container of this format, or in an object with the same attributes."""
        raise TypeError(f"format {self.name!r} has no container in TensorLy.")

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        """Make a TensorLy container of the factors; `tl` is the TensorLy backend of the arrays."""
        raise TypeError(f"format {self.name!r} has no container in TensorLy.")

    # ---- derived; not to be overridden -------------------------------------------------------------

    @constant_under_compile
    def declaration(self, num_levels: int) -> tuple[Factor, ...]:
        """The declared factors for a number of levels of experts, checked to be a valid tensor network."""
        return _declared(self, num_levels)[0]

    def modes(self, num_levels: int) -> tuple[str, ...]:
        """Names of the modes, with split modes replaced by their parts: the argument of `factors`."""
        names = mode_names(num_levels)
        return tuple(part for mode in names for part in self.parts(mode)) if self.splits else names

    def parts(self, mode: str) -> tuple[str, ...]:
        """Names of the parts of a mode; a mode that is not split is its only part."""
        count = self._splits.count(mode)
        if count is None:
            return (mode,)
        between = "_" if mode[-1].isdigit() else ""
        return tuple(f"{mode}{between}{k}" for k in range(1, count + 1))

    def held(self, mode: str, size: int) -> int:
        """Size of a mode after padding: the product of the sizes of its parts."""
        return prod(self._sizes_of_parts(mode, size))

    def part_sizes(self, mode_sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of `modes`, given the sizes of the modes before splitting."""
        if not self.splits:
            return tuple(mode_sizes)
        names = mode_names(len(mode_sizes) - 2)
        pairs = zip(names, mode_sizes, strict=True)
        return tuple(n for mode, size in pairs for n in self._sizes_of_parts(mode, size))

    def within(self, mode_sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the modes of this term, given those of the whole weight.

        They differ only for a slice, whose sliced level has ``stop - start`` experts.
        """
        return tuple(mode_sizes)

    def with_splits(self, splits: Mapping[str, int | Sequence[int]]) -> Self:
        """The same format with added or changed splits; see the argument `splits`."""
        changed = copy(self)
        changed.splits = Splits.read({**self.splits, **Splits.read(splits)})
        return changed if changed.splits != self.splits else self

    @constant_under_compile
    def bonds(self, num_levels: int) -> tuple[str, ...]:
        """Names of the bonds, in order of first appearance; the rank has one entry per bond."""
        return _declared(self, num_levels)[1]

    def optional(self, num_levels: int) -> tuple[int, ...]:
        """Positions of the optional factors."""
        return tuple(k for k, f in enumerate(self.declaration(num_levels)) if f.optional)

    def check_rank(self, rank: int | Sequence[int | None] | None, num_levels: int) -> tuple[int | None, ...]:
        """Check a rank, and return a tuple with a positive integer or None for each bond."""
        bonds = self.bonds(num_levels)
        listed = None if rank is None else as_entries(rank, "rank")
        if len(listed or ()) != len(bonds):
            wanted = f"one entry per bond, {', '.join(bonds)}" if bonds else "no entries"
            fit = "; fit_rank (`mumoe-tensor fit`) solves for one" if rank is None else ""
            raise ValueError(
                f"the rank of format {self.name!r} with {num_levels} level(s) of experts must have {wanted}; "
                f"got {listed}{fit}."
            )
        return tuple(None if r is None else as_positive(r, "every rank") for r in listed or ())

    def full_rank(self, rank: int | Sequence[int | None] | None, num_levels: int) -> Rank:
        """Like `check_rank`, but no entry may be None."""
        checked = self.check_rank(rank, num_levels)
        entries = tuple([r for r in checked if r is not None])
        if len(entries) != len(checked):
            raise ValueError(
                f"every entry of the rank must be a number, got {rank!r}; fit_rank and LayerSpec.fitted "
                "solve for an entry that is None."
            )
        return entries

    def rank_family(self, mode_sizes: Sequence[int], t: int) -> Rank:
        """`default_rank`, given the sizes of the modes before splitting."""
        return self.default_rank(self.part_sizes(mode_sizes), t)

    def closed_form(self, mode_sizes: tuple[int, ...], rank: Rank) -> int | None:
        """`reference_flops`, or None if a mode is split."""
        return None if self.splits else self.reference_flops(mode_sizes, rank)

    def index_sizes(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> dict[str, int]:
        """Size of every index, with the bias row in the input mode. Not available for a sum."""
        num_levels = len(mode_sizes) - 2
        entries = self.full_rank(rank, num_levels)
        names = self.modes(num_levels) + self.bonds(num_levels)
        return dict(zip(names, (*self.part_sizes(mode_sizes), *entries), strict=True))

    def shapes(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> list[tuple[int, ...]]:
        """Shape of each declared factor; see `index_sizes`."""
        size = self.index_sizes(mode_sizes, rank)
        return [tuple(size[x] for x in f.indices) for f in self.declaration(len(mode_sizes) - 2)]

    def summands(self, num_levels: int) -> tuple[tuple[Format, slice], ...]:
        """The formats of the terms of a weight, with the slices of their factors.

        A format that is not a sum is its only term.
        """
        return ((self, slice(0, len(self.declaration(num_levels)))),)

    def terms(self, mode_sizes: Sequence[int], rank: int | Sequence[int] | None) -> tuple[Term, ...]:
        """The terms of a weight of these sizes."""
        ((_, whole),) = self.summands(len(mode_sizes) - 2)
        return (Term(self, tuple(mode_sizes), self.full_rank(rank, len(mode_sizes) - 2), whole),)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a single network that covers every mode completely, without splits."""
        return not self.splits and not self.omits

    @property
    def is_split(self) -> bool:
        """Whether the input or the output is split."""
        return not self.splits.keys().isdisjoint("io")

    @property
    def splits_input(self) -> bool:
        """Whether the input is split. A bias is then a term of a sum instead of a row of the input mode."""
        return "i" in self.splits

    @property
    def has_bias_term(self) -> bool:
        """Whether one of the terms of a sum is the bias."""
        return False

    @property
    def of_one_expert(self) -> Format:
        """The format of the matrix of one expert: for a shared or sliced term, the format that it wraps."""
        return self

    def window(self, level: int) -> tuple[int, int] | None:
        """Start and stop of the experts that the format covers at a level; None for all."""
        return None

    def _sizes_of_parts(self, mode: str, size: int) -> tuple[int, ...]:
        return self._splits.sizes(mode, size, self.of_one_expert.name)

    @property
    def _splits(self) -> Splits:
        splits = self.splits
        return splits if isinstance(splits, Splits) else Splits.read(splits)

    # A format is a value: declarations, plans and programs are cached by it.

    def _settings(self) -> tuple[tuple[str, Any], ...]:
        """All attributes, including slots, without the values of a `cached_property`."""
        state = object.__getstate__(self)
        if state is None:  # a shortcut: every call computes the hash, usually of a format without settings
            return ()
        parts = state if isinstance(state, tuple) else (state,)
        attributes = {name: value for part in parts if part for name, value in part.items()}
        kind = type(self)
        return tuple(
            (name, value)
            for name, value in sorted(attributes.items())
            if not isinstance(getattr(kind, name, None), cached_property)
        )

    @constant_under_compile
    def check_settings(self) -> None:
        """Raise a TypeError unless all settings are hashable."""
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(
                "every setting of a format must be hashable, such as a number, a string, a tuple of these or "
                f"a frozen dataclass, got {self!r}: {error}."
            ) from None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash((type(self), self._settings()))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings())
        return f"{type(self).__name__}({settings})"


def mode_names(num_levels: int) -> tuple[str, ...]:
    """Names of the modes: ``("n1", ..., "nE", "i", "o")``."""
    return (*(f"n{e}" for e in range(1, num_levels + 1)), "i", "o")


def by_kind(modes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Group the modes that are passed to `.Format.factors` by kind: experts, input, output."""
    experts, inputs, outputs = (tuple(x for x in modes if x[0] == kind) for kind in "nio")
    return experts, inputs, outputs


@lru_cache(maxsize=4096)
def _declared(format: Format, num_levels: int) -> tuple[tuple[Factor, ...], tuple[str, ...]]:
    """The factors and the bonds of a format, after checking that they are a tensor network.

    Everything derived from a format, registered or not, uses this function.
    """
    modes, name, at = format.modes(num_levels), type(format).__name__, f"level count {num_levels}:"
    try:
        declared = format.factors(modes)
    except Exception as error:
        splits = f" with splits={dict(format.splits)}" if format.splits else ""
        raise ValueError(
            f"{at} factors() of {name}{splits} raises {type(error).__name__}: {error}"
        ) from error
    if not isinstance(declared, (list, tuple)) or not all(isinstance(f, Factor) for f in declared):
        raise TypeError(f"{at} factors() of {name} must return a list of Factor, got {declared!r}.")
    ends = [index for f in declared if not f.optional for index in f.indices]
    for mode in mode_names(num_levels):
        parts = format.parts(mode)
        left_out = [part for part in parts if part not in ends]
        if left_out and (mode[0] not in format.omits or len(left_out) < len(parts)):
            raise ValueError(f"{at} every mode must be in a factor; {name} leaves out {left_out[0]!r}.")
    seen = dict.fromkeys(index for f in declared for index in f.indices)
    bonds = tuple(index for index in seen if index not in modes)
    for bond in bonds:
        if bond == BATCH or re.fullmatch("i|o|n[1-9][0-9]*", bond):
            raise ValueError(
                f"{at} a bond must not have the name of the batch ({BATCH!r}), of a split mode, or of a mode "
                f"of another level; {name} has {bond!r}."
            )
        if ends.count(bond) < 2:
            raise ValueError(f"{at} a bond must join two or more factors; {name} has {bond!r} once.")
    return tuple(declared), bonds
