"""The layers are the functional core with a gate, for every format, and start as a linear layer does."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP  # noqa: E402

FORMATS = list(mt.formats())
#: Sums, padded modes and slices.
MORE: dict[str, Any] = {
    "shared low rank and btt": mt.sum_of(mt.shared("lowrank"), "btt"),
    "padded kron": {"name": "kron", "splits": {"i": [2, 5], "o": [3, 4]}},
    "slices of cp and dense": mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("dense", 1, 3)),
}
NORMS = ["batch", "layer", "none"]
LEVELS = [(), (3,), (3, 2), (2, 1, 3)]


def rank_of(format: Any, levels: int, size: int = 2) -> tuple[int, ...]:
    return (size,) * len(mt.get_format(format).bonds(levels))


def small(format: str, experts: tuple[int, ...], layer: str = "linear", **options: Any) -> Any:
    """A small layer in float64 whose gate does not give every expert the same."""
    format = MORE.get(format, format)
    options = {"dtype": torch.float64, "rank": rank_of(format, len(experts)), "format": format, **options}
    made = MuMoE(6, 4, experts, **options) if layer == "linear" else MuMoEMLP(6, 9, 4, experts, **options)
    nn.init.normal_(made.gate.weight)
    return made


# ---- equal to the core -----------------------------------------------------------------------------------


@given(
    st.sampled_from([*FORMATS, "shared low rank and btt", "padded kron"]),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from(NORMS),
    st.sampled_from(["entmax15", "sparsemax", "softmax"]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
def test_layer_equals_the_core_and_the_dense_weight(format, experts, bias, norm, gate, leading) -> None:
    layer = small(format, experts, bias=bias, gate_norm=norm, gate=gate).eval()
    x = torch.randn(*leading, 6, dtype=torch.float64)
    y, coefficients = layer(x, return_coefficients=True)
    assert y.shape == (*leading, 4) and y.dtype == x.dtype
    assert [a.shape for a in coefficients] == [(*leading, n) for n in experts]
    torch.testing.assert_close(y, mt.multilinear_moe(layer.weight, x, coefficients, bias=bias))
    dense = mt.to_dense(layer.weight)
    assert dense.shape == (*experts, 6 + bias, 4)
    torch.testing.assert_close(y, mt.multilinear_moe(dense, x, coefficients, bias=bias))


@given(
    st.sampled_from([*FORMATS, "shared low rank and btt", "padded kron"]),
    st.sampled_from(LEVELS),
    st.sampled_from(NORMS),
)
def test_coefficients_are_the_gate_of_the_normed_logits(format, experts, norm) -> None:
    layer = small(format, experts, gate_norm=norm, input_norm=True).train()
    x = torch.randn(6, 6, dtype=torch.float64)
    _, coefficients = layer(x, return_coefficients=True)
    for a, weight in zip(coefficients, layer.gate.weight.split(experts) if experts else (), strict=True):
        logits = x @ weight.T
        if norm != "none":
            axis = 0 if norm == "batch" else 1
            mean, variance = logits.mean(axis, keepdim=True), logits.var(axis, keepdim=True, unbiased=False)
            logits = (logits - mean) / torch.sqrt(variance + 1e-5)
        torch.testing.assert_close(a, mt.entmax15(logits))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("experts", LEVELS, ids=str)
def test_one_expert_is_what_one_hot_coefficients_give(format: str, experts: tuple[int, ...]) -> None:
    layer = small(format, experts)
    x = torch.randn(7, 6, dtype=torch.float64)
    for index in [tuple(0 for _ in experts), tuple(n - 1 for n in experts)]:
        matrix, bias = layer.expert(index)
        one_hot = [torch.eye(n, dtype=x.dtype)[k].expand(7, n) for n, k in zip(experts, index, strict=True)]
        torch.testing.assert_close(layer.experts(x, one_hot), x @ matrix + bias)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", lambda x: x.sin()])
def test_block_computes_the_coefficients_once_from_its_input(gated: bool, activation: Any) -> None:
    block = small("tr", (3, 2), "mlp", gate_norm="layer", input_norm=True, activation=activation, gated=gated)
    nn.init.normal_(block.input_norm.weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    calls: list[Any] = []
    block.gate.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    y, coefficients = block(x, return_coefficients=True)
    ((seen, _),) = calls
    assert torch.equal(seen, x)
    *to_hidden, down = block.weights
    first, *times = (mt.multilinear_moe(w, block.input_norm(x), coefficients, bias=True) for w in to_hidden)
    assert len(times) == gated
    hidden = prod(times, start=block.activation(first))
    torch.testing.assert_close(y, mt.multilinear_moe(down, hidden, coefficients, bias=True))


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_dropout_drops_inputs_of_the_last_layer_in_training_only(gated: bool) -> None:
    block = small("cp", (3,), "mlp", gate_norm="layer", hidden_dropout=0.5, gated=gated)
    x, seen = torch.randn(200, 6, dtype=torch.float64), []
    block.hidden_dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    y = block.train()(x)
    ((before, after),) = seen
    first, *times = [part(x, block.gate(x)) for part in block.mixtures[:-1]]
    torch.testing.assert_close(before, prod(times, start=nn.functional.gelu(first)))
    assert 0.4 < (after == 0).double().mean() < 0.6
    torch.testing.assert_close(y, block.down(after, block.gate(x)))


def test_dropout_drops_outputs_in_training_only() -> None:
    block = small("cp", (3,), "mlp", gate_norm="layer", dropout=0.5)
    x = torch.randn(200, 6, dtype=torch.float64)
    kept = block.eval()(x)
    dropped = block.train()(x)
    zero = dropped == 0
    assert 0.3 < zero.double().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "norm", "gate"),
    [
        # What the gate computes does not depend on the format.
        *product(["cp"], NORMS, ["entmax15", "sparsemax", "softmax"]),
        *product([*FORMATS, *MORE], ["batch"], ["entmax15"]),
    ],
)
def test_gradients_of_a_block(format: str, norm: str, gate: str, gated: bool = False) -> None:
    torch.manual_seed(0)
    block = small(format, (3, 2), "mlp", gate_norm=norm, gate=gate, input_norm=True, gated=gated)
    names = [name for name, _ in block.named_parameters()]
    statistics = {name: value.clone() for name, value in block.named_buffers()}

    def function(x: Any, *parameters: Any) -> Any:
        state = {**dict(zip(names, parameters, strict=True)), **statistics}
        return torch.func.functional_call(block, state, x)

    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("format", ["tr", *MORE])
def test_gradients_of_a_gated_block(format: str) -> None:
    test_gradients_of_a_block(format, "layer", "softmax", gated=True)


# ---- arguments -------------------------------------------------------------------------------------------


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("format", "experts"), [("cp", 64), ("tucker", 128), ("tr", (16, 16)), ("tt", 64)])
def test_parameters_match_a_linear_layer(format: str, experts: Any) -> None:
    with torch.device("meta"):
        layer = MuMoE(768, 1000, experts, format)
        block = MuMoEMLP(768, 1000, 768, experts, format, parameters="match")
    assert 769_000 <= count(layer) <= 1.02 * 769_000
    assert 769_000 + 1001 * 768 <= count(block) <= 1.05 * (769_000 + 1001 * 768)
    figures = mt.cost(
        format,
        experts=experts,
        in_features=768,
        out_features=1000,
        rank=layer.config["rank"],
        bias=True,
        gate=True,
    )
    assert figures.parameters == count(layer)


def test_published_ranks_by_budget() -> None:
    assert MuMoE(768, 1000, 64, "cp", device="meta").config["rank"] == (393,)
    assert MuMoE(768, 1000, 64, "tr", (4, 4, None), device="meta").config["rank"] == (4, 4, 102)


@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP, Experts])
def test_a_layer_is_made_of_a_spec_and_gives_it_back(kind: Any) -> None:
    sizes: Any = dict(experts=(3, 2), in_features=30, out_features=20, bias=True)
    layer, block = mt.LayerSpec("tr", rank=(2, 2, 2, 3), **sizes), mt.LayerSpec("cp", hidden=40, **sizes)
    block = block.fitted("match")
    spec, other = (block, layer) if kind is MuMoEMLP else (layer, block)
    made = kind.from_spec(spec, batch_hint=8)
    assert made.spec == spec
    weights = spec.weight_parameters if kind is Experts else spec.parameters
    assert count(made) == weights
    if kind is not Experts:
        assert kind.from_config(made.config).spec == spec and made.config["batch_hint"] == 8
        assert made.keep_experts(0, [2]).spec == replace(spec, experts=(1, 2))
    with pytest.raises(ValueError, match=r"spec .*must describe"):
        kind.from_spec(other)


@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
def test_a_rank_that_a_spec_leaves_out_is_solved_for(kind: Any) -> None:
    sizes: Any = dict(experts=8, in_features=30, out_features=20, bias=True)
    spec = mt.LayerSpec("cp", hidden=40 if kind is MuMoEMLP else None, **sizes)
    assert kind.from_spec(spec).spec == spec.fitted("match")
    assert kind.from_spec(spec, parameters=5000).spec == spec.fitted(5000)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, 4, 0), {}, ValueError, "every number of experts must be positive"),
        ((5, 4, 3), {"format": "cpp"}, ValueError, "unknown format"),
        ((5, 4, 3), {"rank": (2, 2)}, ValueError, "one entry per bond, r; "),
        ((5, 4, 3), {"rank": 2, "parameters": 100}, ValueError, "rank and parameters must not both"),
        ((5, 4, 3), {"format": "hadamard", "parameters": 100}, ValueError, "must have a rank"),
        ((5, 4, 3), {"parameters": 10}, ValueError, "the gate alone"),
        ((5, 4, 3), {"rank": 2, "gate": "max"}, ValueError, "gate must be one of"),
        ((5, 4, 3), {"rank": 2, "gate_norm": "group"}, ValueError, "gate_norm must be one of"),
        ((5, 4, 3), {"rank": 2, "init": "zero"}, ValueError, "init must be one of"),
        ((5, 4, 3), {"rank": 2, "bias": 1}, TypeError, "bias must be True or False"),
        ((5, 4, 3), {"rank": 2, "input_norm": "yes"}, TypeError, "input_norm must be True or False"),
        ((5.0, 4, 3), {"rank": 2}, TypeError, "in_features must be an integer"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        MuMoE(*arguments, **options)


def test_what_an_activation_is_multiplied_with_must_fit() -> None:
    experts = small("cp", (3,)).experts
    z, a = torch.randn(5, 6, dtype=torch.float64), [torch.rand(5, 3, dtype=torch.float64)]
    with pytest.raises(ValueError, match="inputs must have 6 features"):
        experts(z, a, torch.sin, times=z[:1])
    with pytest.raises(ValueError, match="activation must be given together with times"):
        experts(z, a, times=z)


def test_bad_calls_are_refused() -> None:
    layer = MuMoE(5, 4, (3, 2), rank=2)
    with pytest.raises(ValueError, match="in_features = 5"):
        layer(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="in_features = 5"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match="index at level 0 must be an integer"):
        layer.expert((3, 0))
    with pytest.raises(ValueError, match=r"coefficients must have shapes \[\(2, 3\), \(2, 2\)\]"):
        layer.experts(torch.zeros(2, 5), [torch.ones(2, 3), torch.ones(1, 2)])
    with pytest.raises(ValueError, match="coefficients must have shapes"):
        layer.experts(torch.zeros(2, 5), [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="activation"):
        MuMoEMLP(5, 6, 4, 3, rank=2, activation="no_such")


def test_any_callable_is_a_gate_and_an_activation() -> None:
    block = small("cp", (4,), "mlp", gate=lambda logits: mt.top_k(logits, 2), activation=torch.tanh)
    _, (a,) = block(torch.randn(9, 6, dtype=torch.float64), return_coefficients=True)
    assert ((a > 0).sum(-1) == 2).all()


# ---- hooks, editing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_on_the_gate_change_the_coefficients(compiled: bool) -> None:
    layer = small("cp", (4,)).eval()
    x = torch.randn(6, 6, dtype=torch.float64)
    before = layer(x)

    def remove_first(module: Any, inputs: Any, output: Any) -> list[Any]:
        return [output[0] * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)]

    handle = layer.gate.register_forward_hook(remove_first)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    _, (a,) = layer(x, return_coefficients=True)
    assert (a[:, 0] == 0).all()
    torch.testing.assert_close(call(x), mt.multilinear_moe(layer.weight, x, [a], bias=True))
    handle.remove()
    torch.testing.assert_close(layer(x), before)


def test_the_plan_is_made_for_the_batch_hint_and_copies_next_to_nothing() -> None:
    for format in ("cp", "tr", "tt", "hadamard"):
        layer = Experts(64, 48, (8, 4), format, rank_of(format, 2, 4), batch_hint=512)
        assert layer.plan.batch == 512
        assert layer.plan.copied <= 0.01 * layer.plan.write


def test_a_layer_without_experts_shows_no_gate() -> None:
    layer = small("btt", ())
    assert repr(layer) == f"MuMoE(\n  (experts): {layer.experts!r}\n)"
    assert "gate.weight" in layer.state_dict() and "gate" in dict(layer.named_children())
    assert "(gate)" in repr(small("btt", (2,)))


def test_a_format_need_not_be_registered() -> None:
    class Own(mt.get_format("cp").__class__):
        name = "own"

    layer = MuMoE(5, 4, 6, Own(), 3).eval()
    assert layer.keep_experts(0, [1, 4])(torch.ones(2, 5)).shape == (2, 4)
