"""Factors matched with declarations: what follows from the arrays, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import mumoe_tensor as mt
from mumoe_tensor.formats import Bias, Format, Sum, mode_names
from mumoe_tensor.matching import levels_of, match
from mumoe_tensor.testing import Problem, problems

PROBLEMS = problems(backend="numpy", dtype="float64", leading=())
ones = np.ones


def with_counts(format: Format, num_levels: int) -> Format:
    """The format with the numbers of parts in place of their sizes."""
    if isinstance(format, Sum):
        terms = tuple(with_counts(term, num_levels) for term in format.formats)
        return format if terms == format.formats else Sum(terms)
    modes = [mode for mode in mode_names(num_levels) if mode in format.splits]
    return format.with_splits({mode: len(format.parts(mode)) for mode in modes})


def split(name: str, **splits: Any) -> Format:
    return mt.formats()[name].with_splits(splits)


class Twice(mt.Format):
    """Two factors of all modes, either of which may be missing, and one that has a bond with both."""

    name = title = "twice"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        each = mt.Factor(f"{' '.join(modes)} r")
        return [each, each, mt.Factor("r")]


# ---- what follows from the factors -------------------------------------------------------------------


@given(PROBLEMS)
def test_format_shape_and_rank_come_back(problem: Problem) -> None:
    """The sizes of the parts too, where the format has only their number."""
    layer, factors = problem.layer, problem.weight.factors
    format, shape = layer.weight_format, layer.mode_sizes
    for declared in (format, with_counts(format, layer.num_levels)):
        matched = match(declared, factors, shape)
        assert (matched.format, matched.shape, matched.rank) == (format, shape, layer.full_rank)
        assert all(one is other for one, other in zip(matched.factors, factors, strict=True))


@given(PROBLEMS)
def test_the_shape_is_asked_for_only_where_it_does_not_follow(problem: Problem) -> None:
    format, shape, factors = problem.layer.weight_format, problem.layer.mode_sizes, problem.weight.factors
    asked = match(format, factors, shape).asked
    try:
        alone = match(format, factors, None)
    except ValueError as error:
        assert "a shape must be given" in str(error)
        assert asked == shape
    else:
        assert alone.asked is None
        assert asked == (None if alone.shape == shape else shape)
        assert len(alone.shape) != len(shape) or all(a >= b for a, b in zip(alone.shape, shape, strict=True))


SLICES = mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("cp", 2, 3))
#: Format, factors, the shape that is given, and that of the weight.
FOLLOWS: dict[str, tuple[Any, list[Any], Any, Any]] = {
    "a whole mode": ("dense", [ones((4, 6, 8))], None, (4, 6, 8)),
    "parts": ("btt", [ones((4, 1)), ones((2, 3, 1, 2)), ones((2, 2, 1, 4))], None, (4, 6, 8)),
    "fewer than the parts hold": (
        "btt",
        [ones((4, 1)), ones((2, 3, 1, 2)), ones((2, 2, 1, 4))],
        (4, 5, 7),
        (4, 5, 7),
    ),
    "a whole mode before parts": (
        mt.sum_of("btt", "dense"),
        [ones((4, 1)), ones((2, 3, 1, 2)), ones((2, 2, 1, 4)), ones((4, 5, 7))],
        None,
        (4, 5, 7),
    ),
    "the fewest of several parts": (
        mt.sum_of("monarch", "monarch"),
        [ones((2, 3, 2)), ones((2, 2, 4)), ones((5, 1, 2)), ones((2, 5, 5))],
        None,
        (5, 8),
    ),
    "a term of all experts beside a slice": (
        mt.sum_of(mt.sliced("dense", 1, 3), "dense"),
        [ones((2, 6, 8)), ones((4, 6, 8))],
        None,
        (4, 6, 8),
    ),
    "slices alone": (SLICES, [ones((n, 1)) for n in (2, 6, 8, 1, 6, 8)], (3, 6, 8), (3, 6, 8)),
    "a shared matrix": (mt.shared("dense"), [ones((6, 8))], None, (6, 8)),
    "a shared matrix of experts": (mt.shared("dense"), [ones((6, 8))], (3, 2, 6, 8), (3, 2, 6, 8)),
    "the row of a bias": (
        mt.sum_of("dense", Bias()),
        [ones((4, 6, 8)), ones(8)],
        None,
        (4, 7, 8),
    ),
    "a bias without a bias term": ("dense", [ones((4, 7, 8))], None, (4, 7, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWS)
def test_the_shape(case: str) -> None:
    format, factors, shape, expected = FOLLOWS[case]
    weight = mt.FactorizedTensor(format, factors, shape)
    assert weight.shape == expected
    assert mt.to_dense(weight).shape == expected


def test_parts_are_adopted_only_where_they_are_not_the_default() -> None:
    factors = [ones((2, 4, 1, 2)), ones((2, 2, 1, 3))]
    assert match(mt.get_format("btt"), factors, None).format == split("btt")
    uneven = match(mt.get_format("btt"), [ones((4, 2, 1, 2)), ones((2, 4, 1, 3))], None).format
    assert dict(uneven.splits) == {"i": (4, 2), "o": 2}
    padded = match(mt.get_format("btt"), factors, (7, 6)).format
    assert dict(padded.splits) == {"i": (2, 4), "o": 2}


# ---- levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", range(4))
@pytest.mark.parametrize("name", mt.formats())
def test_the_number_of_levels_is_that_of_the_axes(name: str, num_levels: int) -> None:
    format = mt.formats()[name]
    shapes = format.shapes((2,) * num_levels + (4, 6), (1,) * len(format.bonds(num_levels)))
    factors = tuple(map(ones, shapes))
    optional = format.optional(num_levels)
    filled = tuple(None if k in optional else factor for k, factor in enumerate(factors))
    left_out = [factor for factor in filled if factor is not None]
    for given_, expected in ((factors, factors), (filled, filled), (left_out, filled)):
        levels, arrays = levels_of(format, given_)
        assert levels == num_levels
        assert all(one is other for one, other in zip(arrays, expected, strict=True))
    wrong = (2,) * (num_levels + 1) + (4, 6)
    with pytest.raises(ValueError, match=f"the factors of format '{name}' must be .* got arrays of shapes"):
        levels_of(format, factors, wrong)


def test_factors_may_be_missing_where_others_have_their_modes() -> None:
    array, core = np.random.default_rng(0).standard_normal((4, 5, 3, 2)), np.array([2.0, 3.0])
    for factors in ([array, None, core], [None, array, core], [array, array, None]):
        weight = mt.FactorizedTensor(Twice(), factors)
        assert weight.missing == (next(k for k, f in enumerate(factors) if f is None),)
        expected = np.einsum(
            "nior,r->nio",
            array * array if factors[2] is None else array,
            ones(2) if factors[2] is None else core,
        )
        np.testing.assert_allclose(mt.to_dense(weight), expected, atol=1e-12)


# ---- what does not fit -------------------------------------------------------------------------------

KRON = [ones((2, 2, 1)), ones((3, 4, 1))]
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a shape that is a text": (
        lambda: match(mt.get_format("dense"), [ones((6, 8))], "68"),  # type: ignore[arg-type]
        TypeError,
        "shape must be an integer or a sequence of integers, got '68'",
    ),
    "a shape of floats": (
        lambda: match(mt.get_format("dense"), [ones((6, 8))], (6.0, 8)),  # type: ignore[arg-type]
        TypeError,
        "every size of a shape must be an integer, got 6.0",
    ),
    "a size of zero": (
        lambda: match(mt.get_format("dense"), [ones((6, 8))], (0, 8)),
        ValueError,
        "every size of a shape must be positive, got 0",
    ),
    "a shape of one size": (
        lambda: match(mt.get_format("dense"), [ones((6, 8))], (8,)),
        ValueError,
        r"a shape must be \(experts..., input, output\), got \(8,\)",
    ),
    "no factors": (
        lambda: match(mt.get_format("tt"), [], None),
        ValueError,
        r"'tt' must be n1 b2 \| b2 i b3 \| b3 o \(for one level of experts\), got arrays of shapes none\.",
    ),
    "factors that are all missing": (
        lambda: match(mt.get_format("tt"), [None, None], None),
        ValueError,
        "None only if other factors have its modes",
    ),
    "a factor too many": (
        lambda: match(mt.get_format("tt"), [ones((6, 1)), ones((1, 8)), None], None),
        ValueError,
        r"got arrays of shapes \(6, 1\), \(1, 8\), None",
    ),
    "integers": (
        lambda: match(mt.get_format("dense"), [ones((6, 8), int)], None),
        TypeError,
        r"floating dtype.*factor\[0\]: int64",
    ),
    "several dtypes": (
        lambda: match(mt.get_format("tt"), [ones((6, 1)), ones((1, 8), "float32")], None),
        TypeError,
        r"factor\[0\]: float64, factor\[1\]: float32",
    ),
    "an empty axis": (
        lambda: match(mt.get_format("tt"), [ones((6, 0)), ones((0, 8))], None),
        ValueError,
        r"every size must be positive, got factor\[0\] of shape \(6, 0\)",
    ),
    "bonds of two sizes": (
        lambda: match(mt.get_format("tt"), [ones((4, 2)), ones((2, 6, 3)), ones((4, 8))], None),
        ValueError,
        r"must have the same size there; 'b3' has size 3 in factor\[1\] and 4 in factor\[2\]",
    ),
    "bonds of two sizes, in the second term": (
        lambda: match(
            mt.sum_of("dense", "tt"), [ones((6, 8)), ones((6, 2)), ones((3, 8))], None
        ),
        ValueError,
        r"'b2' has size 2 in factor\[1\] and 3 in factor\[2\]",
    ),
    "a mode of one factor alone": (
        lambda: match(mt.get_format("tt"), [ones((4, 2)), None, ones((3, 8))], None),
        ValueError,
        r"factor\[1\] of format 'tt', which has 'b2'",
    ),
    "a mode of one factor alone, in the second term": (
        lambda: match(mt.sum_of("dense", "hadamard"), [ones((4, 6, 8)), None, ones((6, 8))], None),
        ValueError,
        r"factor\[1\] of format 'hadamard', which has 'n1'",
    ),
    "a bond of one factor alone": (
        lambda: match(Twice(), [None, ones((4, 6, 8, 2)), None], None),
        ValueError,
        r"its bonds still join two factors, got None for factor\[0\] of format 'twice', which has 'r'",
    ),
    "slices without a shape": (
        lambda: match(SLICES, [ones((n, 1)) for n in (2, 6, 8, 1, 6, 8)], None),
        ValueError,
        r"a shape must be given .* mode 'n1' of format sum_of\(sliced\('cp', 0, 2\)",
    ),
    "a whole mode that is larger": (
        lambda: match(mt.get_format("dense"), [ones((6, 9))], (6, 8)),
        ValueError,
        "must match the weight; mode 'o' must have 8 entries, but has 9 in the factors of format 'dense'",
    ),
    "a whole mode that is smaller": (
        lambda: match(mt.get_format("dense"), [ones((6, 7))], (6, 8)),
        ValueError,
        "mode 'o' must have 8 entries, but has 7 in the factors of format 'dense'",
    ),
    "parts that hold too little": (
        lambda: match(mt.get_format("kron"), KRON, (7, 8)),
        ValueError,
        "mode 'i' must have 7 entries, but has 2 x 3 in the factors of format 'kron'",
    ),
    "terms of two sizes": (
        lambda: match(mt.sum_of("dense", "tt"), [ones((6, 8)), ones((6, 2)), ones((2, 9))], None),
        ValueError,
        "mode 'o' must have 8 entries, but has 9 in the factors of format 'tt'",
    ),
    "a slice of another number of experts": (
        lambda: match(mt.sliced("dense", 1, 3), [ones((3, 6, 8))], (4, 6, 8)),
        ValueError,
        "mode 'n1' must have 2 entries, but has 3 in the factors of format 'sliced'",
    ),
    "a slice of experts that there are not": (
        lambda: match(mt.sliced("dense", 1, 3), [ones((2, 6, 8))], (2, 6, 8)),
        ValueError,
        "a slice must be within the experts of a level",
    ),
    "a slice of a level that there is not": (
        lambda: match(mt.sliced("dense", 1, 3, level=1), [ones((2, 6, 8))], (2, 6, 8)),
        ValueError,
        r"ends at 3 in level 1, of levels with \(2,\) experts",
    ),
    "a bias row that a term has too": (
        lambda: match(mt.sum_of("dense", Bias()), [ones((7, 8)), ones(8)], (7, 8)),
        ValueError,
        "mode 'i' must have 6 entries, but has 7 in the factors of format 'dense'",
    ),
    "other parts than the format has": (
        lambda: match(split("kron", i=(3, 2)), KRON, None),
        ValueError,
        r"mode 'i' is split into \(3, 2\) in the format, but \(2, 3\) in the factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_factors_of_two_backends_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="must belong to one backend, got numpy and pytorch"):
        match(mt.get_format("tt"), [ones((6, 1)), torch.ones(1, 8)], None)
