"""Gates against a float64 bisection, on every backend and for rows that are hard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_rows import nasty, slow

from mumoe_tensor import gates
from mumoe_tensor.backend import backend_of, dtype_name

entmax = pytest.importorskip("entmax")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

K = 3
INF, NAN = np.inf, np.nan


def top_3(x: Any, axis: int = -1) -> Any:
    return gates.top_k(x, min(K, x.shape[axis]), axis)


def most_probable_3(x: Any, axis: int = -1) -> Any:
    return gates.top_k(x, min(K, x.shape[axis]), axis, normalize=False)


def relu_top_3(x: Any, axis: int = -1) -> Any:
    return gates.relu_top_k(x, min(K, x.shape[axis]), axis)


def uniform_top_3(x: Any, axis: int = -1) -> Any:
    return gates.uniform_top_k(x, min(K, x.shape[axis]), axis)


def sigmoid_top_3(x: Any, axis: int = -1) -> Any:
    return gates.sigmoid_top_k(x, min(K, x.shape[axis]), axis)


def scaled_sigmoid(x: Any, axis: int = -1) -> Any:
    return gates.sigmoid_top_k(x, min(K, x.shape[axis]), axis, normalize=False, scale=2.5)


def jumprelu_over_one(x: Any, axis: int = -1) -> Any:
    return gates.jumprelu(x, 1.0, axis)


AXIS_GATES = {"entmax15": gates.entmax15, "sparsemax": gates.sparsemax, "softmax": gates.softmax}
#: Gates whose coefficients sum to one, and all.
GATES = {**AXIS_GATES, "top_k": top_3}
ALL_GATES = {
    **GATES,
    "top_k, not normalised": most_probable_3,
    "relu_top_k": relu_top_3,
    "uniform_top_k": uniform_top_3,
    "sigmoid_top_k": sigmoid_top_3,
    "sigmoid_top_k, scaled": scaled_sigmoid,
    "jumprelu": jumprelu_over_one,
}
#: Functions that have a k.
WITH_K = {
    "top_k": gates.top_k,
    "top_k, not normalised": partial(gates.top_k, normalize=False),
    "relu_top_k": gates.relu_top_k,
    "uniform_top_k": gates.uniform_top_k,
    "sigmoid_top_k": gates.sigmoid_top_k,
    "sigmoid_top_k, scaled": gates.sigmoid_top_k,
}
BACKENDS = ("numpy", "torch", "jax")
DTYPES = {
    "numpy": ("float16", "float32", "float64"),
    "torch": ("float16", "bfloat16", "float32", "float64"),
    "jax": ("float16", "bfloat16", "float32", "float64"),
}
every_gate = pytest.mark.parametrize("gate", GATES)
each_of_all_gates = pytest.mark.parametrize("gate", ALL_GATES)
each_with_derivatives = pytest.mark.parametrize(
    "gate", [name for name in ALL_GATES if name != "uniform_top_k"]
)
#: The sigmoid rounds large logits to one: which of them are the largest depends on the dtype.
each_with_an_order = pytest.mark.parametrize("gate", [name for name in ALL_GATES if "sigmoid" not in name])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _x64_is_left_alone() -> Iterator[None]:
    before = jax.config.read("jax_enable_x64")
    yield
    assert jax.config.read("jax_enable_x64") == before


def array(backend: str, x: Any, dtype: str = "float32") -> Any:
    """Call it for float64 on JAX under ``jax.enable_x64(True)``."""
    if backend == "torch":
        return torch.tensor(x).to(getattr(torch, dtype))
    return jnp.asarray(x, dtype) if backend == "jax" else np.asarray(x, dtype)


def numpy(x: Any) -> np.ndarray:
    """Any array as NumPy's float64."""
    return np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x, np.float64)


def on(backend: str, gate: Callable) -> Callable:
    """The gate, compiled on JAX, where each new shape would take seconds otherwise."""
    return jax.jit(gate, static_argnums=1) if backend == "jax" else gate


def run(gate: Callable, backend: str, x: Any, dtype: str = "float32", axis: int = -1) -> np.ndarray:
    with jax.enable_x64(dtype == "float64"):
        return numpy(on(backend, gate)(array(backend, x, dtype), axis))


# --------------------------------------------------------------------------------------------- oracles


def bisection(x: np.ndarray, power: int) -> np.ndarray:
    """Solve Σ max(x / power − τ, 0)^power = 1 for one row in float64."""
    z = (x.astype(np.float64) - np.float64(x.max())) / power
    near = z[z > -1]
    low, high = -1.0, 0.0
    for _ in range(55):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(near - middle, 0) ** power).sum() > 1 else (low, middle)
    return np.maximum(z - low, 0) ** power


def exponentials(x: np.ndarray, k: int | None = None) -> np.ndarray:
    kept = np.argsort(-x.astype(np.float64), kind="stable")[:k]
    e = np.zeros(x.shape)
    e[kept] = np.exp(x[kept].astype(np.float64) - np.float64(x.max()))
    return e / e.sum()


def largest(x: np.ndarray, k: int, values: Any) -> np.ndarray:
    """The values of the k largest entries of x, none of them a mask, and zero elsewhere."""
    kept = np.argsort(-x.astype(np.float64), kind="stable")[:k]
    kept = kept[x[kept] > -INF]
    p = np.zeros(x.shape)
    p[kept] = np.broadcast_to(values, x.shape)[kept]
    return p


def normalised(p: np.ndarray) -> np.ndarray:
    return p / p.sum()


ORACLES = {
    "entmax15": partial(bisection, power=2),
    "sparsemax": partial(bisection, power=1),
    "softmax": exponentials,
    "top_k": partial(exponentials, k=K),
    "top_k, not normalised": lambda x: largest(x, K, exponentials(x)),
    "relu_top_k": lambda x: largest(x, K, np.maximum(x.astype(np.float64), 0)),
    "uniform_top_k": lambda x: normalised(largest(x, K, 1.0)),
    "jumprelu": lambda x: np.where(x > 1, x.astype(np.float64), 0),
}


@cache
def expected(gate: str, n: int) -> np.ndarray:
    return np.stack([ORACLES[gate](row) for row in nasty(n).values()])


@every_gate
@every_backend
@pytest.mark.parametrize("n", [1, 2, 17, 64, 256, 4096])
def test_nasty_rows(gate: str, backend: str, n: int) -> None:
    p = run(GATES[gate], backend, np.stack(list(nasty(n).values())))
    for name, ours, exact in zip(nasty(n), p, expected(gate, n), strict=True):
        assert np.abs(ours - exact).max() <= 3e-7, name
        assert abs(ours.sum() - 1) <= 2e-6, name
        # What is zero is zero, unless the logit is within rounding of the threshold.
        assert not (ours[exact == 0] > 1e-13).any(), name


@every_backend
@pytest.mark.parametrize("gate", ["entmax15", "sparsemax"])
def test_a_million_entries(gate: str, backend: str) -> None:
    n = 2**20
    names = ["all equal", "every second masked", "ties at the threshold", f"slow for {gate}"]
    names += ["tied cloud of 0.01"] if gate == "entmax15" else ["cloud of 0.3, sparsemax"]
    for name in names:
        row = nasty(n)[name]
        p = run(GATES[gate], backend, row)
        assert np.abs(p - large(gate, name)).max() <= 3e-7, name
        assert abs(p.sum() - 1) <= 2e-6, name


@cache
def large(gate: str, name: str) -> np.ndarray:
    return ORACLES[gate](nasty(2**20)[name])


@every_gate
def test_a_slow_axis(gate: str) -> None:
    # NumPy adds along it one by one, where nothing is done about it.
    rows = np.stack([0.3 + 1e-4 * np.random.default_rng(0).random(2**18), np.full(2**18, 0.1)])
    for row, p in zip(rows, run(GATES[gate], "numpy", rows.T.copy(), axis=0).T, strict=True):
        np.testing.assert_allclose(p, ORACLES[gate](row.astype(np.float32)), atol=3e-7)
        assert abs(p.sum() - 1) <= 2e-6


@every_gate
@every_backend
def test_float64(gate: str, backend: str) -> None:
    n = 256
    p = run(GATES[gate], backend, np.stack(list(nasty(n).values())), "float64")
    np.testing.assert_allclose(p, expected(gate, n), atol=1e-14, rtol=1e-13)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-14)


def test_slow_rows_in_float64() -> None:
    rows = {"entmax15": 2 * slow(256, 0.85, 0.4922, 0.1, 4), "sparsemax": slow(4096, 0.725, 0.2717, 0.1, 2)}
    for gate, row in rows.items():
        p = GATES[gate](row)
        np.testing.assert_allclose(p, ORACLES[gate](row), atol=1e-14)
        assert abs(p.sum() - 1) <= 1e-14


@pytest.mark.parametrize("n", [3, 1000, 4096])
@pytest.mark.parametrize("gate", ["entmax15", "sparsemax"])
def test_equals_the_entmax_package(gate: str, n: int) -> None:
    x = 2 * torch.randn(16, n, generator=torch.Generator().manual_seed(n))
    theirs = getattr(entmax, gate)(x, dim=-1)
    torch.testing.assert_close(GATES[gate](x), theirs, atol=1e-6, rtol=0)


@every_backend
def test_known_values(backend: str) -> None:
    def values(gate: Callable, x: list[float], *k: int) -> list[float]:
        return numpy(on(backend, gate)(array(backend, x), *k)).round(4).tolist()

    assert values(gates.entmax15, [-2, 0, 0.5]) == [0, 0.3260, 0.6740]
    assert values(gates.sparsemax, [-2, 0, 0.5]) == [0, 0.25, 0.75]
    assert values(gates.softmax, [0, np.log(3)]) == [0.25, 0.75]
    assert values(gates.top_k, [1, np.log(3), 0, -1], 2) == [0.4754, 0.5246, 0, 0]
    # The lowest index wins, also between equal logits on both sides of a larger one, and −0 equals 0.
    assert values(gates.top_k, [0, 2, 2, 2, 2], 2) == [0, 0.5, 0.5, 0, 0]
    assert values(gates.top_k, [1, 9, 1, 1], 3) == [0.0003, 0.9993, 0.0003, 0]
    assert values(gates.top_k, [-0.0, 0.0, -0.0], 1) == [1, 0, 0]
    # Logits that differ by less than the rounding of their distance to the largest.
    assert values(gates.top_k, [1e-8, 2e-8, 1], 2) == [0, 0.2689, 0.7311]


# ------------------------------------------------------------------------------------------- properties


@st.composite
def logits(draw: st.DrawFn, backend: str = "numpy", ties: bool = True) -> tuple[np.ndarray, int]:
    """Logits and an axis, with masks, and with at least one entry in a row that is none."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, draw(st.integers(1, 9)))
    if backend == "jax":  # compiles for each
        shape, axis = draw(st.sampled_from([([2, 4, 3], 1), ([0, 3], 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-2, 2))
    if ties and draw(st.booleans()):
        x = x.round()
    masked = rng.random(shape) < draw(st.sampled_from([0, 0.5, 1]))
    np.moveaxis(masked, axis, -1)[..., -1] = False
    x[masked] = -INF
    return x, axis - draw(st.sampled_from([0, len(shape)]))


def along(function: Callable, x: np.ndarray, axis: int) -> np.ndarray:
    return np.apply_along_axis(function, axis, x) if x.size else x


@each_with_an_order
@every_backend
@given(data=st.data())
def test_equals_the_oracle_and_keeps_all_else(gate: str, backend: str, data: st.DataObject) -> None:
    x, axis = data.draw(logits(backend))
    dtype = data.draw(st.sampled_from(DTYPES[backend][-2 if backend == "jax" else 0 :]))
    with jax.enable_x64(dtype == "float64"):
        x = array(backend, x, dtype)
        before = numpy(x)
        p = on(backend, ALL_GATES[gate])(x, axis)
        assert backend_of(p) is backend_of(x) and dtype_name(p) == dtype and p.shape == x.shape
        assert (numpy(x) == before).all()
        p = numpy(p)
    # Half a unit in the last place of numbers up to one, where the result is rounded.
    rounding = {"float16": 2**-12, "bfloat16": 2**-9, "float32": 3e-7, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(p, along(ORACLES[gate], before, axis), atol=1.01 * rounding)
    assert (p >= 0).all()


@every_gate
@given(logits=logits(), shift=st.floats(-100, 100))
@settings(max_examples=settings().max_examples // 2)
def test_a_shift_changes_nothing(gate: str, logits: Any, shift: float) -> None:
    x, axis = logits
    x = np.round(x * 2**20) / 2**20  # so that the shift does not round
    shift = round(shift * 2**20) / 2**20
    np.testing.assert_array_equal(GATES[gate](x + shift, axis), GATES[gate](x, axis))


@each_with_an_order
@given(logits=logits(ties=False), data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_a_permutation_of_logits_permutes_coefficients(gate: str, logits: Any, data: st.DataObject) -> None:
    x, axis = logits
    order = data.draw(st.permutations(range(x.shape[axis])))
    permuted = ALL_GATES[gate](np.take(x, order, axis), axis)
    np.testing.assert_allclose(permuted, np.take(ALL_GATES[gate](x, axis), order, axis), atol=1e-14)


@each_of_all_gates
@every_backend
@given(data=st.data(), bad=st.sampled_from([NAN, INF, -INF]), seed=st.integers(0, 99))
@settings(max_examples=settings().max_examples // 2)
def test_a_bad_row_is_nan_and_harms_no_other(
    gate: str, backend: str, data: st.DataObject, bad: float, seed: int
) -> None:
    x, axis = data.draw(logits(backend))
    rng = np.random.default_rng(seed)
    good = run(ALL_GATES[gate], backend, x, axis=axis)
    rows = np.moveaxis(x.copy(), axis, -1)
    harmed = rng.random(rows.shape[:-1]) < 0.5
    if bad == -INF:
        rows[harmed] = -INF
    else:
        rows[harmed, rng.integers(rows.shape[-1])] = bad
    p = run(ALL_GATES[gate], backend, np.moveaxis(rows, -1, axis), axis=axis)
    p, good = np.moveaxis(p, axis, -1), np.moveaxis(good, axis, -1)
    assert np.isnan(p[harmed]).all()
    np.testing.assert_array_equal(p[~harmed], good[~harmed])


@each_of_all_gates
@pytest.mark.parametrize("experts", [3, 5])
def test_a_masked_row_is_nan_without_a_warning(gate: str, experts: int) -> None:
    rows = np.stack([np.full(experts, -INF), np.arange(experts, dtype=float)])
    p = ALL_GATES[gate](rows)
    assert np.isnan(p[0]).all() and np.isfinite(p[1]).all()
    assert np.isnan(ALL_GATES[gate](rows[0])).all()


@each_of_all_gates
@every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_only_at_the_end(gate: str, backend: str, dtype: str) -> None:
    if dtype not in DTYPES[backend]:
        pytest.skip("NumPy has no bfloat16")
    x = array(backend, np.random.default_rng(0).standard_normal((7, 300)), dtype)
    wide = array(backend, numpy(x))
    np.testing.assert_array_equal(
        numpy(ALL_GATES[gate](x)), numpy(array(backend, numpy(ALL_GATES[gate](wide)), dtype))
    )


# ------------------------------------------------------------------------------------------ derivatives


def smooth(gate: str, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Logits near which no coefficient becomes zero or ceases to be, found by trial."""
    rng = np.random.default_rng(0)
    while True:
        x = rng.standard_normal(shape)
        support = ALL_GATES[gate](x, axis) > 0
        near = x + 1e-3 * rng.standard_normal((50, *shape))
        if all(((ALL_GATES[gate](v, axis) > 0) == support).all() for v in near):
            return x


@each_with_derivatives
@pytest.mark.parametrize(("shape", "axis"), [((6,), 0), ((2, 5), -1), ((4, 2, 2), 0), ((1, 1), 1)])
def test_torch_gradcheck(gate: str, shape: tuple[int, ...], axis: int) -> None:
    x = torch.tensor(smooth(gate, shape, axis), requires_grad=True)
    assert torch.autograd.gradcheck(ALL_GATES[gate], (x, axis))
    assert torch.autograd.gradgradcheck(ALL_GATES[gate], (x, axis))


def jacobian(gate: str, p: np.ndarray) -> np.ndarray:
    """Of one row, in closed form: symmetric."""
    s = {"entmax15": np.sqrt(p), "sparsemax": (p > 0).astype(float)}.get(gate, p)
    return np.diag(s) - np.outer(s, s) / s.sum()


def hessian(gate: str, p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The second derivative of c·p for one row, in closed form."""
    s = {"entmax15": np.sqrt(p), "sparsemax": (p > 0).astype(float)}.get(gate, p)
    # How s moves with the logits, and c·p's gradient s (c − (s·c) / Σ s) with s.
    ds = {
        "entmax15": (np.diag(p > 0) - np.outer(p > 0, s) / s.sum()) / 2,
        "sparsemax": np.zeros((p.size, p.size)),
    }
    mean = s @ c / s.sum()
    return (np.diag(c - mean) - np.outer(s, c - mean) / s.sum()) @ ds.get(gate, jacobian(gate, p))


@every_gate
def test_derivatives_equal_closed_forms(gate: str) -> None:
    function = GATES[gate]
    x = np.append(smooth(gate, (6,), 0), [-INF, -INF])
    c = np.random.default_rng(1).standard_normal(8)
    p = ORACLES[gate](x)
    exact = jacobian(gate, p), hessian(gate, p, c)

    tx, tc = torch.tensor(x), torch.tensor(c)
    func = torch.func
    ours = func.jacrev(function)(tx), func.hessian(lambda v: function(v) @ tc)(tx)
    for our, theirs in zip(ours, exact, strict=True):
        np.testing.assert_allclose(our, theirs, atol=1e-12)
    per_row = func.vmap(func.grad(lambda v: function(v) @ tc))(torch.stack([tx, tx.flip(0)]))
    np.testing.assert_allclose(per_row[0], exact[0] @ c, atol=1e-12)

    with jax.enable_x64(True):
        jx, jc = jnp.asarray(x), jnp.asarray(c)
        scalar = lambda v: function(v) @ jc  # noqa: E731
        ours = jax.jacrev(function)(jx), jax.jacfwd(function)(jx), jax.jit(jax.hessian(scalar))(jx)
        for our, theirs in zip(ours, (exact[0], *exact), strict=True):
            np.testing.assert_allclose(our, theirs, atol=1e-12)
        per_row = jax.vmap(jax.grad(scalar))(jnp.stack([jx, jx[::-1]]))
        np.testing.assert_allclose(per_row[0], exact[0] @ c, atol=1e-12)


@every_gate
def test_gradients_of_a_bad_row_stay_in_it(gate: str) -> None:
    x = torch.tensor([[0.0, 1.0, -INF], [NAN, 0.0, 0.0], [-INF] * 3, [INF, 0.0, 1.0]], requires_grad=True)
    c = torch.tensor([1.0, 2.0, 3.0])
    (dx,) = torch.autograd.grad((GATES[gate](x) @ c)[[0]].sum() + (GATES[gate](x)[1:] * 0).sum(), x)
    np.testing.assert_allclose(dx[0], jacobian(gate, ORACLES[gate](numpy(x[0]))) @ numpy(c), atol=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_threshold_of_jumprelu_has_the_published_derivative(library: str) -> None:
    x = np.array([[0.5, 0.95, 1.04, 1.2, -INF], [2.1, 1.99, 1.0, 1.06, 3.0]])
    theta, width = np.array([0.5, 1.0, 1.0, 1.0, 2.0]), 0.1
    c = np.random.default_rng(0).standard_normal(x.shape)
    # −θ/ε times the rectangle of width ε around θ, and the step.
    expected = (-(theta / width) * (abs(x - theta) < width / 2) * c).sum(0), np.where(x > theta, c, 0)
    if library == "torch":
        tx, tt = torch.tensor(x, requires_grad=True), torch.tensor(theta, requires_grad=True)
        p = gates.jumprelu(tx, tt, bandwidth=width)
        ours = torch.autograd.grad((p * torch.tensor(c)).sum(), (tt, tx))
    else:
        with jax.enable_x64(True):
            p = gates.jumprelu(jnp.asarray(x), jnp.asarray(theta), bandwidth=width)
            scalar = lambda t, v: (gates.jumprelu(v, t, bandwidth=width) * c).sum()  # noqa: E731
            ours = jax.jit(jax.grad(scalar, (0, 1)))(jnp.asarray(theta), jnp.asarray(x))
    np.testing.assert_array_equal(numpy(p), np.where(x > theta, x, 0))
    for our, exact in zip(ours, expected, strict=True):
        np.testing.assert_allclose(numpy(our), exact, atol=1e-12)


def by_groups(
    x: np.ndarray, bias: np.ndarray, k: int, groups: int, top_groups: int, normalize: bool, scale: float
) -> np.ndarray:
    """The gate of DeepSeek-V3 for one row, as its report describes it."""
    s = 1 / (1 + np.exp(-x))
    score = {n: s[n] + bias[n] for n in range(len(x)) if x[n] > -INF}
    members = np.arange(len(x)).reshape(groups, -1)
    totals = [sorted((score[n] for n in group if n in score), reverse=True)[:2] for group in members]
    order = sorted(range(groups), key=lambda g: (-sum(totals[g]) if totals[g] else INF, g))
    inside = [n for g in sorted(order[:top_groups]) for n in members[g] if n in score]
    p = np.zeros(len(x))
    for n in sorted(inside, key=lambda n: (-score[n], n))[:k]:
        p[n] = s[n]
    return scale * (normalised(p) if normalize else p)


@every_backend
@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_groups_and_bias_choose_and_weigh_nothing(backend: str, data: st.DataObject) -> None:
    groups, size = data.draw(
        st.sampled_from([(1, 6), (4, 1), (4, 3), (3, 4)] if backend != "jax" else [(4, 3)])
    )
    settled = dict(
        groups=groups, top_groups=data.draw(st.integers(1, groups)), normalize=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    k = data.draw(st.integers(1, settled["top_groups"] * size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = 2 * rng.standard_normal((5, groups * size))
    bias = data.draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal(groups * size)
    if data.draw(st.booleans()):
        x = x.round()
    x[rng.random(x.shape) < data.draw(st.sampled_from([0, 0.5]))] = -INF
    x[:, rng.integers(groups * size)] = 0.1
    with jax.enable_x64(True):
        p = gates.sigmoid_top_k(
            array(backend, x, "float64"), k, bias=array(backend, bias, "float64"), **settled
        )
    expected = np.stack([by_groups(row, bias, k, **settled) for row in x])
    np.testing.assert_allclose(numpy(p), expected, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_selection_bias_that_is_not_finite(normalize: bool) -> None:
    x, bias = np.array([[3.0, 0.0, 1.0]]), np.array([-INF, 0.0, 0.0])
    p = gates.sigmoid_top_k(x, 2, bias=bias, normalize=normalize)
    assert (p > 0).tolist() == [[False, True, True]]
    bias[1] = np.nan
    assert np.isnan(gates.sigmoid_top_k(x, 2, bias=bias, normalize=normalize)).all()


# -------------------------------------------------------------------------------------------- compiling


@each_of_all_gates
@pytest.mark.parametrize("axis", [-1, 0])
def test_torch_vmap(gate: str, axis: int) -> None:
    x = torch.randn(3, 9, 9, dtype=torch.float64)
    mapped = torch.func.vmap(lambda row: ALL_GATES[gate](row, axis=axis))(x)
    torch.testing.assert_close(mapped, torch.stack([ALL_GATES[gate](row, axis=axis) for row in x]))


@each_with_derivatives
def test_torch_compile(gate: str) -> None:
    torch._dynamo.reset()
    # The gate of the published layers through the whole compiler, the others through all but code generation.
    backend = "inductor" if gate == "entmax15" else "aot_eager"
    compiled = torch.compile(ALL_GATES[gate], fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5, 9):
            x = torch.randn(batch, 33, requires_grad=True)
            c = torch.randn(batch, 33)
            ours, eager = compiled(x), ALL_GATES[gate](x)
            torch.testing.assert_close(ours, eager, atol=3e-7, rtol=0)
            dx, dx_eager = (torch.autograd.grad((p * c).sum(), x)[0] for p in (ours, eager))
            torch.testing.assert_close(dx, dx_eager, atol=1e-5, rtol=0)


def test_entmax15_takes_a_fixed_number_of_steps_and_no_sort() -> None:
    program = str(jax.make_jaxpr(gates.entmax15)(jnp.zeros((2, 50))))
    assert not [name for name in ("sort", "top_k", "while", "cond", "scan") if f" {name}[" in program]
    assert " top_k[" in str(jax.make_jaxpr(top_3)(jnp.zeros((2, 50))))


def test_needs_neither_torch_nor_jax() -> None:
    program = """
import sys
sys.modules.update(torch=None, jax=None)
import numpy
from mumoe_tensor.gates import entmax15
print(entmax15(numpy.zeros(4)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[0.25 0.25 0.25 0.25]\n", done.stderr


# ----------------------------------------------------------------------------------------------- errors

X = np.zeros((2, 3))


@pytest.mark.parametrize("x", [[0.0, 1.0], 1.0, None, "logits"], ids=repr)
@each_of_all_gates
def test_no_array(gate: str, x: Any) -> None:
    call = partial(WITH_K[gate], k=1) if gate in WITH_K else ALL_GATES[gate]
    with pytest.raises(
        TypeError, match=f"must be plain NumPy, PyTorch or JAX arrays, got {type(x).__name__}"
    ):
        call(x)


@each_of_all_gates
@every_backend
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_not_floating(gate: str, backend: str, dtype: str) -> None:
    with pytest.raises(TypeError, match=f"floating dtype, .* got x: {dtype}"):
        ALL_GATES[gate](array(backend, np.ones(3), dtype))


@every_backend
@pytest.mark.parametrize(
    ("shape", "axis", "error", "message"),
    [
        ((), -1, ValueError, "x must have at least one axis, got a 0-d array"),
        ((2, 3), 2, ValueError, r"axis must be at least -2 and less than 2, got 2\."),
        (
            (2, 3),
            -3,
            ValueError,
            r"axis must be at least -2 and less than 2, got -3\.",
        ),
        ((2, 0), 1, ValueError, r"the axis must have at least one entry, got axis 1 of shape \(2, 0\)"),
        ((0, 2), 0, ValueError, r"the axis must have at least one entry, got axis 0 of shape \(0, 2\)"),
        ((2, 3), 1.0, TypeError, r"axis must be an integer, got 1\.0"),
        ((2, 3), None, TypeError, "axis must be an integer, got None"),
        ((2, 3), True, TypeError, "axis must be an integer, got True"),
    ],
)
def test_bad_axis(backend: str, shape: tuple[int, ...], axis: Any, error: type, message: str) -> None:
    for gate in [*AXIS_GATES.values(), *(partial(gate, k=1) for gate in WITH_K.values())]:
        with pytest.raises(error, match=message):
            gate(array(backend, np.zeros(shape)), axis=axis)


@pytest.mark.parametrize("gate", WITH_K.values(), ids=WITH_K)
@every_backend
@pytest.mark.parametrize("k", [0, -1, 4, 1.0, "1", None, True, np.bool_(True), np.ones(1)], ids=repr)
def test_bad_k(gate: Callable, backend: str, k: Any) -> None:
    if type(k) is int:
        error, message = (
            ValueError,
            f"k must be at least 1 and at most the size of the .*, got k = {k} for",
        )
    else:
        error, message = TypeError, "k must be an integer, got "
    with pytest.raises(error, match=message):
        gate(array(backend, X), k)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: gates.jumprelu(x, -0.1), ValueError, r"threshold must be at least 0, got -0\.1"),
        (lambda x: gates.jumprelu(x, "1"), TypeError, "threshold must be a number, got '1'"),
        (lambda x: gates.jumprelu(x, bandwidth=0.0), ValueError, r"bandwidth must be positive, got 0\.0"),
        (lambda x: gates.jumprelu(x, np.ones(2)), ValueError, r"threshold must .* \(3,\), got shape \(2,"),
        (lambda x: gates.jumprelu(x, np.ones(3, "f4")), TypeError, "got x: float64, threshold: float32"),
        (lambda x: gates.sigmoid_top_k(x, 1, bias=torch.ones(3)), TypeError, "must belong to one backend"),
        (lambda x: gates.sigmoid_top_k(x, 1, bias=np.ones((2, 3))), ValueError, "bias must have one entry"),
        (lambda x: gates.sigmoid_top_k(x, 1, groups=2), ValueError, "groups must divide the size"),
        (lambda x: gates.sigmoid_top_k(x, 1, top_groups=2), ValueError, "top_groups must be at most groups"),
        (lambda x: gates.sigmoid_top_k(x, 2, groups=3), ValueError, r"k = 2 for 1 group\(s\) of size 1"),
        (lambda x: gates.sigmoid_top_k(x, 1, scale=INF), ValueError, "scale must be finite"),
        (lambda x: gates.sigmoid_top_k(x, 1, scale=0), ValueError, "scale must be positive, got 0"),
        (lambda x: gates.sigmoid_top_k(x, 1, normalize=1), TypeError, "normalize must be True or False"),
        (lambda x: gates.top_k(x, 1, normalize=None), TypeError, "normalize must be True or False"),
    ],
)  # fmt: skip
def test_bad_settings(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(X)


def test_integers_of_numpy_are_integers() -> None:
    for backend in BACKENDS:
        p = gates.top_k(array(backend, X), np.int64(2), np.int32(1))
        np.testing.assert_array_equal(numpy(p), [[0.5, 0.5, 0]] * 2)
