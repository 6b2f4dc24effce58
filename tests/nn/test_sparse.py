"""The sparse route gives what the dense products give, and is taken only where that is certain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import ExpertGate, MuMoE, MuMoEMLP, entmax15, sparse  # noqa: E402
from mumoe_tensor.nn.sparse import sparse_product, sum_of_rows, sum_of_rows_backward  # noqa: E402

CASES = [
    ("cp", 6, 4096),
    ("tr", (2, 2, 3), 2048),
    ("tt", (8, 8), 1024),
    ("tucker", (8, 8, 8), 1024),
    ("hadamard", None, 1024),
    ("dense", None, 1024),
    ("cp", 6, (1024, 2048)),
    ("cp", 6, (3, 1024)),
    ("btt", 6, 1024),
    ("shared-expert", 6, (3, 1024)),
]


@pytest.fixture
def supports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the coefficients whose zeros were looked for."""
    seen: list[Any] = []
    original = sparse._support

    def support(coefficients: Any) -> Any:
        seen.append(tuple(coefficients.shape))
        return original(coefficients)

    monkeypatch.setattr(sparse, "_support", support)
    return seen


def block(format: str = "cp", rank: Any = 6, experts: Any = 1024, **options: Any) -> Any:
    """A block whose gate names few experts."""
    torch.manual_seed(0)
    options = {"gate_norm": "layer", "dtype": torch.float64, **options}
    made = MuMoEMLP(16, 24, 8, experts, format, rank, **options)
    nn.init.normal_(made.gate.weight, std=3)
    return made


def coefficients(rows: int, columns: int, share: float) -> Any:
    return torch.rand(rows, columns, dtype=torch.float64) * (torch.rand(rows, columns) < share)


# ---- the product -----------------------------------------------------------------------------------------


@given(st.integers(0, 70), st.integers(1, 30), st.integers(1, 5), st.sampled_from([0, 0.02, 0.2, 1.0]))
def test_product_and_gradients(rows: int, columns: int, rank: int, share: float) -> None:
    a = coefficients(rows, columns, share)
    u, g = torch.randn(columns, rank, dtype=a.dtype), torch.randn(rows, rank, dtype=a.dtype)
    torch.testing.assert_close(sum_of_rows(a, u), a @ u)
    of_a, of_u = sum_of_rows_backward(a, u, g)
    torch.testing.assert_close(of_u, a.mT @ g)
    torch.testing.assert_close(of_a * (a > 0), (g @ u.mT) * (a > 0))


def test_product_from_few_rows(supports: list[Any]) -> None:
    few, many = coefficients(64, 500, 0.02), coefficients(64, 500, 0.5)
    u, g = torch.randn(500, 7, dtype=few.dtype), torch.randn(64, 7, dtype=few.dtype)
    torch.testing.assert_close(sum_of_rows(few, u), few @ u)
    of_few, of_u = sum_of_rows_backward(few, u, g)
    assert supports == [few.shape] * 2
    torch.testing.assert_close(of_few, (g @ u.mT) * (few > 0))
    torch.testing.assert_close(of_u, few.mT @ g)
    torch.testing.assert_close(sum_of_rows(many, u), many @ u)
    torch.testing.assert_close(sum_of_rows_backward(many, u, g)[0], g @ u.mT)
    assert len(supports) == 2


def test_operands_in_any_memory_order(supports: list[Any]) -> None:
    a, u = coefficients(40, 300, 0.02), torch.randn(300, 5, dtype=torch.float64)
    g = torch.randn(40, 5, dtype=torch.float64)
    expected = (sum_of_rows(a, u), *sum_of_rows_backward(a, u, g))
    a, u, g = (x.mT.contiguous().mT for x in (a, u, g))
    torch.testing.assert_close((sum_of_rows(a, u), *sum_of_rows_backward(a, u, g)), expected)
    assert len(supports) == 4


def test_operations_are_well_defined() -> None:
    # opcheck raises where an operation changes its inputs, or its fake kernel has another shape.
    a, u = coefficients(40, 300, 0.02).float(), torch.randn(300, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(sum_of_rows, (a, u), test_utils=checks)
    torch.library.opcheck(sum_of_rows_backward, (a, u, torch.randn(40, 5)), test_utils=checks)


def test_transforms_of_the_product() -> None:
    a, u = coefficients(3, 50, 0.04)[:, None], torch.randn(50, 2, dtype=torch.float64)

    def loss(product: Callable[..., Any], a: Any, u: Any) -> Any:
        return product(a, u).sin().sum()

    for transform in (
        lambda f: torch.func.vmap(f, (0, None))(a, u),
        lambda f: torch.func.grad(f, 1)(a[0], u),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), (0, None))(a, u),
        lambda f: torch.func.jacrev(torch.func.grad(f, 1), 1)(a[0], u),
    ):
        results, expected = (
            transform(lambda a, u, p=product: loss(p, a, u)) for product in (sparse_product, torch.matmul)
        )
        torch.testing.assert_close(results, expected)


# ---- the layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "rank", "experts"), CASES)
def test_layers_give_the_same_either_way(format: str, rank: Any, experts: Any, supports: list[Any]) -> None:
    module, x = block(format, rank, experts), torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for returned in (False, True):
        supports.clear()
        module.zero_grad()
        x.grad = None
        # Coefficients that are returned may be asked a gradient of.
        result = module(x, return_coefficients=returned)
        (result[0] if returned else result).square().sum().backward()
        results.append((x.grad, [p.grad.clone() for p in module.parameters()]))
        large = sum(n >= 1024 for n in module.gate.num_experts)
        assert len(supports) == (0 if returned else 4 * large)
    torch.testing.assert_close(*results)


def test_one_layer(supports: list[Any]) -> None:
    torch.manual_seed(0)
    layer = MuMoE(8, 5, 1024, "cp", 4, gate_norm="none", dtype=torch.float64)
    nn.init.normal_(layer.gate.weight, std=3)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert supports
    with torch.no_grad():
        supports.clear()
        torch.testing.assert_close(layer(x), layer(x, return_coefficients=True)[0])
        assert len(supports) == 1


def declared(logits: Any) -> Any:
    return entmax15(logits)


declared.sparse_gradient = True


class OtherGate(ExpertGate):
    pass


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda m: None, True),
        (lambda m: setattr(m.gate, "gate", mt.sparsemax), True),
        (lambda m: setattr(m.gate, "gate", declared), True),
        (lambda m: setattr(m.gate, "gate", lambda logits: entmax15(logits)), False),
        (lambda m: m.gate.register_forward_hook(lambda *_: None), False),
        (lambda m: m.gate.register_full_backward_hook(lambda *_: None), False),
        (lambda m: m.gate.register_full_backward_pre_hook(lambda *_: None), False),
        (lambda m: setattr(m.gate, "__class__", OtherGate), False),
        (lambda m: m.bfloat16(), False),
        (lambda m: nn.init.zeros_(m.gate.weight), False),
    ],
)
def test_when_it_is_taken(change: Callable[[Any], object], taken: bool, supports: list[Any]) -> None:
    module = block()
    change(module)
    module(torch.randn(32, 16, dtype=module.gate.weight.dtype, requires_grad=True)).sum().backward()
    assert bool(supports) == taken


def test_hooks_on_all_modules_see_coefficients(supports: list[Any]) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        block()(torch.randn(32, 16, dtype=torch.float64))
    finally:
        handle.remove()
    assert not supports


def test_not_under_autocast(supports: list[Any]) -> None:
    module = block(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(32, 16)).sum().backward()
        with torch.no_grad():
            module(torch.randn(32, 16))
    assert not supports


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "vmap of grad"])
def test_transforms_of_a_layer(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), torch.randn(6, 16, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(module, parameters, (x,)).sin().sum()

    def gradients() -> Any:
        match transform:
            case "grad":
                return torch.func.grad(loss)(parameters, x)
            case "vmap":
                return torch.func.vmap(module)(x)
            case "jacrev":
                return torch.func.jacrev(module)(x)
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    here = gradients()
    monkeypatch.setattr(ExpertGate, "is_sparse_gradient", False)
    torch.testing.assert_close(here, gradients())


def test_compiled(supports: list[Any]) -> None:
    torch._dynamo.reset()
    module = block(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (32, 48):
        results = []
        x = torch.randn(rows, 16)
        for call in (compiled, module):
            module.zero_grad()
            supports.clear()
            y = call(x)
            y.square().sum().backward()
            assert len(supports) == 4
            results.append((y.detach(), [p.grad for p in module.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_an_exported_layer_does_without_it() -> None:
    program = torch.export.export(block().eval(), (torch.randn(4, 16, dtype=torch.float64),))
    assert "mumoe_tensor" not in str(program.graph)
