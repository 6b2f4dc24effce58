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
from mumoe_tensor.nn.sparse import (  # noqa: E402
    SparseCoefficients,
    indexed_product,
    sparse_product,
    sum_of_rows,
    sum_of_rows_backward,
)

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


# ---- coefficients by the experts that a gate selects -----------------------------------------------------

SELECTING = [
    {"name": "topk", "k": 2},
    {"name": "topk", "k": 2, "normalize": False},
    {"name": "relu_topk", "k": 2},
    {"name": "sigmoid_topk", "k": 2, "scale": 2.5},
    {"name": "random", "k": 2},
    {"name": "nearest_centres", "k": 2},
]


@pytest.fixture
def densified(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the coefficients that were made dense."""
    seen: list[Any] = []
    original = SparseCoefficients.dense
    monkeypatch.setattr(
        SparseCoefficients, "dense", lambda self: (seen.append(self.shape), original(self))[1]
    )
    return seen


@given(st.integers(0, 6), st.integers(1, 30), st.integers(1, 5), st.data())
def test_indexed_product_and_its_derivatives(rows: int, columns: int, rank: int, data: Any) -> None:
    k = data.draw(st.integers(1, columns))
    indices = torch.rand(rows, columns).topk(k, -1).indices
    values = torch.randn(rows, k, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(columns, rank, dtype=torch.float64, requires_grad=True)

    def results(product: Callable[..., Any]) -> Any:
        y = product(SparseCoefficients(values, indices, columns), factor)
        first = torch.autograd.grad(y.sin().sum(), (values, factor), create_graph=True)
        plain = torch.autograd.grad(product(SparseCoefficients(values, indices, columns), factor).sin().sum(),
                                    (values, factor))  # fmt: skip
        return y, first, plain, torch.autograd.grad(sum(x.cos().sum() for x in first), (values, factor))

    expected = results(lambda coefficients, factor: coefficients.dense() @ factor)
    torch.testing.assert_close(results(indexed_product), expected)


@pytest.mark.parametrize("gate", SELECTING, ids=lambda gate: "-".join(map(str, gate.values())))
@pytest.mark.parametrize(("format", "rank", "experts"), CASES)
def test_indexed_coefficients_give_what_dense_ones_give(
    gate: Any, format: str, rank: Any, experts: Any, densified: list[Any], supports: list[Any]
) -> None:
    module = block(format, rank, experts, gate=gate)
    if hasattr(module.gate, "bias"):
        nn.init.normal_(module.gate.bias)
    x = torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for returned in (False, True):
        densified.clear()
        module.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        result = module(x, return_coefficients=returned)
        y = result[0] if returned else result
        y.square().sum().backward()
        with torch.no_grad():
            torch.manual_seed(1)
            again = module(x, return_coefficients=returned)
        torch.testing.assert_close(again[0] if returned else again, y)
        results.append((y, x.grad, [None if p.grad is None else p.grad for p in module.parameters()]))
        small = {3} & set(module.gate.num_experts)
        assert set(densified) == {(4, 5, n) for n in (module.gate.num_experts if returned else small)}
    torch.testing.assert_close(*results)
    assert not supports


def test_derivatives_of_a_layer_with_indexed_coefficients(densified: list[Any]) -> None:
    torch.manual_seed(0)
    layer = MuMoE(8, 5, 1024, "cp", 4, gate={"name": "topk", "k": 3}, gate_norm="none", dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert not densified


def test_nothing_of_all_experts_is_saved() -> None:
    layer = MuMoE(8, 5, 2048, "cp", 4, gate={"name": "relu_topk", "k": 3}, gate_norm="none")
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        layer(torch.randn(64, 8))
    assert saved and max(saved) <= 2048 * 8


def pre_hook(module: Any) -> None:
    module.down.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda m: None, True),
        (lambda m: m.gate.register_forward_hook(lambda *_: None), False),
        (lambda m: m.gate.register_full_backward_hook(lambda *_: None), False),
        (lambda m: m.up.register_forward_hook(lambda *_: None), False),
        (pre_hook, False),
        (lambda m: m.down.add_edit("one"), False),
        (lambda m: setattr(m.gate, "__class__", OtherGate), False),
        (lambda m: m.bfloat16(), False),
        (lambda m: setattr(m.gate.gate, "k", 100), False),
    ],
)
def test_when_coefficients_are_indexed(change: Callable[[Any], object], taken: bool) -> None:
    module = block(gate={"name": "topk", "k": 3})
    change(module)
    given: list[Any] = []
    original = type(module.down)._mix
    x = torch.randn(8, 16, dtype=module.gate.weight.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module.down), "_mix", lambda *a: (given.extend(map(type, a[3])), original(*a))[1])
        module(x)
    assert given == [SparseCoefficients if taken else torch.Tensor] * 2


def test_hooks_on_all_modules_see_dense_coefficients() -> None:
    module, seen = block(gate={"name": "topk", "k": 3}), []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda _, arguments: seen.extend(a for a in arguments if isinstance(a, tuple))
    )
    try:
        module(torch.randn(8, 16, dtype=torch.float64))
    finally:
        handle.remove()
    assert [a.shape for pair in seen for a in pair] == [(8, 1024)] * 2


@pytest.mark.parametrize("transform", ["grad", "vmap", "autocast", "compile", "export", "make_fx"])
def test_indexed_coefficients_and_transforms(transform: str) -> None:
    module = block(gate={"name": "topk", "k": 3}, dtype=torch.float32).eval()
    x = torch.randn(8, 16)
    expected = module(x, return_coefficients=True)[0]
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    match transform:
        case "grad":
            result = torch.func.grad(lambda x: module(x).sum())(x)
            inputs = x.clone().requires_grad_()
            expected = torch.autograd.grad(module(inputs).sum(), inputs)[0]
        case "vmap":
            result = torch.func.vmap(module)(x)
        case "autocast":
            tolerance = {"rtol": 0.1, "atol": 0.1}
            with torch.autocast("cpu", torch.bfloat16):
                result = module(x)
        case "compile":
            torch._dynamo.reset()
            result = torch.compile(module, backend="aot_eager")(x)
        case "export":
            result = torch.export.export(module, (x,)).module()(x)
        case _:
            result = torch.fx.experimental.proxy_tensor.make_fx(module)(x)(x)
    torch.testing.assert_close(result.float(), expected, **tolerance)


@pytest.mark.parametrize("change", ["autocast", "vmap", "bfloat16"])
def test_indexed_coefficients_become_dense_where_they_must(change: str, densified: list[Any]) -> None:
    experts = block().up
    coefficients = SparseCoefficients(
        torch.rand(6, 2, dtype=torch.float64), torch.randint(1024, (6, 2)).sort().values, 1024
    )
    z = torch.randn(6, 16, dtype=torch.float64)
    expected = experts(z, [coefficients.dense()])
    densified.clear()
    torch.testing.assert_close(experts(z, [coefficients]), expected)
    assert not densified
    match change:
        case "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                result = experts(z, [coefficients])
        case "vmap":
            result = torch.func.vmap(lambda z, v, i: experts(z, [SparseCoefficients(v, i, 1024)]))(
                z, coefficients.values, coefficients.indices
            )
        case _:
            result = experts.bfloat16()(z.bfloat16(), [coefficients.to(torch.bfloat16)])
    assert densified
    torch.testing.assert_close(result.double(), expected, rtol=0.1, atol=0.1)
