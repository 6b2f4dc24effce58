"""Dense weights to factorized ones: exact where the rank is there, bounded where it is not."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.backend import backend_of, tensorly_backend
from mumoe_tensor.decomposition import decompose
from mumoe_tensor.formats.sums import with_bias

EXPERTS = [(), (4,), (3, 4)]
FORMATS = list(mt.formats())


class BlockTerm(mt.Format):
    """A sum of Tucker blocks: stands for a format of a user's own, without a decomposition."""

    name = "test-block-term"
    title = "Block term"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        bonds = [f"r_{m}" for m in modes]
        return [mt.Factor(" ".join(["k", *bonds])), *(mt.Factor(f"k {m} r_{m}") for m in modes)]


def some_rank(format: str | mt.Format, levels: int) -> tuple[int, ...]:
    """Twos, and three for the last bond."""
    return (
        tuple(2 + last for last in [0] * 9 + [1])[-len(bonds) :] if (bonds := _bonds(format, levels)) else ()
    )


def _bonds(format: str | mt.Format, levels: int) -> tuple[str, ...]:
    return mt.get_format(format).bonds(levels)


def random_dense(format: str | mt.Format, experts: tuple[int, ...], seed: int, **options: Any) -> Any:
    """With a bias; it has 7 inputs, but 6 where they are split."""
    rank, inputs = some_rank(format, len(experts)), 7 - mt.get_format(format).splits_input
    sizes: dict[str, Any] = {"experts": experts, "in_features": inputs, "out_features": 6, "rank": rank}
    return mt.to_dense(mt.FactorizedTensor.random(format, **sizes, bias=True, seed=seed, **options))


def relative(weight: Any, dense: Any) -> float:
    dense = np.asarray(dense, dtype=np.float64)
    return float(
        np.linalg.norm(np.asarray(mt.to_dense(weight), dtype=np.float64) - dense) / np.linalg.norm(dense)
    )


@pytest.fixture(scope="module")
def real() -> Any:
    """A pretrained weight, (3, 80, 480): see data/README.md."""
    with np.load(Path(__file__).parents[1] / "data" / "lite0_expand.npz") as file:
        return file["weight"]


def tail(matrix: Any, rank: int) -> float:
    """Relative error of the best matrix of that rank (Eckart and Young)."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


def mode_tail(dense: Any, mode: int, rank: int) -> float:
    return tail(np.moveaxis(dense, mode, 0).reshape(dense.shape[mode], -1), rank)


# ---- a tensor that has the rank is found -------------------------------------------------------------


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, BlockTerm()], ids=lambda f: getattr(f, "name", f))
def test_exact_recovery(format: str | mt.Format, experts: tuple[int, ...]) -> None:
    dense = random_dense(format, experts, 0)
    rank = some_rank(format, len(experts))
    # Two starts are enough, but where all of them are random.
    weight, error = decompose(dense, format, rank, bias=True, n_restarts=2 if isinstance(format, str) else 8)
    assert weight.format == with_bias(mt.get_format(format))
    assert (weight.shape, weight.rank) == (dense.shape, rank)
    assert error < 1e-6
    assert relative(weight, dense) < 1e-6


@pytest.mark.parametrize("format", ["tucker", "cp", "kron", "shared-expert"])
def test_scale_is_no_matter(format: str) -> None:
    dense = random_dense(format, (4,), 0)
    for scale in (1e-200, 1e200):
        weight, error = decompose(scale * dense, format, some_rank(format, 1), bias=True, n_restarts=2)
        assert error < 1e-6
        np.testing.assert_allclose(mt.to_dense(weight) / scale, dense, atol=1e-6)


@pytest.mark.parametrize("experts", EXPERTS[:2], ids=str)
@pytest.mark.parametrize("format", [name for name in FORMATS if mt.get_format(name).is_split])
def test_padding_is_no_part_of_the_error(format: str, experts: tuple[int, ...]) -> None:
    """A weight is recovered although the factors are not zero in the padding."""
    padded = mt.get_format(format).with_splits({"i": (2, 4), "o": (3, 3)})
    rank = (2,) * len(padded.bonds(len(experts)))
    truth = mt.FactorizedTensor.random(
        padded, experts=experts, in_features=7, out_features=8, rank=rank, seed=0
    )
    weight, error = decompose(mt.to_dense(truth), padded, rank, n_restarts=4)
    assert weight.format == padded
    assert error < 1e-6
    assert relative(weight, mt.to_dense(truth)) < 1e-6


# ---- one that has not is approximated as well as can be ----------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_error_falls_with_rank(format: str, real: Any) -> None:
    real = real[:, :40, :120]
    errors = []
    for t in (1, 4, 12):
        rank = (t,) * len(_bonds(format, 1))
        weight, error = decompose(real, format, rank, n_restarts=2, n_iter=20)
        assert weight.arrays[0].dtype == np.float32
        assert error == pytest.approx(relative(weight, real), rel=1e-3, abs=1e-6)
        errors.append(error)
    if _bonds(format, 1):
        assert 1 > errors[0] > errors[1] + 0.01 > errors[2] + 0.04
    else:
        assert len(set(errors)) == 1


@pytest.mark.parametrize("rank", [(1, 8), (2, 32), (3, 80)])
def test_tensor_train_bounds(rank: tuple[int, int], real: Any) -> None:
    n, _, o = real.shape
    tails = [tail(real.reshape(n, -1), rank[0]), tail(real.reshape(-1, o), rank[1])]
    _, error = decompose(real, "tt", rank)
    assert max(tails) - 1e-6 <= error <= np.hypot(*tails) + 1e-6
    # Oseledets 2011, corollary 2.4: within sqrt(d - 1) of the best.
    assert error <= np.sqrt(2) * max(tails) + 1e-6


@pytest.mark.parametrize("rank", [(1, 8, 8), (2, 16, 32), (3, 40, 80), (3, 80, 240)])
def test_tucker_bounds(rank: tuple[int, ...], real: Any) -> None:
    tails = [mode_tail(real, m, r) for m, r in enumerate(rank)]
    _, error = decompose(real, "tucker", rank, n_restarts=1)
    assert max(tails) - 1e-6 <= error <= np.linalg.norm(tails) + 1e-6
    higher_order_svd = real
    for m, r in enumerate(rank):
        u = np.linalg.svd(np.moveaxis(real, m, 0).reshape(real.shape[m], -1), full_matrices=False)[0][:, :r]
        higher_order_svd = np.moveaxis(np.tensordot(u @ u.T, higher_order_svd, (1, m)), 0, m)
    assert error <= np.linalg.norm(higher_order_svd - real) / np.linalg.norm(real) + 1e-6


def test_cp_and_ring_bounds(real: Any) -> None:
    real = real[:, :40, :120]
    _, error = decompose(real, "cp", 12, n_restarts=2)
    assert max(mode_tail(real, m, 12) for m in range(3)) <= error < 0.85
    rank = (2, 2, 6)
    _, error = decompose(real, "tr", rank, n_restarts=2)
    products = [rank[m] * rank[(m + 1) % 3] for m in range(3)]
    # Any ring beats the train inside it, if it is fitted.
    train = decompose(real, "tt", rank[1:])[1]
    assert max(mode_tail(real, m, r) for m, r in enumerate(products)) <= error < train


def test_hadamard_is_the_best_tensor_of_rank_one_of_every_output(real: Any) -> None:
    _, error = decompose(real.astype(np.float64), "hadamard")
    kept = np.linalg.svd(np.moveaxis(real.astype(np.float64), -1, 0), compute_uv=False)[:, 0]
    assert error == pytest.approx(np.sqrt(1 - (kept**2).sum() / np.linalg.norm(real.astype(np.float64)) ** 2))


def test_hadamard_with_levels_is_cp_of_rank_one_for_every_output() -> None:
    dense = np.random.default_rng(3).standard_normal((3, 4, 5, 6))
    errors = [decompose(dense[..., [o]], "cp", 1, n_restarts=16)[1] for o in range(6)]
    expected = np.linalg.norm(errors * np.sqrt((dense**2).sum((0, 1, 2))))
    expected /= np.linalg.norm(dense)
    assert decompose(dense, "hadamard", n_restarts=1)[1] > expected + 1e-3
    assert decompose(dense, "hadamard", n_restarts=16)[1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("format, rank", [("cp", 6), ("tucker", (6, 6)), ("tt", 6), ("tr", (2, 3))])
def test_without_experts_it_is_the_truncated_svd(format: str, rank: Any, real: Any) -> None:
    matrix = real[0, :40, :60].astype(np.float64)
    assert decompose(matrix, format, rank)[1] == pytest.approx(tail(matrix, 6), rel=1e-6)


def test_train_and_tucker_are_monotone_in_each_rank(real: Any) -> None:
    real = real[:, :24, :32]
    for t in range(1, 25, 4):
        base = [decompose(real, "tt", (n, t))[1] for n in (1, 2, 3)] + [decompose(real, "tt", (3, t + 4))[1]]
        assert base == sorted(base, reverse=True)
    grid = [(1, 4, 4), (2, 4, 4), (2, 8, 4), (2, 8, 16), (3, 16, 16), (3, 24, 16), (3, 24, 32)]
    errors = [decompose(real, "tucker", rank, n_restarts=1)[1] for rank in grid]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


# ---- starts and seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [*FORMATS, BlockTerm()], ids=lambda f: getattr(f, "name", f))
def test_more_starts_never_hurt_and_seeds_decide(format: str | mt.Format) -> None:
    dense = np.random.default_rng(1).standard_normal((4, 4, 6))
    rank = some_rank(format, 1)
    runs = [decompose(dense, format, rank, n_restarts=n, n_iter=20) for n in (1, 2, 4)]
    errors = [error for _, error in runs]
    assert errors == sorted(errors, reverse=True)
    again, error = decompose(dense, format, rank, n_restarts=4, n_iter=20)
    assert error == errors[-1]
    for a, b in zip(again.arrays, runs[-1][0].arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_first_start_is_from_singular_vectors(real: Any) -> None:
    tensor_ring = pytest.importorskip("tensorly.decomposition").tensor_ring
    matrix = real[0, :40, :60].astype(np.float64)
    assert decompose(matrix, "cp", 6, n_restarts=1, n_iter=1)[1] == pytest.approx(tail(matrix, 6), rel=1e-9)
    dense = real[:, :12, :20].astype(np.float64)
    with tensorly_backend("numpy"):
        for ring in ((1, 3, 4), (3, 1, 4), (4, 3, 3)):
            # The last ring has too large a core for the experts: only a turned one can begin.
            turn = 2 * (ring[0] > 3)
            order = [*range(turn, 3), *range(turn)]
            cores = tensor_ring(dense.transpose(order), [*(ring[j] for j in order), ring[turn]]).factors
            fitted = np.einsum("aib,bjc,cka->ijk", *cores).transpose(np.argsort(order))
            error = np.linalg.norm(fitted - dense) / np.linalg.norm(dense)
            assert decompose(dense, "tr", ring, n_restarts=1, n_iter=1)[1] <= error + 1e-9


def test_starts_differ_and_depend_on_the_seed() -> None:
    dense = np.random.default_rng(1).standard_normal((4, 9, 8))
    for format, rank in {"cp": 4, "tr": (2, 2, 2)}.items():
        assert len({decompose(dense, format, rank, n_restarts=n, seed=3)[1] for n in (1, 16)}) == 2
    actual = {
        decompose(dense, BlockTerm(), (2, 2, 2, 2), n_restarts=1, seed=s)[1] for s in (0, 1, None, None)
    }
    assert len(actual) == 4


@pytest.mark.parametrize("format", ["cp", "tucker", "tr", "kron"])
def test_no_global_is_changed(format: str) -> None:
    pytest.importorskip("torch")
    tensorly = pytest.importorskip("tensorly")
    dense = random_dense(format, (4,), 0)
    dense = dense + 0.1 * np.random.default_rng(1).standard_normal(dense.shape)
    expected = decompose(dense, format, some_rank(format, 1), bias=True, n_restarts=2)[1]
    state = np.random.get_state()
    with tensorly_backend("pytorch"), warnings.catch_warnings():
        before = list(warnings.filters), np.geterr()
        weight, error = decompose(dense, format, some_rank(format, 1), bias=True, n_restarts=2)
        assert tensorly.get_backend() == "pytorch"
        assert (list(warnings.filters), np.geterr()) == before
    assert error == expected
    assert isinstance(weight.arrays[0], np.ndarray)
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))


# ---- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, bound", [("float64", 1e-6), ("float32", 1e-6), ("float16", 3e-3), ("bfloat16", 3e-2)]
)
@pytest.mark.parametrize("format", ["cp", "tr", "btt"])
def test_torch(format: str, dtype: str, bound: float) -> None:
    torch = pytest.importorskip("torch")
    dense = torch.from_numpy(random_dense(format, (4,), 2)).to(getattr(torch, dtype)).requires_grad_()
    weight, error = decompose(dense, format, some_rank(format, 1), bias=True, n_restarts=2)
    for array, f in zip(weight.factors, weight.format.declaration(1), strict=True):
        if array is None:
            continue
        assert (array.dtype, array.device, array.requires_grad) == (dense.dtype, dense.device, False)
        assert array.permute([f.indices.index(x) for x in f.memory_order]).is_contiguous()
    doubles = mt.FactorizedTensor(
        weight.format, [a if a is None else a.double().numpy() for a in weight.factors], weight.shape
    )
    assert error == pytest.approx(relative(doubles, dense.detach().double().numpy()), rel=1e-6, abs=1e-14)
    assert error < bound


@pytest.mark.parametrize("format", ["cp", "tr", "btt"])
def test_jax(format: str) -> None:
    jax = pytest.importorskip("jax")
    dense = jax.numpy.asarray(random_dense(format, (4,), 2), dtype="float32")
    weight, error = decompose(dense, format, some_rank(format, 1), bias=True, n_restarts=2)
    assert all(isinstance(a, jax.Array) and a.dtype == dense.dtype for a in weight.arrays)
    assert error < 1e-6
    assert relative(weight, dense) < 1e-5


def test_half_precision_does_not_overflow() -> None:
    torch = pytest.importorskip("torch")
    dense = 6e4 * torch.ones(4, 6, 4, dtype=torch.float16)
    for format in FORMATS:
        assert decompose(dense, format, some_rank(format, 1))[1] < 2e-3


@pytest.mark.parametrize("format", FORMATS)
def test_factors_have_like_norms(format: str) -> None:
    dense = 1e6 * random_dense(format, (4,), 0)
    weight, _ = decompose(dense, format, some_rank(format, 1), bias=True, n_restarts=1)
    for term in weight.terms:
        norms = [np.linalg.norm(a) for a in term.arrays]
        assert max(norms) <= 4 * min(norms)


def test_stacked_experts_and_biases() -> None:
    dense = random_dense("cp", (3, 4), 0)
    expected = decompose(dense, "cp", 3, bias=True, n_restarts=1)
    stacks = [[dense[a, b] for b in range(4)] for a in range(3)]
    bare = [[matrix[:-1] for matrix in row] for row in stacks]
    for arguments, bias in ((stacks, True), (bare, dense[:, :, -1]), (dense[:, :, :-1], dense[:, :, -1])):
        weight, error = decompose(arguments, "cp", 3, bias=bias, n_restarts=1)
        assert error == expected[1]
        np.testing.assert_array_equal(weight.arrays[0], expected[0].arrays[0])


@pytest.mark.parametrize("experts", [(), (3,), (2, 3)])
def test_biases_are_the_last_row_of_the_input_mode(experts: tuple[int, ...]) -> None:
    dense = np.random.default_rng(0).standard_normal((*experts, 5, 4))
    weight, error = decompose(dense[..., :-1, :], "dense", bias=dense[..., -1, :])
    np.testing.assert_array_equal(weight.arrays[0], dense)
    assert error == 0
    for shape in ((*experts, 4, 4), (*experts, 5), (*experts[1:], 4, 1), (4, *experts)[: len(experts)]):
        with pytest.raises(ValueError, match="bias must have the shape of dense without its input mode"):
            decompose(dense[..., :-1, :], "dense", bias=np.ones(shape))


@pytest.mark.parametrize("format, function", [("cp", "parafac"), ("tucker", "tucker")])
def test_sweeps_and_starts_are_those_asked_for(
    format: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorly.decomposition

    original, calls = getattr(tensorly.decomposition, function), []

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append(inspect.signature(original).bind(*arguments, **options).arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(tensorly.decomposition, function, recorded)
    dense = np.random.default_rng(0).standard_normal((4, 5, 3))
    decompose(dense, format, some_rank(format, 1), n_restarts=3, n_iter=7, tolerance=0.25)
    assert [call["n_iter_max"] for call in calls] == [7] * 3
    if format == "tucker":
        assert [call["tol"] for call in calls] == [0.25] * 3
        assert calls[0]["init"] == "svd"
        starts = [call["init"][1] for call in calls[1:]]
        ranks = some_rank("tucker", 1)
        for start in starts:
            assert [f.shape for f in start] == [
                (n, min(n, r)) for n, r in zip(dense.shape, ranks, strict=True)
            ]
        assert not np.array_equal(starts[0][0], starts[1][0])


@settings(max_examples=settings().max_examples // 2)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    ranks=st.lists(st.integers(1, 5), min_size=8, max_size=8),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_and_rank(format: str, shape: list[int], ranks: list[int], zeros: float, seed: int) -> None:
    """Sizes of one, ranks the tensor cannot use, padding, slices of zeros: no warning, an honest error."""
    declared = mt.get_format(format)
    if declared.is_split:  # most of these sizes have no factorization
        declared = declared.with_splits({"i": (2, 2), "o": (2, 2)})
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal(shape) * (generator.random(shape[-1]) >= zeros)
    rank = tuple(ranks[: len(_bonds(format, len(shape) - 2))])
    weight, error = decompose(dense, declared, rank, n_restarts=3, n_iter=20)
    assert (weight.shape, weight.rank) == (tuple(shape), rank)
    assert 0 <= error <= 1 + 1e-12
    np.testing.assert_allclose(
        np.linalg.norm(mt.to_dense(weight) - dense), error * np.linalg.norm(dense), atol=1e-9
    )


@pytest.mark.parametrize("format", [*FORMATS, BlockTerm()], ids=lambda f: getattr(f, "name", f))
def test_zeros(format: str | mt.Format) -> None:
    weight, error = decompose(np.zeros((4, 4, 6)), format, some_rank(format, 1))
    assert error == 0
    assert not mt.to_dense(weight).any()
    assert backend_of(*weight.arrays).backend_name == "numpy"


# ---- errors ------------------------------------------------------------------------------------------

W = np.ones((4, 3, 5))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dense": np.ones(5)}, ValueError, r"shape \(experts..., input, output\), got \(5,\)"),
    ({"dense": np.ones(5), "bias": np.ones(5)}, ValueError, r"got \(5,\)"),
    ({"dense": np.array(1.0)}, ValueError, r"got \(\)"),
    ({"dense": np.ones((4, 3, 5), dtype=int)}, TypeError, "floating dtype, .* got dense: int64"),
    ({"dense": W + 1j}, TypeError, "floating dtype, .* got dense: complex128"),
    ({"dense": 3.0}, TypeError, "must be plain NumPy, PyTorch or JAX arrays, got float"),
    ({"dense": []}, ValueError, "at least one expert, got none"),
    ({"dense": [np.ones((2, 3)), np.ones((3, 3))]}, ValueError, r"the same shape, got \(2, 3\) and \(3, 3\)"),
    ({"dense": [np.ones((2, 3)), np.ones((2, 3), "float32")]}, TypeError, "the same floating dtype"),
    ({"dense": np.ones((0, 3, 5))}, ValueError, "number of experts must be positive, got 0"),
    ({"dense": np.ones((4, 3, 0))}, ValueError, "out_features must be positive, got 0"),
    ({"dense": np.where(np.arange(5) < 2, np.nan, W)}, ValueError, "must be finite, got 24 that are not"),
    ({"dense": np.where(np.arange(5) < 1, np.inf, W)}, ValueError, "must be finite, got 12 that are not"),
    ({"format": "cpd"}, ValueError, "unknown format 'cpd'; the formats are"),
    ({"rank": None}, ValueError, "one entry per bond, r; got None"),
    ({"rank": (2, 2)}, ValueError, r"one entry per bond, r; got \(2, 2\)"),
    ({"rank": 0}, ValueError, "every rank must be positive, got 0"),
    ({"rank": 2.0}, TypeError, "every rank must be an integer, got 2.0"),
    ({"format": "tucker", "rank": 2}, ValueError, "one entry per bond, "),
    ({"format": "tr", "rank": (2, 2, 2, 2)}, ValueError, "one entry per bond, "),
    ({"format": "hadamard", "rank": 3}, ValueError, "must have no entries"),
    ({"dense": np.ones((4, 1, 5)), "bias": True}, ValueError, "in_features must be positive, got 0"),
    ({"bias": 1}, TypeError, "bias must be True, False or a plain array, got int"),
    ({"bias": np.ones((4, 3))}, ValueError, r"got \(4, 3\) for dense of shape \(4, 3, 5\)"),
    (
        {"bias": np.ones((4, 5), "float32")},
        TypeError,
        "the same floating dtype, .* got dense: float64, bias: float32",
    ),
    ({"n_restarts": 0}, ValueError, "n_restarts must be positive, got 0"),
    ({"n_restarts": 1.5}, TypeError, "n_restarts must be an integer, got 1.5"),
    ({"n_iter": 0}, ValueError, "n_iter must be positive, got 0"),
    ({"tolerance": -1.0}, ValueError, "at least 0 and less than 1, got -1.0"),
    ({"tolerance": float("nan")}, ValueError, "tolerance must be finite, got nan"),
    ({"tolerance": "tight"}, TypeError, "tolerance must be a number, got 'tight'"),
    ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
    ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
]


@pytest.mark.parametrize("changed, error, message", BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_calls(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"dense": W, "format": "cp", "rank": 2, **changed}
    with pytest.raises(error, match=message):
        decompose(arguments.pop("dense"), arguments.pop("format"), **arguments)
