"""The kernels in Triton's interpreter, on a CPU: `test_kernels` starts these tests in another process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from nasty_rows import nasty
from torch import nn

from mumoe_tensor import gates
from mumoe_tensor.nn import MuMoEMLP, entmax15, kernels, sparse
from mumoe_tensor.nn.kernels import coefficients as operations
from mumoe_tensor.nn.kernels import simplex
from mumoe_tensor.nn.kernels.coefficients import coefficients
from mumoe_tensor.nn.kernels.pairs import product_backward
from mumoe_tensor.nn.kernels.rows import sum_of_indexed_rows, sum_of_indexed_rows_backward

#: What the kernels compute, by POWER.
GATES = {2: gates.entmax15, 1: gates.sparsemax}
#: Half a unit in the last place of coefficients near one, or what float32 is computed to. To bfloat16 the
#: interpreter rounds down, unlike GPUs.
ROUNDING = {torch.float16: 2**-12, torch.bfloat16: 2**-8, torch.float32: 3e-7}
NORMS = ("none", "layer", "batch")

# NumPy, which interprets, warns of infinities that the kernels mean.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
every_power = pytest.mark.parametrize("power", GATES)


@pytest.fixture(params=["whole", "in chunks"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernels of each pass, for rows of any size."""
    if request.param == "in chunks":
        monkeypatch.setattr(simplex, "LONGEST_WHOLE", 0)
        monkeypatch.setattr(simplex, "CHUNK", 1024)
    return request.param


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the CPU take the kernels."""
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: x.dtype in kernels.DTYPES)


def normed(x: Any, norm: str, mean: Any, variance: Any) -> Any:
    if norm == "layer":
        return nn.functional.layer_norm(x, x.shape[-1:])
    return x if norm == "none" else (x - mean.to(x)) * torch.rsqrt(variance.to(x) + 1e-5)


def statistics(norm: str, n: int) -> tuple[Any, Any]:
    return (torch.randn(n), 0.5 + torch.rand(n)) if norm == "batch" else (None, None)


@every_power
def test_nasty_rows(power: int, route: str) -> None:
    for n in (1, 256, 2100) if route == "whole" else (1500,):
        rows = torch.tensor(np.stack(list(nasty(n).values())))
        p = coefficients(rows, power).double()
        assert (p - GATES[power](rows.double())).abs().max() <= 3e-7
        assert (p.sum(-1) - 1).abs().max() <= 2e-6


@every_power
def test_the_longest_rows(power: int) -> None:
    n = 2**16
    names = ["normal", "tied cloud of 0.3", "slow for entmax15"]
    rows = torch.tensor(np.stack([nasty(n)[name] for name in names]))
    torch.testing.assert_close(
        coefficients(rows, power).double(), GATES[power](rows.double()), atol=3e-7, rtol=0
    )


@every_power
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.usefixtures("route")
def test_dtypes_and_bad_rows(power: int, dtype: torch.dtype) -> None:
    rows = torch.randn(4, 2, 70).to(dtype)
    rows[0, 1, 5], rows[1, 0, 69], rows[2, 1], rows[3, 0, ::2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    p = coefficients(rows, power)
    expected = GATES[power](rows.double())
    assert p.dtype == dtype and p.shape == rows.shape
    assert p.isnan().any(-1).nonzero().tolist() == [[0, 1], [1, 0], [2, 1]]
    torch.testing.assert_close(p.double(), expected, atol=1.01 * ROUNDING[dtype], rtol=0, equal_nan=True)
    wide = coefficients(rows, power, dtype=torch.float32)
    torch.testing.assert_close(wide.double(), expected, atol=3e-7, rtol=0, equal_nan=True)


@every_power
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("route")
def test_norms_and_gradients(power: int, norm: str) -> None:
    for n in (1, 1300):
        # A level of several: rows with a stride, in an array with two leading axes.
        logits = (3 * torch.randn(2, 2, 2 * n) + 1)[..., n:].requires_grad_()
        of_norm = statistics(norm, n)
        gradient = torch.randn(2, 2, n)
        p = coefficients(logits, power, norm, *of_norm)
        (got,) = torch.autograd.grad(p, logits, gradient)
        exact = logits.detach().double().requires_grad_()
        expected = GATES[power](normed(exact, norm, *of_norm))
        torch.testing.assert_close(p.double(), expected, atol=2e-6, rtol=0)
        (expected,) = torch.autograd.grad(expected, exact, gradient.double())
        torch.testing.assert_close(got.double(), expected, atol=5e-6, rtol=1e-5)


def test_gradients_of_bad_rows_are_nan_and_those_of_masks_zero() -> None:
    logits = torch.randn(3, 8)
    logits[0, 2], logits[1, :3] = torch.nan, -torch.inf
    for power in GATES:
        x = logits.clone().requires_grad_()
        coefficients(x, power).square().sum().backward()
        assert x.grad is not None and x.grad[0].isnan().all() and x.grad[1:].isfinite().all()
        assert (x.grad[1, :3] == 0).all()


def test_nothing_is_read_of_no_rows() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    coefficients(x, 2).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 4)


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(norm: str) -> None:
    x, of_norm = torch.randn(3, 6), statistics(norm, 6)
    got = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        if dtype == torch.float32:
            p = coefficients(leaf, 2, norm, *of_norm)
        else:
            p = gates.entmax15(normed(leaf, norm, *of_norm))
        (first,) = torch.autograd.grad(p.sin().sum(), leaf, create_graph=True)
        got.append(torch.autograd.grad(first.cos().sum(), leaf)[0].double())
    torch.testing.assert_close(*got, atol=1e-4, rtol=1e-4)


def test_operations_are_well_defined() -> None:
    x, p = torch.randn(4, 6), torch.softmax(torch.randn(4, 6), -1)
    checks = ("test_schema", "test_faketensor")
    for norm in NORMS:
        of_norm = statistics(norm, 6)
        arguments = (norm, 2, torch.bfloat16)
        torch.library.opcheck(operations.simplex, (x, *of_norm, *arguments), test_utils=checks)
        of_pass = (x, p, x, *of_norm, *arguments)
        torch.library.opcheck(operations.simplex_backward, of_pass, test_utils=checks)


def test_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = torch.randn(3, 4, 6), torch.randn(4, 6)

    def loss(x: Any) -> Any:
        return (entmax15(x) * c).sum()

    def transformed() -> list[Any]:
        return [
            torch.func.vmap(entmax15, 1)(x),
            torch.func.grad(loss)(x[0]),
            torch.func.vmap(torch.func.grad(loss))(x),
            torch.func.jacrev(entmax15)(x[0]),
            torch.func.vmap(torch.func.jacrev(entmax15))(x),
            torch.autograd.functional.jacobian(entmax15, x[0], vectorize=True),
        ]

    expected = transformed()
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: True)
    torch.testing.assert_close(transformed(), expected, atol=1e-5, rtol=1e-4)


# ---- rows of a factor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "rank"), [(6, 3, 70), (5, 1, 1), (3, 4, 1500), (0, 2, 5)])
def test_sums_of_indexed_rows(rows: int, k: int, rank: int, dtype: torch.dtype) -> None:
    values = torch.randn(rows, k).to(dtype)
    indices = torch.rand(rows, 20).topk(k).indices
    # Rows of a factor that lies in memory the other way round.
    for factor in (torch.randn(20, rank).to(dtype), torch.randn(rank, 20).to(dtype).mT):
        dense = torch.zeros(rows, 20, dtype=torch.float64).scatter(1, indices, values.double())
        gradient = torch.randn(rank, rows).to(dtype).mT
        y = sum_of_indexed_rows(values, indices, factor)
        of_values, of_factor = sum_of_indexed_rows_backward(values, indices, factor, gradient)
        assert (y.dtype, of_values.dtype, of_factor.dtype) == (dtype, dtype, dtype)
        for got, exact in (
            (y, dense @ factor.double()),
            (of_values, (gradient.double() @ factor.double().mT).gather(1, indices)),
            (of_factor, dense.mT @ gradient.double()),
        ):
            bound = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
            assert got.shape == exact.shape
            torch.testing.assert_close(got.double(), exact, atol=bound * max(1, rank**0.5), rtol=bound)


def test_operations_on_rows_are_well_defined() -> None:
    x, indices, factor = torch.randn(4, 2), torch.randint(9, (4, 2)), torch.randn(9, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(sum_of_indexed_rows, (x, indices, factor), test_utils=checks)
    of_pass = (x, indices, factor, torch.randn(4, 5))
    torch.library.opcheck(sum_of_indexed_rows_backward, of_pass, test_utils=checks)


# ---- elementwise products --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 70), (5, 1, 3), (3, 1500), (1024,), (0, 4)])
def test_both_gradients_of_a_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradient, left, right = (torch.randn(shape).to(dtype) for _ in range(3))
    expected = gradient * right, gradient * left
    bound = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for got, exact in zip(product_backward(gradient, left, right), expected, strict=True):
        assert got.shape == shape and got.dtype == dtype
        torch.testing.assert_close(got, exact, atol=bound, rtol=bound)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(product_backward, (gradient, left, right), test_utils=checks)


# ---- layers ----------------------------------------------------------------------------------------------


def block(gate: str, norm: str, experts: Any) -> Any:
    torch.manual_seed(0)
    made = MuMoEMLP(12, 16, 8, experts, "cp", 5, gate=gate, gate_norm=norm)
    nn.init.normal_(made.gate.weight)
    return made


def results(module: Any, x: Any) -> list[Any]:
    x = x.clone().requires_grad_()
    y, levels = module(x, return_coefficients=True)
    gradients = []
    if y.requires_grad:
        y.float().square().sum().backward()
        gradients = [x.grad, *(p.grad for p in module.parameters())]
    return [y, *levels, *gradients]


@pytest.mark.parametrize(("gate", "experts"), [("entmax15", (4, 3)), ("sparsemax", 7)])
@pytest.mark.parametrize("norm", NORMS)
def test_layers(gate: str, norm: str, experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (block(gate, norm, experts) for _ in range(2))
    x, mask = torch.randn(3, 9, 12), torch.arange(27).reshape(3, 9) % 5 > 0
    for is_training in (True, False):
        expected = results(other.train(is_training), x)
        masked = other(x, mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "DEVICES", {"cpu"})
            patch.setattr(kernels, "serve", lambda x: x.dtype in kernels.DTYPES)
            torch.testing.assert_close(results(one.train(is_training), x), expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(one(x, mask=mask), masked, atol=2e-5, rtol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(one(x[:1]), other(x[:1]), atol=2e-5, rtol=1e-4)
        for module in (one, other):
            module.zero_grad()
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("experts", [1200, (3, 1200)], ids=str)
def test_layers_that_select_experts(experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"name": "topk", "k": 2}
    one = MuMoEMLP(6, 5, 4, experts, "cp", 3, gate=gate, gate_norm="layer")
    other, x = copy.deepcopy(one), torch.randn(7, 6)
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments))
        return sum_of_indexed_rows(*arguments)

    def step(module: Any) -> list[Any]:
        y = module(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in module.parameters())]

    expected = step(other)
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: x.dtype in kernels.DTYPES)
    monkeypatch.setattr(sparse, "sum_of_indexed_rows", counted)
    torch.testing.assert_close(step(one), expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # (Rounded logits select other experts for some inputs.)
        assert (one(x).float() - expected[0]).abs().median() < 0.05 * expected[0].abs().max()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_and_autocast(norm: str) -> None:
    made, x = block("entmax15", norm, 7), torch.randn(20, 12)
    y, (a,) = made(x, return_coefficients=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, (b,) = made(x, return_coefficients=True)
    half = copy.deepcopy(made).bfloat16()
    result, (c,) = half(x.bfloat16(), return_coefficients=True)
    assert (under_autocast.dtype, b.dtype) == (torch.bfloat16, torch.float32)
    assert (result.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16)
    for got, exact in ((under_autocast, y), (result, y), (b, a), (c, a)):
        assert (got.float() - exact).abs().max() < 0.06 * exact.abs().max()
    result.float().sum().backward()
    assert half.gate.weight.grad.isfinite().all()


@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_gate() -> None:
    made = block("entmax15", "layer", (4, 3)).gate
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            x = torch.randn(rows, 12)
            got, expected = [], []
            for module, into in ((compiled, got), (made, expected)):
                made.zero_grad()
                into += module(x)
                into[0].square().sum().backward()
                into.append(made.weight.grad)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_models_mapped_over() -> None:
    # Statistics of batch norm that differ from model to model are no part of a kernel.
    models = [block("entmax15", "batch", 7).eval() for _ in range(2)]
    models[1].gate.norm.running_var.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 12)
    got = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))(
        parameters, buffers
    )
    torch.testing.assert_close(got, torch.stack([model(x) for model in models]), atol=1e-5, rtol=1e-4)
