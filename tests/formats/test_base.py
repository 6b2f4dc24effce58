"""Declarations that are no tensor network are refused, where they are registered and where they are used."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt

pytestmark = pytest.mark.usefixtures("registry")


def declared(factors: Callable[[tuple[str, ...]], Any], **attributes: Any) -> type[mt.Format]:
    """A format of the factors that a function of the modes declares."""

    class Declared(mt.Format):
        name = title = "declared"

        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            return factors(modes)

    for key, value in attributes.items():
        setattr(Declared, key, value)
    return Declared


def dense(modes: tuple[str, ...], more: str = "", levels: int = 0, **options: Any) -> list[mt.Factor]:
    """One factor of all modes; from a number of levels on it has more indices."""
    return [mt.Factor(" ".join(modes) + (more if len(modes) - 2 >= levels else ""), **options)]


def star(modes: tuple[str, ...], bond: str, levels: int = 0) -> list[mt.Factor]:
    """One factor a mode, and one bond; from a number of levels on it is another."""
    return [mt.Factor(f"{mode} {bond if len(modes) - 2 >= levels else 'r'}") for mode in modes]


#: A declaration, the level count where it breaks, and the message: the rule, then the offending value.
REFUSED: dict[str, tuple[Callable[[tuple[str, ...]], Any], int, str]] = {
    "no output": (lambda m: [mt.Factor("i")], 0, "every mode must be in a factor; Declared leaves out 'o'"),
    "no experts": (
        lambda m: [mt.Factor("i o")],
        1,
        "every mode must be in a factor; Declared leaves out 'n1'",
    ),
    "no third level": (lambda m: dense((*m[:-2][:2], "i", "o")), 3, "Declared leaves out 'n3'"),
    "a mode in an optional factor alone": (
        lambda m: [mt.Factor("i o"), *(mt.Factor(x, optional=True) for x in m[:-2])],
        1,
        "leaves out 'n1'",
    ),
    "no factors": (lambda m: [], 0, "Declared leaves out 'i'"),
    "a bond of one factor": (
        lambda m: dense(m, " r"),
        0,
        "a bond must join two or more factors; Declared has 'r' once",
    ),
    "a bond of one factor and an optional one": (
        lambda m: [mt.Factor("r", optional=True), *dense(m, " r")],
        0,
        "has 'r' once",
    ),
    "a bond of one factor, two levels": (lambda m: dense(m, " r", 2), 2, "has 'r' once"),
    "a bond of one factor, twelve levels": (lambda m: dense(m, " r", 12), 12, "has 'r' once"),
    "the batch": (
        lambda m: star(m, "B"),
        0,
        r"a bond must not have the name of the batch \('B'\), .*; Declared has 'B'",
    ),
    "the batch, three levels": (lambda m: star(m, "B", 3), 3, "Declared has 'B'"),
    "the mode of the next level": (
        lambda m: star(m, f"n{len(m) - 1}"),
        0,
        "or of a mode of another level; Declared has 'n1'",
    ),
    "the mode of the next level, two levels": (lambda m: star(m, "n3", 2), 2, "Declared has 'n3'"),
    "the mode of a far level": (lambda m: star(m, "n30"), 0, "Declared has 'n30'"),
    "an index twice": (
        lambda m: dense(m, " i", 2),
        2,
        "raises ValueError: a factor's indices must differ .*'n1 n2 i o i'",
    ),
    "a comma": (
        lambda m: star(m, "r,"),
        0,
        "every index must be an identifier, such as 'r' or 'b1', got 'r,'",
    ),
    "an arrow": (lambda m: star(m, "r -> q"), 0, "an identifier, .* got '->'"),
    "a number": (lambda m: star(m, "1"), 0, "an identifier, .* got '1'"),
    "a list of indices": (
        lambda m: [mt.Factor([*m])],
        0,
        "TypeError: a factor's indices must be a string such as 'b1 n1 b2'",
    ),  # type: ignore[arg-type]
    "a list as memory order": (
        lambda m: dense(m, memory_order=[*m]),
        0,
        "TypeError: a factor's indices must be a string such as 'b1 n1 b2'",
    ),
    "an empty memory order": (
        lambda m: dense(m, memory_order=""),
        0,
        "memory_order must reorder the factor's indices 'i o', got ''",
    ),
    "an optional that is no bool": (
        lambda m: dense(m, optional=1),
        0,
        "TypeError: optional must be True or False, got 1",
    ),
    "an error": (
        lambda m: dense(m) if len(m) < 4 else m[9],
        2,
        "raises IndexError: tuple index out of range",
    ),
    "a string": (lambda m: " ".join(m), 0, "of Declared must return a list of Factor, got 'i o'"),
    "nothing": (lambda m: None, 0, "of Declared must return a list of Factor, got None"),
    "strings in a list": (lambda m: [*m], 0, r"of Declared must return a list of Factor, got \['i', 'o'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_declaration_is_refused_where_it_breaks(case: str) -> None:
    factors, levels, message = REFUSED[case]
    refused = pytest.raises((ValueError, TypeError), match=f"^level count {levels}: .*{message}")
    before, format = mt.formats(), declared(factors)
    with refused:
        mt.register(format)
    assert mt.formats() == before
    # One that is not registered is refused by what uses it.
    sizes = dict(experts=(2,) * levels, in_features=3, out_features=5)
    for use in (mt.plan, mt.cost, mt.fit_rank, mt.FactorizedTensor.random):
        with refused:
            use(format(), **sizes, rank=2)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "cp"}, "the name of a format must be unique; 'cp' is CP of mumoe_tensor.formats.cp."),
        ({"name": "sum"}, "the name of a format must be unique; 'sum' is Sum of mumoe_tensor.formats.sums."),
        ({"__init__": lambda self, size: None}, "must not require arguments; Declared() raises"),
        ({"name": 3}, "must have a name, a string; Declared has 3"),
        ({"name": " "}, "must have a name, a string; Declared has ' '"),
        ({"title": None}, "must have a title, a string; Declared has None"),
    ],
)
def test_register_refuses_names(attributes: dict[str, Any], message: str) -> None:
    before = mt.formats()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        mt.register(declared(dense, **attributes))
    assert mt.formats() == before


@pytest.mark.parametrize("bond", ["b", "n", "nu", "n01", "n0", "ni", "o1", "B1", "β", "_"])
def test_names_that_only_look_like_those_of_the_library_are_bonds(bond: str) -> None:
    format = declared(lambda modes: star(modes, bond))()
    weight = mt.FactorizedTensor.random(format, experts=(4, 2), in_features=6, out_features=5, rank=3, seed=0)
    generator = np.random.default_rng(0)
    z, *coefficients = (generator.standard_normal((3, n)) for n in (6, 4, 2))
    expected = np.einsum("abio,Ba,Bb,Bi->Bo", mt.to_dense(weight), *coefficients, z)
    np.testing.assert_allclose(mt.multilinear_moe(weight, z, coefficients), expected, atol=1e-12)


def test_a_factor_without_indices_is_a_scale() -> None:
    format = declared(lambda modes: [mt.Factor(""), *dense(modes)])()
    weight = mt.FactorizedTensor(format, [np.array(2.0), np.ones((4, 3, 5))])
    assert np.all(mt.to_dense(weight) == 2)


def test_factors_are_values() -> None:
    assert len({mt.Factor("a b"), mt.Factor("a b"), mt.Factor("a b", memory_order="b a")}) == 2
