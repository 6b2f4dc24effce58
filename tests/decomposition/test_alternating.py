"""Alternating least squares for any format, and methods that formats register."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.decomposition import alternating, fits
from mumoe_tensor.testing import dense_weight


class SharedMode(mt.Format):
    """The input mode is in two factors: each of its entries is a problem by itself."""

    name, title = "shared-mode", "Shared mode"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor(" ".join([*modes[:-1], "r"])), mt.Factor("i o r")]


class Product(mt.Format):
    """A matrix product, fitted by a method of its own: the fits that its class holds."""

    name, title = "product", "Product"
    fits: Sequence[Any] = ()

    def __init__(self, side: int = 0):
        self.side = side

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor(" ".join([*modes[:-1], "r"])), mt.Factor("r o")]


@fits.register(Product)
def registered(
    format: Product, dense: Any, rank: Any, generators: Any, n_iter: int, tolerance: float
) -> Sequence[Any]:
    asked.append((format, dense, rank, len(generators), n_iter, tolerance))
    return Product.fits


asked: list[Any] = []


def truncated(dense: Any, rank: int) -> list[Any]:
    """The best factors of that rank, of `dense` divided as `decompose` does."""
    u, s, v = np.linalg.svd(dense.reshape(-1, dense.shape[-1]), full_matrices=False)
    scale = 2.0 ** -np.frexp(np.abs(dense).max())[1]
    return [scale * (u[:, :rank] * s[:rank]).reshape(*dense.shape[:-1], rank), v[:rank]]


def tail(dense: Any, rank: int) -> float:
    values = np.linalg.svd(dense.reshape(-1, dense.shape[-1]), compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


# ---- methods ---------------------------------------------------------------------------------------------


def test_the_best_fit_of_a_registered_method_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 4, 5))
    monkeypatch.setattr(Product, "fits", [truncated(dense, r) for r in (1, 3, 2)])
    weight, error = mt.decompose(dense, Product(7), 3, n_restarts=7, n_iter=11, tolerance=0.25)
    assert error == pytest.approx(tail(dense, 3))
    assert weight.rank == (3,)
    format, target, *settings = asked[-1]
    assert settings == [(3,), 7, 11, 0.25]
    assert format == Product(7) == weight.format
    np.testing.assert_array_equal(target, dense * 2.0 ** -np.frexp(np.abs(dense).max())[1])


def test_smaller_bonds_are_filled_up_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 4, 5))
    monkeypatch.setattr(Product, "fits", [truncated(dense, r) for r in (1, 2)])
    weight, error = mt.decompose(dense, Product(), 3)
    assert weight.rank == (3,)
    assert error == pytest.approx(tail(dense, 2))


def test_a_fit_that_is_not_finite_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 4))
    monkeypatch.setattr(Product, "fits", [[np.full((3, 3), np.nan), np.ones((3, 4))], truncated(dense, 3)])
    assert mt.decompose(dense, Product(), 3)[1] < 1e-12


def test_a_method_without_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Product, "fits", [])
    with pytest.raises(ValueError, match="at least one fit"):
        mt.decompose(np.ones((3, 4)), Product(), 1)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 1)],
        [(3, 1), (1, 4), (1,)],
        [(3, 2), (2, 4)],
        [(2, 1), (1, 4)],
        [(3, 1, 1), (1, 4)],
        [(3, 1), None],
    ],
)
def test_what_is_not_the_declared_factors_is_an_error(
    shapes: list[tuple[int, ...] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = [None if shape is None else np.ones(shape) for shape in shapes]
    monkeypatch.setattr(Product, "fits", [factors])
    with pytest.raises(ValueError, match=r"declared factors, of shapes \[\(3, 1\), \(1, 4\)\]"):
        mt.decompose(np.ones((3, 4)), Product(), 1)


def test_a_subclass_takes_the_method_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 4))
    monkeypatch.setattr(Product, "fits", [truncated(dense, 1)])
    derived = type("Derived", (Product,), {})()
    assert mt.decompose(dense, derived, 1)[1] == pytest.approx(tail(dense, 1))
    assert asked[-1][0] is derived


# ---- alternating least squares ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_mode_in_two_factors(rank: int) -> None:
    dense = np.random.default_rng(0).standard_normal((6, 3, 4))
    weight, error = mt.decompose(dense, SharedMode(), rank, n_restarts=2, n_iter=2000, tolerance=1e-9)
    # The best solution of each problem is a truncated SVD.
    values = np.linalg.svd(dense.transpose(1, 0, 2), compute_uv=False)
    assert error == pytest.approx(np.linalg.norm(values[:, rank:]) / np.linalg.norm(dense), abs=1e-4)
    assert np.linalg.norm(dense_weight(weight) - dense) / np.linalg.norm(dense) == pytest.approx(error)


def test_sweeps_are_those_asked_for_and_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    stop = lambda tolerance: lambda _, error: bool(errors.append(error))  # noqa: E731
    monkeypatch.setattr(alternating, "stop_rule", stop)
    dense = np.random.default_rng(0).standard_normal((4, 5, 3))
    for format, rank in {SharedMode(): (2,), mt.get_format("tr"): (2, 2, 2)}.items():
        errors.clear()
        mt.decompose(dense, format, rank, n_restarts=2, n_iter=7)
        assert len(errors) == 14
        assert (np.diff(errors[:7]) < 1e-9).all()


def test_a_format_of_one_factor() -> None:
    class Whole(mt.Format):
        name = title = "whole"

        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            return [mt.Factor(" ".join(reversed(modes)))]

    dense = np.random.default_rng(0).standard_normal((4, 5, 3))
    weight, error = mt.decompose(dense, Whole(), n_restarts=1)
    assert error == 0
    np.testing.assert_array_equal(weight.arrays[0], dense.transpose())


def test_stop_rule() -> None:
    stop = alternating.stop_rule(0.1)
    answers = [stop(None, np.float64(error)) for error in (1.0, 0.5, 0.5, 0.2, 0.19, 0.18)]
    assert answers == [False] * 5 + [True]
    assert answers[-1] is True, "TensorLy asks for True itself"
