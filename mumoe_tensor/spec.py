"""The sizes of a layer of experts: checks, and the rank that fits a budget of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal, TypedDict, Unpack

from mumoe_tensor.checks import as_entries, as_positive, check_choice, check_flag
from mumoe_tensor.formats.base import MOST_LEVELS, Format, Rank
from mumoe_tensor.formats.registry import AnyFormat, get_format, label
from mumoe_tensor.formats.sums import with_bias

Rounding = Literal["up", "down", "nearest"]


class Sizes(TypedDict, total=False):
    """The keyword arguments of `LayerSpec`, which functions for layers accept instead of a spec."""

    experts: int | Sequence[int]
    in_features: int
    out_features: int
    hidden: int | None
    gated: bool
    rank: int | Sequence[int | None] | None
    bias: bool


@dataclass(frozen=True, init=False, repr=False)
class LayerSpec:
    """Format and sizes of a layer of experts, or of a block of two or three layers that share one gate.

    `plan`, `cost`, `fit_rank` and `FactorizedTensor.random` accept a spec or its arguments.

    Parameters
    ----------
    format : str, dict or Format
    experts : int or sequence of int
        Number of experts at each level; ``()`` for no levels.
    in_features, out_features : int
    hidden : int, optional
        Hidden size of a block, whose layers have the same rank.
    gated : bool, default False
        A block of three layers, as in SwiGLU and GEGLU: two layers to the hidden size, whose outputs are
        multiplied, one of them after the activation.
    rank : int or sequence of int and None, optional
        One entry per bond of the format; see `Format.bonds`. `fitted` solves for a rank that is None, or for
        the one entry that is None. The attributes `rank` (unless it is None) and `experts` are tuples.
    bias : bool, default False
        Whether the input mode has an additional row for the bias.

    Raises
    ------
    ValueError, TypeError
        If a size is not a positive integer, the rank does not fit the format, or the format is unknown.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = mt.LayerSpec("cp", experts=128, in_features=768, out_features=1000, bias=True)
    >>> head.fitted("match")
    LayerSpec('cp', experts=(128,), in_features=768, out_features=1000, rank=(354,), bias=True)
    >>> head.fitted("match").parameters, head.dense_parameters
    (769842, 769000)
    """

    format: Format
    experts: tuple[int, ...]
    in_features: int
    out_features: int
    hidden: int | None
    gated: bool
    rank: tuple[int | None, ...] | None
    bias: bool

    def __init__(
        self,
        format: AnyFormat,
        *,
        experts: int | Sequence[int],
        in_features: int,
        out_features: int,
        hidden: int | None = None,
        gated: bool = False,
        rank: int | Sequence[int | None] | None = None,
        bias: bool = False,
    ):
        format = get_format(format)
        check_flag(bias, "bias")
        check_flag(gated, "gated")
        if gated and hidden is None:
            raise ValueError("gated must be False without hidden, got gated=True.")
        counts = expert_counts(experts)
        is_open = rank is None and format.bonds(len(counts))
        if "i" in format.omits:
            raise ValueError(
                f"a bias must be a term of a sum, as in sum_of('cp', Bias()), got {format!r} for a weight."
            )
        if format.has_bias_term and not bias:
            raise ValueError(f"bias must be True for a format with a bias, got bias=False for {format!r}.")
        checked = {
            "format": format,
            "experts": counts,
            "in_features": as_positive(in_features, "in_features"),
            "out_features": as_positive(out_features, "out_features"),
            "hidden": None if hidden is None else as_positive(hidden, "hidden"),
            "gated": gated,
            "rank": None if is_open else format.check_rank(rank, len(counts)),
            "bias": bias,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # a spec is frozen
        if not format.is_plain:  # the sizes must fit the splits and slices of the format
            rank = (1,) * len(format.bonds(len(counts)))
            for layer in self.layers:
                self.weight_format.shapes(layer.mode_sizes, rank)

    def __repr__(self) -> str:
        parts = [repr(label(self.format))]
        parts += [f"{name}={getattr(self, name)}" for name in ("experts", "in_features", "out_features")]
        optional = ("hidden", "gated", "rank", "bias")
        parts += [f"{name}={value}" for name in optional if (value := getattr(self, name))]
        return f"LayerSpec({', '.join(parts)})"

    @property
    def num_levels(self) -> int:
        """Number of levels of experts."""
        return len(self.experts)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The specs of the single layers, from the input to the output; a single layer returns itself."""
        if self.hidden is None:
            return (self,)
        up = replace(self, out_features=self.hidden, hidden=None, gated=False)
        down = replace(up, in_features=self.hidden, out_features=self.out_features)
        return (up, up, down) if self.gated else (up, down)

    @property
    def mode_sizes(self) -> tuple[int, ...]:
        """Shape (N1, ..., NE, I, O) of the weight of a single layer; I includes the bias row."""
        if self.hidden is not None:
            count = "three" if self.gated else "two"
            raise ValueError(f"a block has {count} weights, each with its spec in `layers`; got {self!r}.")
        return (*self.experts, self.in_features + self.bias, self.out_features)

    @property
    def full_rank(self) -> Rank:
        """The rank; a ValueError is raised if an entry is None."""
        return self.format.full_rank(self.rank, self.num_levels)

    @property
    def weight_format(self) -> Format:
        """The format of the weight: `format`, plus a bias term if the bias cannot be a row of a factor."""
        return with_bias(self.format) if self.bias else self.format

    @property
    def padding(self) -> dict[str, tuple[int, int]]:
        """For each padded mode (``"in_features"``, ...), its size and its padded size."""
        padding = {}
        names = ("in_features", "hidden", "out_features") if self.hidden else ("in_features", "out_features")
        for k, layer in enumerate(self.layers[-2:]):
            terms = self.weight_format.summands(self.num_levels)
            for mode, name, size in zip(
                "io", names[k:], (layer.in_features, layer.out_features), strict=False
            ):
                held = max(term.held(mode, size) for term, _ in terms)
                if held > size:
                    padding[name] = (size, held)
        return padding

    @property
    def weight_parameters(self) -> int:
        """Entries of all factors, including bias rows, without optional factors."""
        format = self.weight_format
        optional = format.optional(self.num_levels)
        return sum(
            prod(shape)
            for layer in self.layers
            for k, shape in enumerate(format.shapes(layer.mode_sizes, self.full_rank))
            if k not in optional
        )

    @property
    def gate_parameters(self) -> int:
        """``in_features * sum(experts)``: one matrix per level, without bias."""
        return self.in_features * sum(self.experts)

    @property
    def parameters(self) -> int:
        """Parameters of the weights and the gate, as in `.nn.MuMoE` and `.nn.MuMoEMLP` without a norm."""
        return self.weight_parameters + self.gate_parameters

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layer or block of the same sizes, with biases if `bias` is true."""
        return sum((layer.in_features + self.bias) * layer.out_features for layer in self.layers)

    @cached_property
    def max_expert_rank(self) -> int:
        """Largest rank that the matrix of an expert can have, without the bias row.

        For a block, it is the smallest over its layers. With the expert modes sliced, the factors are a
        network between the input and the output. Each partition of the factors into an input side and an
        output side writes the matrix as a product whose inner size is the product of the sizes of the indices
        that occur on both sides. The smallest inner size is the bound (the min cut of Cui et al., "Quantum
        max-flow/min-cut", 2016, with a bond of more than two factors counted once). For a sum, the bounds of
        the terms are added. Random factors of the library's formats reach the bound, except possibly if a
        mode is padded or split into three or more parts, or if two terms of a sum split their modes.
        """
        return min(_most_rank(layer, self.full_rank) for layer in self.layers)

    def fitted(
        self, parameters: int | str = "match", *, rounding: Rounding = "up", gate: bool = True
    ) -> LayerSpec:
        """The same layer with the rank that fits a budget of parameters, including bias rows.

        Parameters
        ----------
        parameters : int or str, default "match"
            The budget: a number, ``"match"`` for `dense_parameters`, or a multiple of it such as ``"2x"``.
        rounding : {"up", "down", "nearest"}, default "up"
            The smallest rank with at least as many parameters, the largest with at most as many, or the
            nearer of the two.
        gate : bool, default True
            Include `gate_parameters`.

        Raises
        ------
        ValueError
            If even the smallest rank exceeds the budget, or no rank reaches it; if the format has no rank; or
            if the rank is given without exactly one entry of None.

        Notes
        -----
        If the rank is None, it follows the format's convention, `Format.default_rank`: a single number for
        CP, ``(4, ..., 4, R)`` for Tensor Ring and Train, and for Tucker ranks proportional to the sizes of
        the modes and at most as large.
        """
        check_choice(rounding, ("up", "down", "nearest"), "rounding")
        check_flag(gate, "gate")
        budget = as_budget(parameters, self.dense_parameters)
        family = self._family()

        def total(t: int) -> int:
            return replace(self, rank=family(t)).weight_parameters + gate * self.gate_parameters

        if total(1) > budget:
            raise ValueError(
                f"the smallest rank must fit the budget of {budget:,} parameters; format "
                f"{label(self.format)!r} has {total(1):,} at rank {family(1)}, of which the gate alone has "
                f"{gate * self.gate_parameters:,}."
            )
        t = size_for(total, budget, rounding)
        if total(t) < budget and rounding == "up":
            raise ValueError(
                f"some rank must reach the budget of {budget:,} parameters; format {label(self.format)!r} "
                f"has {total(t):,} at its full rank {family(t)}."
            )
        return replace(self, rank=family(t))

    def with_full_rank_experts(self) -> LayerSpec:
        """The same layer with the smallest rank of the format's convention that allows experts of full rank.

        With a smaller rank an expert is a bottleneck, and may not learn what a linear layer would learn. The
        bonds of expert modes do not increase the rank of an expert: in Tucker they are at most 4, like the
        small bonds of Tensor Ring and Train. A split mode keeps its size, since the convention may depend on
        its parts.

        Examples
        --------
        >>> from mumoe_tensor import LayerSpec
        >>> LayerSpec("tr", experts=64, in_features=512, out_features=100).with_full_rank_experts().rank
        (4, 4, 25)
        """
        full = [min(layer.in_features, layer.out_features) for layer in self.layers]
        sizes = (*(min(n, 4) for n in self.experts), max(full), max(full))
        if self.format.is_split:
            largest_in = max(layer.in_features for layer in self.layers)
            largest_out = max(layer.out_features for layer in self.layers)
            sizes = (*sizes[:-2], largest_in, largest_out)

        def at(t: int) -> LayerSpec:
            return replace(self, rank=self.format.rank_family(sizes, t))

        def is_full(t: int) -> bool:
            parts = zip(at(t).layers, full, strict=True)
            return all(layer.max_expert_rank >= rank for layer, rank in parts)

        return at(bisect_left(range(1, max(sizes)), True, key=is_full) + 1)

    def _family(self) -> Callable[[int], Rank]:
        """Ranks as a function of one integer: the format's convention, or `rank` with None replaced by it."""
        if not self.format.bonds(self.num_levels):
            raise ValueError(
                f"a format must have a rank to be fitted; format {label(self.format)!r} has none, and "
                f"{self.weight_parameters:,} parameters without the gate."
            )
        if (rank := self.rank) is None:
            # The layers of a block share a rank, so the smallest of their sizes bounds it.
            sizes = tuple(map(min, zip(*(layer.mode_sizes for layer in self.layers), strict=True)))
            return lambda t: self.weight_format.rank_family(sizes, t)
        if rank.count(None) != 1:
            raise ValueError(f"exactly one entry of the rank must be None, the one to solve for, got {rank}.")
        return lambda t: tuple(t if r is None else r for r in rank)


def expert_counts(experts: int | Sequence[int]) -> tuple[int, ...]:
    """Check the numbers of experts, and return one for each level."""
    counts = tuple(as_positive(n, "every number of experts") for n in as_entries(experts, "experts"))
    if len(counts) > MOST_LEVELS:
        raise ValueError(f"experts must have at most {MOST_LEVELS} levels, got {len(counts)}.")
    return counts


def as_spec(format: AnyFormat | LayerSpec, **sizes: Unpack[Sizes]) -> LayerSpec:
    """Return a spec unchanged, or make one from a format and sizes."""
    if not isinstance(format, LayerSpec):
        return LayerSpec(format, **sizes)
    if sizes:
        raise TypeError(
            "a LayerSpec must be passed without sizes (change them with dataclasses.replace) and without "
            f"unknown arguments, got {', '.join(sizes)}."
        )
    return format


def fit_rank(
    format: AnyFormat | LayerSpec,
    *,
    parameters: int | str = "match",
    gate: bool = False,
    rounding: Rounding = "up",
    **sizes: Unpack[Sizes],
) -> int | Rank:
    """Solve for the rank that fits a budget of parameters.

    By default this is the smallest rank with at least as many parameters as the budget.

    The gate is included only with ``gate=True``.

    Parameters
    ----------
    format : str, Format or LayerSpec
        A format together with `sizes`, or the spec of a layer or a block.
    parameters, gate, rounding : optional
        See `LayerSpec.fitted`, which includes the gate by default.
    **sizes
        The arguments of a `LayerSpec`, unless `format` is one.

    Returns
    -------
    int or tuple of int
        A tuple with one entry per bond; an int if the format has one bond and no rank was given.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = dict(experts=64, in_features=768, out_features=1000, bias=True)
    >>> mt.fit_rank("tr", rank=(4, 4, None), gate=True, **head)
    (4, 4, 102)
    """
    spec = as_spec(format, **sizes)
    rank = spec.fitted(parameters, rounding=rounding, gate=gate).full_rank
    return rank[0] if spec.rank is None and len(rank) == 1 else rank


def size_for(total: Callable[[int], int], budget: int, rounding: Rounding = "up", least: int = 1) -> int:
    """The size that fits a budget of parameters, where `total` grows with the size; see `LayerSpec.fitted`.

    The total of the least size must be at most the budget. If the total stops growing below the budget, the
    result is the smallest size with the largest total.
    """
    top = least
    while total(top) < budget and total(2 * top) > total(top):
        top *= 2
    size = bisect_left(range(top), budget, lo=least, key=total)
    over = total(size) - budget
    if over > 0 and (rounding == "down" or (rounding == "nearest" and budget - total(size - 1) <= over)):
        size -= 1
    return size


def as_budget(parameters: int | str, dense: int) -> int:
    """Convert a budget to a number; ``"match"`` is `dense`, and ``"0.5x"`` is half of it."""
    if not isinstance(parameters, str):
        return as_positive(parameters, "parameters")
    text = "1x" if parameters == "match" else parameters.replace(",", "").replace("_", "")
    try:
        budget = round(float(text[:-1]) * dense) if text.endswith("x") else int(text)
    except (ValueError, OverflowError):
        budget = 0
    if budget < 1:
        raise ValueError(
            f"parameters must be match, a positive number, or a multiple such as 0.5x; got {parameters!r}."
        )
    return budget


def dense_parameters(
    in_features: int, out_features: int, hidden: int | None = None, bias: bool = True, gated: bool = False
) -> int:
    """Parameters of the dense layer, or with `hidden` the dense block, that a mixture replaces."""
    return LayerSpec(
        "dense", experts=(), in_features=in_features, out_features=out_features, hidden=hidden, bias=bias,
        gated=gated,
    ).dense_parameters  # fmt: skip


def _most_rank(layer: LayerSpec, rank: Rank) -> int:
    """Largest rank of the matrix of an expert: the sum over the terms that contain the expert."""
    experts = replace(layer, bias=False) if not layer.format.has_bias_term else layer
    terms = [term for term in layer.format.terms(experts.mode_sizes, rank) if "i" not in term.format.omits]
    most = most_of_an_expert(
        [term.format for term in terms], layer.experts, [_smallest_cut(*term[:3]) for term in terms]
    )
    return min(most, layer.in_features, layer.out_features)


def most_of_an_expert(terms: Sequence[Format], experts: Sequence[int], amounts: Sequence[int]) -> int:
    """The largest sum, over all experts, of the amounts of the terms that contain the expert."""
    windows = [[term.window(e) or (0, n) for e, n in enumerate(experts)] for term in terms]
    starts = [sorted({window[e][0] for window in windows}) for e in range(len(experts))]
    return max(
        sum(
            amount
            for amount, window in zip(amounts, windows, strict=True)
            if all(start <= n < stop for n, (start, stop) in zip(expert, window, strict=True))
        )
        for expert in product(*starts)
    )


def _smallest_cut(format: Format, mode_sizes: tuple[int, ...], rank: Rank) -> int:
    """Smallest product of the sizes of the indices that an input and an output side of the factors share."""
    num_levels = len(mode_sizes) - 2
    index_sizes = format.index_sizes(mode_sizes, rank)
    inputs, outputs = format.parts("i"), format.parts("o")
    experts = {x for x in format.modes(num_levels) if x not in inputs + outputs}
    sliced = {frozenset(f.indices).difference(experts) for f in format.declaration(num_levels)}
    # A factor whose indices are a subset of those of another adds nothing to a cut with both on one side.
    factors = [f for f in sliced if not any(f < other for other in sliced)]
    cuts = []
    for sides in product((False, True), repeat=len(factors)):
        near = set(inputs).union(*(f for f, is_far in zip(factors, sides, strict=True) if not is_far))
        far = set(outputs).union(*(f for f, is_far in zip(factors, sides, strict=True) if is_far))
        cuts.append(prod(index_sizes[x] for x in near & far))
    return min(cuts)
