"""Experts beside the linear layers of a frozen model: equal at the start, saved alone, merged, removed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import (  # noqa: E402
    Adapter,
    MuMoE,
    add_experts,
    load,
    load_adapter,
    merge_experts,
    remove_experts,
    replace_linear,
    save,
    save_adapter,
)

TOKENS = torch.arange(14).reshape(2, 7) % 11


class Network(nn.Module):
    """Linear layers, one of them in two places, and one without a bias."""

    def __init__(self, dtype: Any = None) -> None:
        super().__init__()
        shared = nn.Linear(6, 6, dtype=dtype)
        self.layers = nn.ModuleList([shared, nn.Linear(6, 6, bias=False, dtype=dtype), shared])
        self.head = nn.Linear(6, 4, dtype=dtype)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def trained(model: nn.Module, x: Any, steps: int = 3) -> nn.Module:
    """After some updates of what is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def gpt2_of(transformers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 12}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options)
    return transformers.GPT2LMHeadModel(config)


@settings(deadline=None, max_examples=settings().max_examples)
@given(
    format=st.sampled_from([*mt.formats(), mt.sum_of(mt.shared("dense"), "cp")]),
    experts=st.sampled_from([(), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_outputs_start_as_they_are_and_only_the_experts_learn(format: Any, experts: Any, dtype: Any) -> None:
    network = Network(dtype)
    x = torch.randn(9, 6, dtype=dtype)
    expected, state = network(x), copy.deepcopy(network.state_dict())
    rank = (2,) * len(mt.get_format(format).bonds(len(experts)))
    add_experts(network, "layers.*", experts=experts, format=format, rank=rank, gate_norm="none")
    y = network(x)
    assert torch.equal(y, expected) and y.dtype == dtype
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names and all(".delta." in name for name in names)
    deltas = [m.delta for m in network.modules() if isinstance(m, Adapter)]
    assert {p.dtype for delta in deltas for p in delta.parameters()} == {
        torch.promote_types(dtype, torch.float32)
    }
    if dtype != torch.float16:
        trained(network, x)
        assert not torch.equal(network(x), expected)
    remove_experts(network)
    assert torch.equal(network(x), expected) and network.layers[0] is network.layers[2]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.state_dict().keys() == state.keys()


@pytest.mark.parametrize("experts", [(), (3,), (3, 2)])
@pytest.mark.parametrize("format", ["cp", "tt-matrix", "shared-expert"])
def test_merged_is_the_model_with_one_expert_chosen(format: str, experts: Any) -> None:
    network = Network(torch.float64)
    rank = (2,) * len(mt.get_format(format).bonds(len(experts)))
    add_experts(network, "*", experts=experts, format=format, rank=rank, gate_norm="none")
    x = torch.randn(9, 6, dtype=torch.float64)
    trained(network, x)
    expert = tuple(n - 1 for n in experts)

    def choose(module: Any, inputs: Any, coefficients: Any) -> Any:
        return [nn.functional.one_hot(torch.tensor(k), n).to(a) + 0 * a for k, n, a in zip(expert, experts, coefficients, strict=True)]  # fmt: skip  # noqa: E501

    merged = copy.deepcopy(network)
    merge_experts(merged, expert)
    assert not any(isinstance(module, Adapter) for module in merged.modules())
    assert merged.state_dict().keys() == Network().state_dict().keys()
    for module in network.modules():
        if isinstance(module, Adapter):
            module.delta.gate.register_forward_hook(choose)
    torch.testing.assert_close(merged(x), network(x))
    assert not torch.allclose(merged(x), network_without(network)(x))


def test_a_merged_weight_of_a_short_dtype_is_rounded_once() -> None:
    network = Network(torch.bfloat16)
    add_experts(network, "head", experts=3, rank=2)
    delta = network.head.delta
    nn.init.normal_(delta.experts.factors[-1])
    (matrix, bias), base = delta.expert(1), copy.deepcopy(network.head.base)
    merge_experts(network, 1)
    assert torch.equal(network.head.weight, (base.weight + matrix.T).bfloat16())
    assert torch.equal(network.head.bias, (base.bias + bias).bfloat16())


def network_without(network: nn.Module) -> nn.Module:
    bare = copy.deepcopy(network)
    remove_experts(bare)
    return bare


def test_what_cannot_be_merged_or_removed_leaves_the_model_as_it_was() -> None:
    network = Network()
    add_experts(network, "layers.*", experts=3, rank=2, gate_norm="none")
    add_experts(network, "head", experts=(), format="lowrank", rank=2, input_norm=True)
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="experts to be merged must have no input norm, got one for 'head'"):
        merge_experts(network, (), "head")
    with pytest.raises((ValueError, TypeError)):
        merge_experts(network, 3, "layers.*")
    with pytest.raises((ValueError, TypeError)):
        merge_experts(network, 1)  # the head has no levels
    for call in (remove_experts, lambda model, name: merge_experts(model, 0, name)):
        with pytest.raises(TypeError, match="the pattern must be a string, got 3"):
            call(network, 3)
        with pytest.raises(ValueError, match="the pattern must name a layer with parallel experts"):
            call(network, "body.*")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    merge_experts(network, 1, "layers.1")
    remove_experts(network, "head")
    assert [*{name.rpartition(".delta.")[0] for name in network.state_dict() if "delta" in name}] in (
        ["layers.0", "layers.2"], ["layers.2", "layers.0"],
    )  # fmt: skip


def test_outputs_that_would_change_are_refused() -> None:
    # Zero times a coefficient that is not finite is not zero.
    network = Network()
    before = [*network.named_modules()]
    with pytest.raises(ValueError, match=r"'head' cannot have parallel experts: .* error would be nan"):
        add_experts(network, "head", experts=3, rank=2, gate=lambda logits: logits + torch.inf)
    assert [*network.named_modules()] == before
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_dry_run_changes_nothing() -> None:
    network = Network()
    before = [*network.named_modules()]
    planned = add_experts(network, "layers.*", experts=3, rank=2, dry_run=True)
    assert [*network.named_modules()] == before
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert planned == add_experts(network, "layers.*", experts=3, rank=2)
    with pytest.raises(
        ValueError, match=r"'layers\.0' cannot have parallel experts: it already has parallel experts"
    ):
        add_experts(network, "layers.*", experts=3, rank=2, dry_run=True)
    with pytest.raises(TypeError, match="dry_run"):
        add_experts(network, "head", experts=3, rank=2, dry_run=1)


def test_a_layer_is_not_replaced_in_part() -> None:
    network = Network()
    add_experts(network, "head", experts=3, rank=2)
    with pytest.raises(ValueError, match="part of a layer of class Adapter, which must stay whole"):
        replace_linear(network, "head.base", experts=3, rank=2)
    assert type(network.head.base) is nn.Linear


def test_a_folder_of_experts_alone_is_no_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    add_experts(model, "0", experts=3, rank=2)
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"the model must have a module 'adapters\.0'"):
        load(tmp_path, model=plain)
    assert type(plain[0]) is nn.Linear


def test_experts_beside_experts_are_refused() -> None:
    network = Network()
    add_experts(network, "layers.0", experts=3, rank=2)
    before = [*network.named_modules()]
    part = "it is a part of a layer of class Adapter, which must stay whole"
    for pattern, cause in (("*", "it already has parallel experts"), ("*.base", part)):
        with pytest.raises(ValueError, match=f"cannot have parallel experts: {cause}"):
            add_experts(network, pattern, experts=3, rank=2)
    assert [*network.named_modules()] == before
    for options in ({}, {"experts": 3, "bias": True}, {"experts": 3, "gate_features": 6}):
        with pytest.raises(TypeError, match="the options must include experts, but neither bias"):
            add_experts(network, "head", rank=2, **options)
    with pytest.raises(TypeError, match=r"a model must be a torch\.nn\.Module, got str"):
        add_experts("network", "head", experts=3)
    with pytest.raises(ValueError, match=r"'head' cannot have parallel experts: .*rank"):
        add_experts(network, "head", experts=3, rank=0)
    # Later adapters are trained with the earlier ones.
    add_experts(network, "head", experts=3, rank=2)
    parts = {name.split(".delta.")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert parts == {"layers.0", "head"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_saved_alone(dtype: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    network, x = Network(dtype), torch.randn(9, 6, dtype=dtype)
    plain = copy.deepcopy(network)
    gate = {"name": "relu_topk", "k": 2}
    add_experts(network, "layers.*", experts=(3, 2), format="tr", rank=(2, 2, 2, 2), gate=gate)
    add_experts(network, "head", experts=(), format="lowrank", rank=2)
    trained(network, x)
    save_adapter(network, tmp_path)
    size = (tmp_path / "weights.safetensors").stat().st_size
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(x), network.eval()(x)) and other.layers[0] is other.layers[2]
    assert not any(p.requires_grad for n, p in other.named_parameters() if ".delta." not in n)
    assert all(p.requires_grad for n, p in other.named_parameters() if ".delta." in n)
    # What does not fit changes nothing.
    with pytest.raises(ValueError, match="it already has parallel experts"):
        load_adapter(other, tmp_path)
    plain.head = nn.Linear(6, 5, dtype=dtype)
    before = [*plain.named_modules()]
    with pytest.raises(ValueError, match=r"'head' cannot have parallel experts: the experts must match"):
        load_adapter(plain, tmp_path)
    plain.head = nn.Linear(6, 4, bias=False, dtype=dtype)
    with pytest.raises(ValueError, match=r"\(6, 4, False\); got \(6, 4, True\)"):
        load_adapter(plain, tmp_path)
    save(MuMoE(6, 5, 3, rank=2), tmp_path / "layer")
    with pytest.raises(ValueError, match=r"must be saved by save_adapter, .* got \[''\]"):
        load_adapter(plain, tmp_path / "layer")
    plain.head = nn.Identity()
    with pytest.raises(ValueError, match="the pattern must name a linear layer"):
        load_adapter(plain, tmp_path)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in before]
    with pytest.raises(ValueError, match="the pattern must name a layer with parallel experts"):
        save_adapter(plain, tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size == size


def test_a_model_is_saved_with_its_adapters(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    network, x = Network(), torch.randn(9, 6)
    add_experts(network, "*", experts=3, rank=2, gate_norm="none")
    trained(network, x)
    save(network, tmp_path)
    again = load(tmp_path, model=Network())
    assert torch.equal(again(x), network(x)) and isinstance(again.layers[1], Adapter)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_of_transformers(transformers: Any, checkpointing: bool, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = gpt2_of(transformers).eval()
    plain = copy.deepcopy(model)
    pattern = "transformer.h.*.mlp.c_*"
    add_experts(model, pattern, experts=3, parameters="1.5x")
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)
    generated = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 10)
    model.save_pretrained(tmp_path / "whole")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    # Removed or merged, the model is one of transformers again.
    adapter = model.transformer.h[0].mlp.c_fc
    again = Adapter.from_config(adapter.config, dtype=torch.float64)
    assert again.config == adapter.config and type(again.base) is type(adapter.base)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    x = torch.randn(5, 8)
    matrix, bias = adapter.delta.expert(2)
    expected = adapter.base(x) + x @ matrix + bias
    merge_experts(model, 2, "transformer.h.0.*")
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc(x), expected)
    remove_experts(model)
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert again.state_dict().keys() == gpt2_of(transformers).state_dict().keys()
