"""The rank that spends a budget of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

from mumoe_tensor.checks import as_positive, check_choice, check_flag
from mumoe_tensor.cost import dense_parameters, layer_sizes, max_expert_rank
from mumoe_tensor.cost import parameters as count_parameters
from mumoe_tensor.formats.base import Format, Rank, check_modes
from mumoe_tensor.formats.registry import get_format

Rounding = Literal["up", "down", "nearest"]


def fit_rank(
    format: str | Format,
    *,
    experts: int | Sequence[int],
    in_features: int,
    out_features: int,
    parameters: int | str = "match",
    rank: int | Sequence[int | None] | None = None,
    hidden: int | None = None,
    bias: bool = False,
    gate: bool = False,
    rounding: Rounding = "up",
) -> int | Rank:
    """Solve for the rank at which a layer has a given number of parameters.

    Parameters
    ----------
    format : str or Format
    experts : int or sequence of int
        Number of experts, one number a level; ``()`` for no level.
    in_features, out_features : int
    parameters : int or str, default "match"
        The budget; ``"match"`` for what the dense layer (or block) of these sizes has, with biases if
        `bias` is true, or a multiple of that as ``"2x"``.
    rank : sequence of int and None, optional
        The rank with None in the one place to be solved for. If it is left out, the format's convention:
        the one rank of CP, ``(4, ..., 4, None)`` for Tensor Ring and Train, and for Tucker ranks
        proportional to the sizes of the modes and at most those.
    hidden : int, optional
        Two layers, ``in_features`` to `hidden` to ``out_features``, of one rank, with one gate.
    bias : bool, default False
        Count the bias row of the input mode.
    gate : bool, default False
        Count the gate's ``in_features * sum(experts)``.
    rounding : {"up", "down", "nearest"}, default "up"
        The smallest rank with at least the budget, the largest with at most it, or the nearer of the two.

    Returns
    -------
    int or tuple of int
        A tuple with one entry a bond; an int for a format of one bond whose rank was left out.

    Raises
    ------
    ValueError
        If even the smallest rank costs more than the budget, or no rank reaches it; if the format has no
        rank, or not exactly one entry of `rank` is None.
    TypeError
        If a size is not an integer.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = dict(experts=64, in_features=768, out_features=1000, bias=True, gate=True)
    >>> mt.fit_rank("tr", rank=(4, 4, None), **head)
    (4, 4, 102)
    """
    format = get_format(format)
    check_choice(rounding, ("up", "down", "nearest"), "rounding")
    check_flag(gate, "gate")
    experts = check_modes(experts, in_features, out_features)[:-2]
    layers = [
        check_modes(experts, inner, outer, bias)
        for inner, outer in layer_sizes(in_features, hidden, out_features)
    ]
    gate_parameters = in_features * sum(layers[0][:-2]) if gate else 0
    budget = as_budget(parameters, dense_parameters(in_features, out_features, hidden, bias))
    family = _family(format, rank, layers)

    def total(t: int) -> int:
        return gate_parameters + sum(count_parameters(format, modes, family(t)) for modes in layers)

    if total(1) > budget:
        raise ValueError(
            f"the smallest rank must fit the budget of {budget:,} parameters; format {format.name!r} has "
            f"{total(1):,} at rank {family(1)}, of which the gate alone has {gate_parameters:,}."
        )
    above = 1
    while total(above) < budget:
        if family(2 * above) == family(above):
            if rounding == "up":
                raise ValueError(
                    f"some rank must reach the budget of {budget:,} parameters; format {format.name!r} has "
                    f"{total(above):,} at its full rank {family(above)}."
                )
            return _as_given(family(above), rank)
        above *= 2
    # Invariant: total(below) < budget <= total(above), but for below = 0, which is no rank.
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if total(middle) < budget else (below, middle)
    if total(above) == budget or rounding == "up":
        return _as_given(family(above), rank)
    if rounding == "down" or budget - total(below) <= total(above) - budget:
        return _as_given(family(below), rank)
    return _as_given(family(above), rank)


def as_budget(parameters: int | str, dense: int) -> int:
    """The number of parameters that is asked for.

    Parameters
    ----------
    parameters : int or str
        A number, also as text; ``"match"``, or a multiple as ``"0.5x"``, for those of the dense layer.
    dense : int
        Parameters of the dense layer.

    Raises
    ------
    ValueError
        If it is none of these, or not positive.
    TypeError
        If it is a number and no integer.
    """
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


def full_rank(
    format: str | Format,
    *,
    experts: int | Sequence[int],
    in_features: int,
    out_features: int,
    hidden: int | None = None,
) -> Rank:
    """The smallest rank of a format's convention at which the matrix of an expert can have full rank.

    With less an expert is a bottleneck, and may not learn what the linear layer does in its place.

    Parameters
    ----------
    format : str or Format
    experts : int or sequence of int
    in_features, out_features : int
    hidden : int, optional
        Two layers of one rank, with this size between them; both are to have full rank.

    Returns
    -------
    tuple of int
        One entry a bond. Those of the expert modes do not raise the rank of an expert: in Tucker they are at
        most 4, as the other bonds of Tensor Ring and Train.

    Examples
    --------
    >>> from mumoe_tensor.budget import full_rank
    >>> full_rank("tr", experts=64, in_features=512, out_features=100)
    (4, 4, 25)
    """
    format = get_format(format)
    layers = [
        check_modes(experts, inner, outer) for inner, outer in layer_sizes(in_features, hidden, out_features)
    ]
    needed = max(min(modes[-2:]) for modes in layers)
    sizes = (*(min(n, 4) for n in layers[0][:-2]), needed, needed)

    def is_full(t: int) -> bool:
        rank = format.default_rank(sizes, t)
        return all(max_expert_rank(format, modes, rank) >= min(modes[-2:]) for modes in layers)

    return format.default_rank(sizes, bisect_left(range(1, max(sizes)), True, key=is_full) + 1)


def _family(
    format: Format, rank: int | Sequence[int | None] | None, layers: list[tuple[int, ...]]
) -> Callable[[int], Rank]:
    """Ranks that grow with one integer: the format's own, or `rank` with that integer for None."""
    levels = len(layers[0]) - 2
    if not format.bonds(levels):
        costs = sum(count_parameters(format, modes, ()) for modes in layers)
        raise ValueError(
            f"a format must have a rank to be fitted; format {format.name!r} has none and costs {costs:,} "
            "parameters without the gate."
        )
    if rank is None:
        # Two layers share a rank, so the smaller of their sizes bounds it.
        sizes = tuple(map(min, *layers)) if len(layers) > 1 else layers[0]
        return lambda t: format.default_rank(sizes, t)
    entries = format.check_rank(rank, levels)
    if entries.count(None) != 1:
        raise ValueError(f"exactly one entry of the rank must be None, the one to solve for, got {rank!r}.")
    return lambda t: tuple(t if r is None else r for r in entries)


def _as_given(fitted: Rank, rank: int | Sequence[int | None] | None) -> int | Rank:
    return fitted[0] if rank is None and len(fitted) == 1 else fitted
