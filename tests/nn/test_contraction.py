"""The backward pass of a contraction gives the gradients of the plain steps, and saves little."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("entmax")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from benchmarks.probes import kept_bytes  # noqa: E402
from mumoe_tensor.contraction.execute import execute  # noqa: E402
from mumoe_tensor.contraction.network import forward_networks  # noqa: E402
from mumoe_tensor.contraction.plan import plan_network  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, products, replace_mlp  # noqa: E402
from mumoe_tensor.nn.backward import SavePolicy, saved_results  # noqa: E402
from mumoe_tensor.nn.contraction import contract  # noqa: E402
from mumoe_tensor.nn.products import permuted_product, product_above_sum, summed_product  # noqa: E402
from mumoe_tensor.testing.strategies import problems  # noqa: E402

ACTIVATIONS = [None, nn.functional.gelu]


class Operations(TorchDispatchMode):
    """The operations that are called, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not operation.is_view:
            self.called.append(operation)
        return operation(*arguments, **(options or {}))


def geglu(z: Any, times: Any) -> Any:
    """An activation of two inputs."""
    return nn.functional.gelu(z) * times


def drawn(data: Any, format: str | None, bias: bool | None) -> tuple[SavePolicy, Any, list[Any]]:
    """A contraction of a term in some order that keeps any of its results, and its operands."""
    problem = data.draw(problems(format, backend="pytorch", dtype="float64", bias=bias))
    weight, batch = problem.weight, problem.z[..., 0].numel()
    networks = forward_networks(weight.format, weight.shape, weight.rank, weight.missing, problem.layer.bias)
    pairs = zip(networks, weight.terms, strict=True)
    network, term = data.draw(st.sampled_from([pair for pair in pairs if pair[0].takes_input]))
    program = plan_network(
        network,
        data.draw(st.sampled_from([1, 3, 1000])),
        data.draw(st.sampled_from(["time", "flops", "peak"])),
        data.draw(st.sampled_from(["factorized", "reconstructed"])),
    ).program
    count = len(network.operands)
    results = range(count, count + len(program.steps) - 1)
    kept = data.draw(
        st.one_of(
            st.booleans().map(lambda recompute: saved_results(program, recompute)),
            st.sets(st.sampled_from(results)).map(frozenset) if results else st.just(frozenset()),
        )
    )
    activation = data.draw(st.sampled_from([*ACTIVATIONS, geglu]))
    inputs = [problem.z] if activation is not geglu else [problem.z, problem.z.cos()]
    vectors = [x.reshape(batch, x.shape[-1]) for x in (*problem.coefficients, *inputs)]
    return SavePolicy(program, kept), activation, [*term.arrays, *vectors]


@pytest.mark.parametrize("format", [None, "cp"])
@given(st.data())
def test_gradients_are_those_of_the_plain_steps(format: str | None, data: Any) -> None:
    """Of any format; and of one whose bias is a row of the input mode, of which few are drawn."""
    policy, activation, operands = drawn(data, format, bias=None if format is None else True)
    wanted = data.draw(st.lists(st.booleans(), min_size=len(operands), max_size=len(operands)))
    for x, want in zip(operands, wanted, strict=True):
        x.requires_grad_(want)
    y = contract(policy, operands, activation)
    last = len(policy.program.network.operands) - 1
    z = operands[last] if activation is None else activation(*operands[last:])
    plain = execute(policy.program, [*operands[:last], z])
    torch.testing.assert_close(y, plain)
    leaves = [x for x in operands if x.requires_grad]
    if not leaves:
        assert not y.requires_grad
        return
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(plain, leaves, gradient)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, gradient, retain_graph=True), expected)
    # Another way, taken where the gradients shall have gradients themselves.
    torch.testing.assert_close(torch.autograd.grad(y, leaves, gradient, create_graph=True), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", ["cp", "tr", "tucker", "hadamard"])
def test_second_derivatives(format: str, activation: Any) -> None:
    torch.manual_seed(0)
    rank = {"cp": 2, "tr": (2, 1, 2), "tucker": (1, 2, 2), "hadamard": None}[format]
    block = MuMoEMLP(3, 2, 2, 3, format, rank, activation=activation or torch.sin, dtype=torch.float64)
    x, a = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 3))
    assert torch.autograd.gradgradcheck(lambda x, a: block.down(block.up(x, [a]), [a], activation), (x, a))
    if activation is not None:

        def gated(x: Any, a: Any) -> Any:
            hidden = block.up(x, [a])
            return block.down(hidden, [a], activation, times=hidden.cos())

        assert torch.autograd.gradgradcheck(gated, (x, a))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(("format", "rank"), [("cp", 556), ("tr", (4, 4, 149))])
def test_kept_for_the_backward_pass(format: str, rank: Any, norm: str) -> None:
    # Published: 45.0 MiB (CP), 57.2 (TR); a dense MLP of this size keeps 27.0.
    x = torch.randn(1024, 768, requires_grad=True)
    for recompute, most in ((False, 27.0), (True, 24.0)):
        block = MuMoEMLP(768, 3072, 768, 256, format, rank, gate_norm=norm, recompute=recompute)
        assert kept_bytes(block, x) <= most * 2**20


@pytest.mark.parametrize(("format", "rank"), [("cp", 8), ("btt", 2)])
def test_a_gated_block_keeps_neither_the_activation_nor_the_product(format: str, rank: int) -> None:
    coefficients = [torch.rand(512, 8)]
    down = Experts(128, 32, 8, format, rank, bias=False)
    hidden, times = (torch.randn(512, 128, requires_grad=True) for _ in range(2))

    class Down(nn.Module):
        def __init__(self, *more: Any):
            super().__init__()
            self.down, self.more = down, more

        def forward(self, z: Any) -> Any:
            return self.down(z, coefficients, *self.more)

    plain, gated = (kept_bytes(Down(*more), hidden) for more in ((), (nn.functional.silu, False, times)))
    assert gated == plain + times.nbytes


class MLP(nn.Module):
    """The block of a GPT-2 that surgery finds."""

    def __init__(self, activation: Any):
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(32, 128), activation, nn.Linear(128, 32)

    def forward(self, x: Any) -> Any:
        return self.c_proj(self.act(self.c_fc(x)))


@pytest.mark.parametrize("name", ["GELU", "GELUActivation", "NewGELUActivation"])
def test_a_replaced_block_keeps_no_more_than_one_with_an_activation_by_name(name: str) -> None:
    if name == "GELU":
        activation = nn.GELU(approximate="tanh")
    else:
        activation = getattr(pytest.importorskip("transformers.activations"), name)()
    model, x = nn.Sequential(MLP(activation)), torch.randn(64, 32, requires_grad=True)
    options = dict(format="cp", rank=16, gate_norm="layer")
    replace_mlp(model, "0", experts=8, **options)
    assert kept_bytes(model[0], x) == kept_bytes(MuMoEMLP(32, 128, 32, 8, activation="gelu", **options), x)


def test_nothing_is_kept_without_gradients() -> None:
    block = MuMoEMLP(8, 8, 8, 4, "cp", 3)
    with torch.no_grad():
        assert block(torch.randn(5, 8)).grad_fn is None
    block.requires_grad_(False)
    assert block(torch.randn(5, 8)).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype: Any) -> None:
    torch.manual_seed(0)
    block = MuMoEMLP(16, 32, 16, 4, "tr", (2, 2, 8))
    x = torch.randn(64, 16)
    gradients = []
    for enabled in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = block(x)
        assert y.dtype == (dtype if enabled else torch.float32)
        y.float().square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() <= 0.05 * exact.norm() + 1e-3


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Any, Any, tuple[int, ...] | None]:
    """Two stacks of matrices, small or large, one perhaps a single matrix, and an order for their product."""
    stack, rows, inner, columns = (draw(st.sampled_from([1, 2, 70])) for _ in range(4))
    first, second = draw(st.sampled_from([(stack, stack), (stack, 1), (1, stack)]))
    order = draw(st.one_of(st.none(), st.permutations(range(3)).map(tuple)))
    return torch.randn(first, rows, inner).double(), torch.randn(second, inner, columns).double(), order


@given(stacks(), st.booleans(), st.booleans())
@example((torch.ones(2, 70, 2).double(), torch.ones(1, 2, 70).double(), (1, 0, 2)), False, False)
def test_products_lie_in_the_order_that_is_asked_for(drawn, is_left_transposed, is_right_transposed) -> None:
    left, right, order = drawn
    if is_left_transposed:
        left = left.mT.contiguous().mT
    if is_right_transposed:
        right = right.mT.contiguous().mT
    expected = left @ right if order is None else (left @ right).permute(order)
    result = permuted_product(left, right, order)
    torch.testing.assert_close(result, expected)
    is_large = expected.numel() // max(len(left), len(right)) >= products.LARGE
    if len(left) == len(right) and order is not None and order[-1] != 0 and is_large:
        assert result.is_contiguous() and result._base is None


@pytest.mark.parametrize("columns", [3, 300])
def test_a_row_of_sums_is_that_of_ones(columns: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(5, 250, dtype=torch.float64).mT, torch.randn(5, columns, dtype=torch.float64)
    ones = torch.ones(1, 5, dtype=torch.float64)
    torch.testing.assert_close(product_above_sum(left, right), torch.cat((left, ones)) @ right)


@pytest.mark.parametrize("is_left", [True, False])
def test_a_matrix_meets_a_stack_without_a_copy(is_left: bool) -> None:
    matrix, stack = torch.nn.Parameter(torch.randn(1, 3, 3)), torch.randn(5, 3, 3)
    left, right = (matrix, stack) if is_left else (stack, matrix)
    with torch.no_grad(), Operations() as operations:
        product = products.spread_product(left, right)
    assert operations.called == [torch.ops.aten.bmm.default]
    torch.testing.assert_close(product, left @ right)
    assert products.spread_product(matrix, stack[:0]).shape == (0, 3, 3)


@pytest.mark.parametrize("inner", [1, 40])  # with a larger sum over few entries the operands are copied
@pytest.mark.parametrize("order", [None, (0, 2, 1)])
def test_products_summed_along_a_stack(inner: int, order: Any) -> None:
    left, right = torch.randn(5, 8, inner).double(), torch.randn(5, inner, 6).double()
    expected = (left @ right).sum(0, keepdim=True)
    expected = expected if order is None else expected.permute(order)
    torch.testing.assert_close(summed_product(left, right, order), expected)


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("experts", [(), (3,), (2, 2)])
@pytest.mark.parametrize("format", ["btt", "kron", "monarch", "tt-matrix"])
def test_a_step_of_a_split_layer_equals_plain_steps(format: str, experts: tuple[int, ...], rows: int) -> None:
    # Large enough for products that are written straight into the output and into gradients.
    torch.manual_seed(0)
    rank = (2,) * len(mt.get_format(format).bonds(len(experts)))
    layer = Experts(512, 1024, experts, format, rank, bias=False, dtype=torch.float64)
    x = torch.randn(rows, 512, dtype=torch.float64, requires_grad=True)
    a = [torch.rand(rows, n, dtype=torch.float64, requires_grad=True) for n in experts]
    y, leaves = layer(x, a), [x, *a, *layer.parameters()]
    assert y.is_contiguous()
    plain = execute(layer.plan.program, [*layer.factors, *a, x])
    torch.testing.assert_close(y, plain)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(plain, leaves, gradient)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, gradient), expected)
    in_place = torch.relu_(layer(x, a))  # as activations do
    torch.testing.assert_close(in_place, torch.relu(y))
    in_place.backward(gradient)
    with_bias = Experts(512, 1024, experts, format, rank, dtype=torch.float64)
    with torch.no_grad(), Operations() as operations:
        with_bias(x, a)
    assert torch.ops.aten.add_.Tensor in operations.called  # the bias, to no copy of the outputs
    assert torch.ops.aten.add.Tensor not in operations.called
    with_bias(x, a).backward(gradient)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_an_activation_comes_before_the_padding(has_gradients: bool) -> None:
    """The cosine of a zero is one: of padding it would add to the output."""
    format = mt.get_format("kron").with_splits({"i": (2, 4)})
    layer = Experts(7, 6, 3, format, 2, dtype=torch.float64).requires_grad_(has_gradients)
    x, a = torch.randn(5, 7, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, [a], torch.cos), layer(x.cos(), [a]))


@pytest.mark.parametrize("format", ["cp", "btt", "kron", "monarch", "tr"])
@pytest.mark.parametrize(
    ("experts", "gate"), [(4, "entmax15"), (1024, "entmax15"), (1024, {"name": "topk", "k": 2})]
)
def test_batches_of_gradients_of_a_layer(format: str, experts: int, gate: Any) -> None:
    rank = {"monarch": (), "tr": (2, 2, 2)}.get(format, 2)
    layer = MuMoE(16, 16, experts, format, rank, gate=gate, gate_norm="layer", dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    y, inputs = layer(x), (x, *layer.experts.parameters())
    gradients = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, gradients, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, inputs, gradient, retain_graph=True) for gradient in gradients]
    torch.testing.assert_close(list(batched), [torch.stack(each) for each in zip(*alone, strict=True)])
