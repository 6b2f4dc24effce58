"""What a format is: the index strings of its factors, and nothing else."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mumoe_tensor.checks import as_entries, as_positive, check_flag

Rank = tuple[int, ...]
#: A contraction order as nested pairs of operand positions.
Tree = Any
#: Index of the batch in a contraction.
BATCH = "B"
#: More levels of experts than anybody has: declarations are checked up to it, and levels looked for.
MOST_LEVELS = 16


@dataclass(frozen=True, init=False)
class Factor:
    """One factor of a format: the indices of its axes.

    Parameters
    ----------
    indices : str
        Names of the axes, separated by spaces, e.g. ``"b1 n1 b2"``. A name that is a mode stands for that
        mode; every other name is a bond, whose size the rank gives. Names are identifiers; ``B``, the
        batch, and modes of other levels (``n2`` where there is one level) name no bond.
    storage : str, optional
        The same names in the memory order the factor's usual product wants, slowest first. Defaults to
        `indices`.
    unit : bool, default False
        True for a factor that is all ones unless somebody gives it: it is then neither a parameter nor a
        step of the contraction (the weights of a CP tensor).
    """

    indices: tuple[str, ...]
    storage: tuple[str, ...]
    unit: bool

    def __init__(self, indices: str, storage: str | None = None, unit: bool = False):
        storage = indices if storage is None else storage
        for text in (indices, storage):
            if not isinstance(text, str):
                raise TypeError(f"a factor's indices must be names in one string, 'b1 n1 b2', got {text!r}.")
        check_flag(unit, "unit")
        object.__setattr__(self, "indices", tuple(indices.split()))
        object.__setattr__(self, "storage", tuple(storage.split()))
        object.__setattr__(self, "unit", unit)
        for name in self.indices:
            if not name.isidentifier():
                raise ValueError(f"every index must be an identifier, such as 'r' or 'b1', got {name!r}.")
        if len(set(self.indices)) != len(self.indices):
            raise ValueError(f"a factor's indices must differ from each other, got {indices!r}.")
        if sorted(self.indices) != sorted(self.storage):
            raise ValueError(f"storage must reorder the factor's indices {indices!r}, got {storage!r}.")


class Format(ABC):
    """A tensor format, declared by the index strings of its factors.

    Subclasses set `name` and `title` and implement `factors`. Everything else in the library is derived
    from that one declaration. `default_rank` and `reference_flops` may be given where the field has a
    convention; the ``*_container`` methods where TensorLy has a counterpart.

    A format is a value. Its settings are arguments of the class with defaults, stored as attributes of the
    same names; two formats are equal if their classes and their attributes are. Settings must be hashable,
    and must not change once the format is in use.
    """

    name: str
    title: str
    #: Name of TensorLy's class for this format, if it has one.
    container: str | None = None

    @abstractmethod
    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        """Declare the factors.

        Parameters
        ----------
        modes : tuple of str
            ``("n1", ..., "nE", "i", "o")``: the expert mode of each level, input, output.
        """

    def default_rank(self, sizes: tuple[int, ...], t: int) -> Rank:
        """Rank used where none is given, as a family that grows with the integer ``t >= 1``.

        Parameters
        ----------
        sizes : tuple of int
            Sizes of the modes, in their order.
        t : int
            The one free number, found by `fit_rank`.
        """
        return (t,) * len(self.bonds(len(sizes) - 2))

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int | None:
        """FLOPs for one input as the literature writes them, or None where it has no closed form.

        Parameters
        ----------
        sizes : tuple of int
            Sizes of the modes, in their order.
        rank : tuple of int
        """
        return None

    def from_container(self, container: Any) -> list[Any]:
        """Read the factors from TensorLy's container of this format, by attribute.

        Parameters
        ----------
        container : object
            One that has its attributes will do.

        Returns
        -------
        list of array
        """
        raise TypeError(f"format {self.name!r} has no container in TensorLy.")

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        """Put the factors into TensorLy's container; `tl` is the backend they belong to.

        Parameters
        ----------
        factors : sequence of array
        tl : object
            TensorLy's backend of these arrays.
        """
        raise TypeError(f"format {self.name!r} has no container in TensorLy.")

    # ---- derived; not to be overridden -------------------------------------------------------------

    def bonds(self, levels: int) -> tuple[str, ...]:
        """Bond indices in order of first appearance: the entries of a rank.

        Parameters
        ----------
        levels : int
            Number of levels of experts.
        """
        return _bonds(self.declaration(levels), mode_names(levels))

    def declaration(self, levels: int) -> tuple[Factor, ...]:
        """The declared factors for a number of levels of experts, checked.

        Parameters
        ----------
        levels : int
            Number of levels of experts.

        Raises
        ------
        ValueError
            If `factors` raises an error, or what it declares is not a tensor network of these modes.
        TypeError
            If it does not list factors.
        """
        return _declared(self, levels)

    def units(self, levels: int) -> tuple[int, ...]:
        """Positions of the factors that are all ones unless given.

        Parameters
        ----------
        levels : int
            Number of levels of experts.
        """
        return tuple(k for k, f in enumerate(self.declaration(levels)) if f.unit)

    def check_rank(self, rank: int | Sequence[int | None] | None, levels: int) -> tuple[int | None, ...]:
        """Bring a rank into the form of a tuple with one entry per bond.

        Parameters
        ----------
        rank : int or sequence of int and None, optional
        levels : int
            Number of levels of experts.

        Raises
        ------
        TypeError
            If an entry is neither an integer nor None.
        ValueError
            If the number of entries is wrong or an entry is not positive.
        """
        bonds = self.bonds(levels)
        given = None if rank is None else as_entries(rank, "rank")
        entries = tuple(None if r is None else as_positive(r, "every rank") for r in given or ())
        if len(entries) != len(bonds):
            wanted = f"({', '.join(bonds)}{',' * (len(bonds) == 1)})" if bonds else "no entries"
            raise ValueError(
                f"a rank of format {self.name!r} with {levels} level(s) of experts has {len(bonds)} "
                f"entries, {wanted}, got {given}."
            )
        return entries

    def full_rank(self, rank: int | Sequence[int | None] | None, levels: int) -> Rank:
        """As `check_rank`, but no entry may be None.

        Parameters
        ----------
        rank : int or sequence of int, optional
        levels : int
            Number of levels of experts.
        """
        entries = tuple(r for r in self.check_rank(rank, levels) if r is not None)
        if len(entries) != len(self.bonds(levels)):
            raise ValueError(f"every entry of the rank must be known here, got {rank!r}; see fit_rank.")
        return entries

    def sizes(self, modes: Sequence[int], rank: int | Sequence[int] | None) -> dict[str, int]:
        """Size of every index, from the sizes of the modes and the rank.

        Parameters
        ----------
        modes : sequence of int
            Sizes of the modes, in their order, the bias row counted.
        rank : int or sequence of int, optional
        """
        levels = len(modes) - 2
        entries = self.full_rank(rank, levels)
        return dict(zip(mode_names(levels) + self.bonds(levels), (*modes, *entries), strict=True))

    def shapes(self, modes: Sequence[int], rank: int | Sequence[int] | None) -> list[tuple[int, ...]]:
        """Shape of each factor, unit ones included, in the order of their declaration.

        Parameters
        ----------
        modes : sequence of int
            Sizes of the modes, in their order, the bias row counted.
        rank : int or sequence of int, optional
        """
        sizes = self.sizes(modes, rank)
        return [tuple(sizes[x] for x in f.indices) for f in self.declaration(len(modes) - 2)]

    # A format is a value: declarations, plans and programs are cached by it.

    def __eq__(self, other: object) -> bool:
        # (The state that pickle takes: attributes, those in slots too.)
        return type(self) is type(other) and object.__getstate__(self) == object.__getstate__(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def mode_names(levels: int) -> tuple[str, ...]:
    """Names of the modes: ``("n1", ..., "nE", "i", "o")``.

    Parameters
    ----------
    levels : int
        Number of levels of experts.
    """
    return (*(f"n{e}" for e in range(1, levels + 1)), "i", "o")


def _bonds(declared: Iterable[Factor], modes: tuple[str, ...]) -> tuple[str, ...]:
    seen = dict.fromkeys(index for f in declared for index in f.indices)
    return tuple(index for index in seen if index not in modes)


@lru_cache(maxsize=4096)
def _declared(format: Format, levels: int) -> tuple[Factor, ...]:
    """Let a format declare its factors, and check that they are a tensor network.

    Registered or not, every format passes here before anything is derived from it.
    """
    modes, name, at = mode_names(levels), type(format).__name__, f"level count {levels}:"
    try:
        declared = format.factors(modes)
    except Exception as error:
        raise ValueError(f"{at} factors() of {name} raises {type(error).__name__}: {error}") from error
    if not isinstance(declared, (list, tuple)) or not all(isinstance(f, Factor) for f in declared):
        raise TypeError(f"{at} factors() of {name} must list Factors, got {declared!r}.")
    ends = [index for f in declared if not f.unit for index in f.indices]
    for mode in modes:
        if mode not in ends:
            raise ValueError(f"{at} every mode must be in a factor; {name} leaves out {mode!r}.")
    for bond in _bonds(declared, modes):
        if bond == BATCH or re.fullmatch("n[1-9][0-9]*", bond):
            raise ValueError(
                f"{at} a bond must not be named {BATCH!r}, as the batch, or as a mode of more levels; "
                f"{name} has {bond!r}."
            )
        if ends.count(bond) < 2:
            raise ValueError(f"{at} a bond must join two factors or more; {name} has {bond!r} once.")
    return tuple(declared)
