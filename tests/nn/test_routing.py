"""Gates with settings: by name, over several levels, with parameters of their own, in every tool of torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import assert_comes_back, through_json  # noqa: E402

from mumoe_tensor.gates import relu_top_k  # noqa: E402
from mumoe_tensor.nn import ExpertGate, MuMoE, MuMoEMLP  # noqa: E402

#: Entries of configs, with what the gate computes of the logits of a level and its arrays per expert.
GATES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "topk": ({"k": 2}, lambda x: mt.top_k(x, 2)),
    "topk, not normalised": ({"k": 2, "normalize": False}, lambda x: mt.top_k(x, 2, normalize=False)),
    "relu_topk": ({"k": 3}, lambda x, bias: relu_top_k(x + bias, 3)),
    "relu_topk, no bias": ({"k": 3, "bias": False}, lambda x: relu_top_k(x, 3)),
}
every_entry = pytest.mark.parametrize("name", GATES)


def entry(name: str) -> dict[str, Any]:
    return {"name": name.partition(",")[0], **GATES[name][0]}


def drawn(name: str, experts: Any = (5, 4), kind: Any = MuMoE, **options: Any) -> Any:
    """A layer with a gate of this name, whose parameters are all random."""
    sizes = (6, 7, 4) if kind is MuMoEMLP else (6, 4)
    options = {"gate_norm": "none", "dtype": torch.float64, **options}
    made = kind(*sizes, experts, rank=3, gate=entry(name), **options)
    for each in made.gate.per_expert:
        nn.init.uniform_(getattr(made.gate, each), 0.1, 0.5)
    return made


@every_entry
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_coefficients_are_those_of_the_logits_level_by_level(name: str, norm: str) -> None:
    layer = drawn(name, gate_norm=norm)
    layer.train()(torch.randn(50, 6, dtype=torch.float64))
    layer.eval()
    x = torch.randn(20, 6, dtype=torch.float64)
    coefficients = layer.gate(x)
    logits = x @ layer.gate.weight.T
    if norm == "batch":
        logits = layer.gate.norm(logits)
    values = [getattr(layer.gate, each).split((5, 4)) for each in layer.gate.per_expert]
    for level, a in enumerate(coefficients):
        part = logits.split((5, 4), -1)[level]
        if norm == "layer":
            part = nn.functional.layer_norm(part, part.shape[-1:])
        named = {each: levels[level] for each, levels in zip(layer.gate.per_expert, values, strict=True)}
        torch.testing.assert_close(a, GATES[name][1](part, **named))


@every_entry
@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
def test_a_layer_comes_back_from_its_config_and_state(name: str, kind: Any) -> None:
    layer = (
        kind(5, 6, 4, 4, rank=2, gate=entry(name))
        if kind is MuMoEMLP
        else kind(5, 4, 4, rank=2, gate=entry(name))
    )
    assert entry(name).items() <= through_json(layer.config)["gate"].items()
    assert_comes_back(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(3, 5)
        assert torch.equal(other(x), layer(x)) and other.config == layer.config


@every_entry
def test_some_experts_have_the_same_logits_and_arrays(name: str) -> None:
    layer = drawn(name).eval()
    layer.gate.requires_grad_(False)
    kept = layer.keep_experts(0, [4, 0, 2])
    x = torch.randn(20, 6, dtype=torch.float64)
    rows = [4, 0, 2, 5, 6, 7, 8]
    for each in ("weight", *layer.gate.per_expert):
        assert torch.equal(getattr(kept.gate, each), getattr(layer.gate, each)[rows])
    assert not any(p.requires_grad for p in kept.gate.parameters())
    named = {each: getattr(kept.gate, each)[:3] for each in kept.gate.per_expert}
    torch.testing.assert_close(kept.gate(x)[0], GATES[name][1](x @ kept.gate.weight[:3].T, **named))
    with pytest.raises(ValueError, match=r"k must be at most the number of experts .* for 1 experts"):
        layer.keep_experts(1, [3])


@every_entry
def test_every_parameter_of_the_gate_learns_from_the_start(name: str) -> None:
    layer = drawn(name, 8)
    start = {n: p.detach().clone() for n, p in layer.gate.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    x = torch.randn(64, 6, dtype=torch.float64)
    (layer(x) - x[:, :4]).square().sum().backward()
    optimizer.step()
    for n, p in layer.gate.named_parameters():
        changed = (p - start[n]).reshape(8, -1).norm(dim=1) > 0
        assert changed.all(), n


def test_a_gate_that_selects_starts_random_and_others_at_zero() -> None:
    for gate, starts in (("entmax15", 0), (entry("topk"), 1), (entry("relu_topk"), 1)):
        weight = ExpertGate(4000, (3,), gate=gate).weight
        assert weight.std().item() == pytest.approx(starts / 4000**0.5, rel=0.05)


def test_arrays_per_expert_are_of_the_layer() -> None:
    gate = drawn("relu_topk", device="meta", dtype=torch.bfloat16).gate
    assert gate.bias.is_meta and gate.bias.dtype == torch.bfloat16 and gate.bias.shape == (9,)
    layer = drawn("relu_topk")
    layer.gate.reset_parameters()
    assert isinstance(layer.gate.bias, nn.Parameter) and not layer.gate.bias.any()
    # The instance has settings alone: in two layers it shares nothing.
    shared = layer.gate.gate
    one, other = (MuMoE(6, 4, n, rank=2, gate=shared).gate for n in (5, 9))
    assert one.bias.shape == (5,) and other.bias.shape == (9,)
    nn.utils.parametrize.register_parametrization(layer.gate, "bias", nn.Softplus())
    with pytest.raises(ValueError, match="must be parameters for some of their experts to be taken"):
        layer.keep_experts(0, [0, 1, 2])
    with pytest.raises(ValueError, match=r"a weight alone; the layer's has \('bias',\)"):
        drawn("relu_topk").to_published()
    state = drawn("relu_topk").state_dict()
    with pytest.raises(ValueError, match=r"gate\.bias has shape \(8,\) and should have \(9,\)"):
        drawn("relu_topk").load_state_dict({**state, "gate.bias": torch.zeros(8)})


@every_entry
def test_gates_compile_and_export(name: str) -> None:
    layer = drawn(name).eval()
    x = torch.randn(20, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    torch.testing.assert_close(program.module()(x[:7]), layer(x[:7]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), compiled(x))


@every_entry
def test_sparse_coefficients_have_the_gradients_of_dense_ones(name: str) -> None:
    layer = drawn(name, 1024, kind=MuMoEMLP)
    assert layer.gate.is_sparse_gradient
    x = torch.randn(16, 6, dtype=torch.float64)
    gradients = []
    for hooked in (False, True):
        if hooked:
            layer.gate.register_forward_hook(lambda *_: None)
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ({"name": "topk"}, ValueError, r"gate 'topk' cannot be made with \{\}"),
        ({"name": "topk", "k": 0}, ValueError, "k must be positive, got 0"),
        ({"name": "topk", "k": 1.0}, ValueError, r"k must be an integer, got 1\.0"),
        ({"name": "topk", "k": 2, "normalize": 1}, ValueError, "normalize must be True or False, got 1"),
        ({"name": "topk", "k": 4}, ValueError, "k must be at most the number of experts .* k = 4 for 3 exp"),
        ({"name": "relu_topk", "k": 4}, ValueError, "k must be at most the number of experts of a level"),
        ({"name": "relu_topk", "k": 2, "bias": None}, ValueError, "bias must be True or False, got None"),
        ("topk", ValueError, r"gate 'topk' cannot be made with \{\}"),
    ],
)
def test_settings_that_a_gate_cannot_have(gate: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        MuMoE(6, 4, (5, 3), rank=2, gate=gate)
