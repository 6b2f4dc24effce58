"""Gates with settings: by name, over several levels, with parameters of their own, in every tool of torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nasty_rows import nasty

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import assert_comes_back, through_json  # noqa: E402

from mumoe_tensor.gates import jumprelu, relu_top_k, sigmoid_top_k  # noqa: E402
from mumoe_tensor.nn import ExpertGate, MuMoE, MuMoEMLP, functional  # noqa: E402

#: Entries of configs, with what the gate computes of the logits of a level and its arrays per expert.
GATES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "topk": ({"k": 2}, lambda x: mt.top_k(x, 2)),
    "topk, not normalised": ({"k": 2, "normalize": False}, lambda x: mt.top_k(x, 2, normalize=False)),
    "relu_topk": ({"k": 3}, lambda x, bias: relu_top_k(x + bias, 3)),
    "relu_topk, no bias": ({"k": 3, "bias": False}, lambda x: relu_top_k(x, 3)),
    "jumprelu": (
        {"threshold": 0.3, "bandwidth": 2.0},
        lambda x, log_threshold: jumprelu(x, log_threshold.exp(), bandwidth=2.0),
    ),
    "sigmoid_topk": (
        {"k": 2, "normalize": False, "scale": 2.5},
        lambda x, selection_bias: sigmoid_top_k(x, 2, bias=selection_bias, normalize=False, scale=2.5),
    ),
}
#: Gates that read the input.
NULLS: dict[str, dict[str, Any]] = {"random": {"k": 2}, "nearest_centres": {"k": 2}}
every_entry = pytest.mark.parametrize("name", GATES)
every_null = pytest.mark.parametrize("name", NULLS)
each = pytest.mark.parametrize("name", [*GATES, *NULLS])


def entry(name: str) -> dict[str, Any]:
    return {"name": name.partition(",")[0], **(NULLS.get(name) or GATES[name][0])}


def drawn(name: str, experts: Any = (5, 4), kind: Any = MuMoE, **options: Any) -> Any:
    """A layer with a gate of this name, whose parameters are all random."""
    sizes = (6, 7, 4) if kind is MuMoEMLP else (6, 4)
    options = {"gate_norm": "none", "dtype": torch.float64, **options}
    made = kind(*sizes, experts, rank=3, gate=entry(name), **options)
    for array in made.gate.per_expert:
        nn.init.uniform_(getattr(made.gate, array), -0.5, 0.5)
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
    arrays = {name: getattr(layer.gate, name).split((5, 4)) for name in layer.gate.per_expert}
    for level, a in enumerate(coefficients):
        part = logits.split((5, 4), -1)[level]
        if norm == "layer":
            part = nn.functional.layer_norm(part, part.shape[-1:])
        of_level = {key: levels[level] for key, levels in arrays.items()}
        torch.testing.assert_close(a, GATES[name][1](part, **of_level))


@each
@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
def test_a_layer_comes_back_from_its_config_and_state(name: str, kind: Any) -> None:
    layer = (
        kind(5, 6, 4, 4, rank=2, gate=entry(name))
        if kind is MuMoEMLP
        else kind(5, 4, 4, rank=2, gate=entry(name))
    )
    assert entry(name).items() <= through_json(layer.config)["gate"].items()
    if name != "random":
        assert_comes_back(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.config == layer.config
        x, outputs = torch.randn(3, 5), []
        for module in (layer, other):
            torch.manual_seed(0)
            outputs.append(module(x))
        assert torch.equal(*outputs)


@every_entry
def test_some_experts_have_the_same_logits_and_arrays(name: str) -> None:
    layer = drawn(name).eval()
    layer.gate.requires_grad_(False)
    kept = layer.keep_experts(0, [4, 0, 2])
    x = torch.randn(20, 6, dtype=torch.float64)
    rows = [4, 0, 2, 5, 6, 7, 8]
    for array in ("weight", *layer.gate.per_expert):
        assert torch.equal(getattr(kept.gate, array), getattr(layer.gate, array)[rows])
    assert not any(p.requires_grad for p in kept.gate.parameters())
    named = {array: getattr(kept.gate, array)[:3] for array in kept.gate.per_expert}
    torch.testing.assert_close(kept.gate(x)[0], GATES[name][1](x @ kept.gate.weight[:3].T, **named))
    if "k" in GATES[name][0]:
        with pytest.raises(ValueError, match=r"k must be at .* (for 1 experts|of size 1)"):
            layer.keep_experts(1, [3])


@every_entry
def test_every_parameter_of_the_gate_learns_from_the_start(name: str) -> None:
    layer = drawn(name, 8)
    layer.gate.reset_parameters()
    start = {n: p.detach().clone() for n, p in layer.gate.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    x = torch.randn(256, 6, dtype=torch.float64)
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
    with pytest.raises(ValueError, match="must be parameters for experts to be removed"):
        layer.keep_experts(0, [0, 1, 2])
    with pytest.raises(ValueError, match=r"only a weight, got \('bias',\)"):
        drawn("relu_topk").to_published()
    state = drawn("relu_topk").state_dict()
    with pytest.raises(ValueError, match=r"gate\.bias has shape \(8,\) and should have \(9,\)"):
        drawn("relu_topk").load_state_dict({**state, "gate.bias": torch.zeros(8)})


@pytest.mark.parametrize("name", ["topk", "jumprelu", "sigmoid_topk", "nearest_centres"])
def test_gates_compile_and_export(name: str) -> None:
    gate = drawn(name).eval().gate
    x = torch.randn(20, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gate(x))
    program = torch.export.export(gate, (x,), dynamic_shapes={"z": {0: torch.export.Dim("rows", min=2)}})
    torch.testing.assert_close(program.module()(x[:7]), gate(x[:7]))
    with torch.no_grad():
        torch.testing.assert_close(gate(x), compiled(x))


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


@every_null
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_nulls_have_neither_weight_nor_norm_and_weigh_equally(name: str, norm: str) -> None:
    layer = drawn(name, gate_norm=norm, kind=MuMoEMLP)
    assert not list(layer.gate.parameters()) and layer.gate.norm is None and not len(layer.gate.weight)
    x = torch.randn(7, 20, 6, dtype=torch.float64)
    for training in (True, False):
        y, coefficients = layer.train(training)(x, return_coefficients=True)
        for a, n in zip(coefficients, (5, 4), strict=True):
            assert a.shape == (7, 20, n) and a.dtype == x.dtype
            assert torch.equal(a.sort(-1).values[..., -2:], torch.full((7, 20, 2), 0.5, dtype=x.dtype))
            assert torch.equal(a.sum(-1), torch.ones(7, 20, dtype=x.dtype))
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.keep_experts(0, [1, 3]).gate(x)[0].shape == (7, 20, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert drawn(name, dtype=torch.float32).gate(x.float())[0].dtype == torch.float32
    with pytest.raises(ValueError, match="the gate of a published layer must have only a weight"):
        layer.to_published()


@each
def test_layers_of_short_dtypes_choose_in_float32(name: str) -> None:
    layer = drawn(name, dtype=torch.bfloat16)
    x, wide = torch.randn(40, 6, dtype=torch.bfloat16), copy.deepcopy(layer.gate).float()
    torch.manual_seed(0)
    coefficients = layer.gate(x)
    torch.manual_seed(0)
    if name in NULLS:
        expected = wide(x.float())
    else:
        logits = nn.functional.linear(x, layer.gate.weight).float()
        expected = wide.coefficients_of(logits)
    for a, b in zip(coefficients, expected, strict=True):
        assert torch.equal(a, b.to(torch.bfloat16)) and a.dtype == torch.bfloat16


def test_random_experts_are_drawn_anew_and_equally_often() -> None:
    gate = drawn("random", (8, 3)).eval().gate
    x = torch.zeros(4000, 6, dtype=torch.float64)
    torch.manual_seed(0)
    first = gate(x)
    second = gate(x)
    assert not torch.equal(first[0], second[0])
    for a, n in zip(first, (8, 3), strict=True):
        torch.testing.assert_close(a.mean(0), torch.full((n,), 1 / n, dtype=a.dtype), atol=0.015, rtol=0)
        # Rows do not share their draw.
        assert len(a.unique(dim=0)) == {8: 28, 3: 3}[n]
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(gate(x), first, strict=True))


def test_nearest_centres_are_those_of_the_clusters_of_the_inputs() -> None:
    pytest.importorskip("sklearn")
    layer = MuMoE(6, 4, (5, 2), rank=3, gate={"name": "nearest_centres", "k": 1}, dtype=torch.float64)
    clusters = 100 * torch.eye(6, dtype=torch.float64)[:5]
    x = clusters.repeat_interleave(20, 0) + torch.randn(100, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="as many inputs as experts, got 4 for 5"):
        layer.gate.fit(x[:4])
    with pytest.raises(ValueError, match=r"inputs must have 6 features, got shape \(100, 5\)"):
        layer.gate.fit(x[:, :5])
    torch.manual_seed(0)
    layer.gate.fit(x.reshape(10, 10, 6))
    groups = layer.gate(x)[0].argmax(-1).reshape(5, 20)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == 5
    means = x.reshape(5, 20, 6).mean(1)
    torch.testing.assert_close(layer.gate.centres[groups[:, 0]], means)
    # The distance is that to the centres, with ties and NaN as in every gate.
    z = torch.randn(50, 6, dtype=torch.float64)
    nearest = torch.cdist(z, layer.gate.centres[:5]).argmin(-1)
    assert torch.equal(layer.gate(z)[0].argmax(-1), nearest)
    layer.gate.centres.zero_()
    z[0, 0] = torch.nan
    (a, _) = layer.gate(z)
    assert a[0].isnan().all() and (a[1:, 0] == 1).all()
    with pytest.raises(ValueError, match=r"levels to be fitted, got ExpertGate\(6,"):
        drawn("topk").gate.fit(x)
    with pytest.raises(TypeError, match=r"an input must be a torch\.Tensor, got ndarray"):
        layer.gate.fit(x.numpy())


@each
@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
def test_the_gate_sees_another_input_than_the_experts(name: str, kind: Any) -> None:
    layer = drawn(name, kind=kind, gate_features=3).eval()
    x, g = (torch.randn(2, 5, n, dtype=torch.float64) for n in (6, 3))
    torch.manual_seed(0)
    y, coefficients = layer(x, gate_input=g, return_coefficients=True)
    torch.manual_seed(0)
    for a, b in zip(layer.gate(g), coefficients, strict=True):
        assert torch.equal(a, b)
    hidden = (layer.up if kind is MuMoEMLP else layer.experts)(x, coefficients)
    expected = layer.down(nn.functional.gelu(hidden), coefficients) if kind is MuMoEMLP else hidden
    torch.testing.assert_close(y, expected)
    again = kind.from_config(through_json(layer.config))
    assert again.config == layer.config and again.gate.in_features == 3
    assert layer.keep_experts(0, [0, 1, 2])(x, gate_input=g).shape == y.shape
    with pytest.raises(ValueError, match="the gate's input must have in_features = 3 entries"):
        layer(x)
    with pytest.raises(ValueError, match=r"inputs must have 6 features, and coefficients must have shapes"):
        layer(x, gate_input=g[:, :4])


def test_the_input_of_the_gate_counts_in_the_budget_and_the_config_where_it_is_used() -> None:
    assert "gate_features" not in MuMoE(6, 4, 3, rank=2).config
    with pytest.raises(ValueError, match="gate_features must be None without experts, got 3"):
        MuMoE(6, 4, (), "dense", gate_features=3)
    for features in (2, 40):
        layer = MuMoE(60, 40, 8, gate_features=features, parameters=1500, gate_norm="none")
        total = sum(p.numel() for p in layer.parameters())
        assert 1500 <= total < 1500 + 60 + 1 + 40 + 8 and layer.config["gate_features"] == features


def test_a_layer_with_another_input_of_the_gate_compiles_and_exports() -> None:
    layer = drawn("relu_topk", kind=MuMoEMLP, gate_features=3).eval()
    x, g = (torch.randn(9, n, dtype=torch.float64) for n in (6, 3))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, gate_input=g), layer(x, gate_input=g))
    program = torch.export.export(layer, (x,), {"gate_input": g})
    torch.testing.assert_close(program.module()(x, gate_input=g), layer(x, gate_input=g))


def test_the_sigmoid_gate_is_the_router_of_deepseek_v3(transformers: Any) -> None:
    from transformers.models.deepseek_v3 import DeepseekV3Config, modeling_deepseek_v3

    sizes = dict(hidden_size=6, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2)
    router = modeling_deepseek_v3.DeepseekV3TopkRouter(DeepseekV3Config(**sizes, routed_scaling_factor=2.5))
    gate = ExpertGate(
        6, (12,), gate={"name": "sigmoid_topk", "k": 4, "groups": 4, "top_groups": 2, "scale": 2.5},
        gate_norm="none",
    )  # fmt: skip
    nn.init.normal_(gate.selection_bias, std=0.3)
    nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(gate.selection_bias)
    with torch.no_grad():
        gate.weight.copy_(router.weight)
    x = torch.randn(50, 6)
    _, weights, indices = router(x)
    (a,) = gate(x)
    torch.testing.assert_close(a, torch.zeros(50, 12).scatter(1, indices, weights))


def nasty_logits(n: int) -> Any:
    rows = torch.tensor(np.stack(list(nasty(n).values())))
    bad = torch.stack([torch.full((n,), bad) for bad in (torch.nan, torch.inf, -torch.inf)])
    among_others = torch.arange(3.0 * n).sin().reshape(3, n)
    among_others[:, 1] = bad[:, 0]
    return torch.cat([rows.float(), bad, among_others])


@pytest.mark.parametrize("n", [4, 17, 256])
@pytest.mark.parametrize("name", ["topk", "topk, not normalised", "relu_topk, no bias"])
def test_the_fast_choice_is_the_general_one_on_nasty_rows(name: str, n: int) -> None:
    gate = drawn(name, 8).gate.gate
    fast = 0
    for row in (*nasty_logits(n)[:, None], torch.randn(50, n)):
        row.requires_grad_()
        fast += functional.largest(row, gate.k) is not None
        ours, general = gate(row), GATES[name][1](row)
        torch.testing.assert_close(ours, general, atol=6e-7, rtol=0, equal_nan=True)
        if not general.isnan().any():
            c = torch.randn_like(row)
            pair = [torch.autograd.grad((p * c).sum(), row)[0] for p in (ours, general)]
            torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    assert fast > 2


def test_second_derivatives_of_the_fast_choice() -> None:
    x = torch.arange(12, dtype=torch.float64).reshape(2, 6).sin().requires_grad_()
    for name in ("topk", "topk, not normalised", "relu_topk, no bias"):
        gate = drawn(name, 8).gate.gate
        assert functional.largest(x, gate.k) is not None
        assert torch.autograd.gradcheck(gate, x) and torch.autograd.gradgradcheck(gate, x)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ({"name": "topk"}, ValueError, r"gate 'topk' cannot be made with \{\}"),
        ({"name": "topk", "k": 0}, ValueError, "k must be positive, got 0"),
        ({"name": "topk", "k": 1.0}, ValueError, r"k must be an integer, got 1\.0\.$"),
        ({"name": "topk", "k": 2, "normalize": 1}, ValueError, "normalize must be True or False, got 1"),
        ({"name": "topk", "k": 4}, ValueError, "k must be at most the number of experts .* k = 4 for 3 exp"),
        ({"name": "relu_topk", "k": 4}, ValueError, "k must be at most the number of experts of a level"),
        ({"name": "relu_topk", "k": 2, "bias": None}, ValueError, "bias must be True or False, got None"),
        ("topk", ValueError, r"gate 'topk' cannot be made with \{\}"),
        ({"name": "jumprelu", "threshold": 0}, ValueError, r"must be positive, got 0\.0 and 0\.001"),
        ({"name": "jumprelu", "bandwidth": -1}, ValueError, r"must be positive, got 0\.001 and -1\.0"),
        ({"name": "sigmoid_topk", "k": 2, "groups": 2}, ValueError, "groups must divide .* for size 5"),
        ({"name": "sigmoid_topk", "k": 2, "scale": None}, ValueError, "scale must be a number, got None"),
        ({"name": "sigmoid_topk", "k": 2, "scale": -1}, ValueError, r"scale must be positive, got -1\.0"),
        ({"name": "random", "k": 4}, ValueError, "k must be at most the number of experts of a level"),
        ({"name": "nearest_centres", "k": 4}, ValueError, "k must be at most the number of experts"),
    ],
)
def test_settings_that_a_gate_cannot_have(gate: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        MuMoE(6, 4, (5, 3), rank=2, gate=gate)
