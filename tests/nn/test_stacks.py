"""Experts of a router, and mixtures of experts of transformers whose stacks they replace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import MuMoE, RoutedExperts, load, replace_experts, save, stacks  # noqa: E402

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 32
COMMON = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROUTER = {"output_router_logits": True}
#: Class, and the config besides what all have.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralFor", {"intermediate_size": 8, "num_local_experts": 4, **ROUTER}),
    "OLMoE": ("OlmoeFor", {"intermediate_size": 8, "num_experts": 4, **ROUTER}),
    "Qwen2": (
        "Qwen2MoeFor",
        {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4, **ROUTER},
    ),
    "Qwen3": (
        "Qwen3MoeFor",
        {"moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8, **ROUTER},
    ),
    "DeepSeek": (
        "DeepseekV3For",
        {
            "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4,
            "v_head_dim": 6, "qk_nope_head_dim": 4,
        },
    ),
}  # fmt: skip
BASE_AND_LOW_RANK = mt.sum_of(mt.shared("dense"), "lowrank")


@pytest.fixture
def made(transformers: Any) -> Callable[[str], Any]:
    """A small model by name."""

    def make(name: str) -> Any:
        start, sizes = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{start.removesuffix('For')}Config")(**COMMON, **sizes)
        model = getattr(transformers, f"{start}CausalLM")(config)
        return moved(model)

    return make


def moved(model: Any) -> Any:
    """The model after a change of its weights: as they start, experts change the logits too little."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def loss(model: Any) -> Any:
    return model(TOKENS, labels=TOKENS)


@pytest.mark.parametrize(
    "name, format, ranks",
    [("Mixtral", "dense", [(), ()]), ("Mixtral", "lowrank", [16, 8]),
     ("Mixtral", "tucker", [(4, 16, 16), (4, 8, 16)]),
     *((name, BASE_AND_LOW_RANK, [16, 8]) for name in MODELS)],
)  # fmt: skip
def test_full_rank_gives_the_same_logits_and_gradients(made: Any, name: str, format: Any, ranks: Any) -> None:
    model = made(name)
    replaced = copy.deepcopy(model)
    table = replace_experts(replaced, format=format, gate_up_rank=ranks[0], down_rank=ranks[1])
    assert len(table) == (1 if name == "DeepSeek" else 2)
    assert max(error for each in table for error in (*each.errors, each.output_error)) < 1e-5
    before, after = loss(model), loss(replaced)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    if MODELS[name][1].get("output_router_logits"):
        torch.testing.assert_close(after.aux_loss, before.aux_loss)
    before.loss.backward()
    after.loss.backward()
    expected, gradients = dict(model.named_parameters()), dict(replaced.named_parameters())
    routers = [key for key in expected if key.endswith("mlp.gate.weight")]
    assert len(routers) == len(table)
    for key in (*routers, "model.embed_tokens.weight"):
        torch.testing.assert_close(gradients[key].grad, expected[key].grad, rtol=1e-3, atol=1e-6)


def hidden_of(experts: Any, n: int, rows: Tensor) -> Tensor:
    gate, up = (rows @ experts.gate_up_proj[n].T).chunk(2, -1)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("format", ["lowrank", BASE_AND_LOW_RANK, "cp"])
def test_fits_are_weighted_by_the_inputs_of_each_expert(made: Any, format: Any) -> None:
    """The errors are those of the outputs of each weight, for its inputs; weighting lowers them."""
    model = made("Mixtral")
    calls: list[tuple[Any, ...]] = []
    old = model.model.layers[0].mlp.experts
    handle = old.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for batch in (TOKENS, TOKENS + 7):
            model(batch % 32)
    handle.remove()
    model.train()
    model.model.norm.eval()

    def errors(new: Any) -> list[float]:
        """Of the outputs of both weights of the first layer, each input with its routing weight."""
        squares, norms = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for rows, index, weights in calls:
            for k in range(2):
                for row, n, weight in zip(rows, index[:, k], weights[:, k], strict=True):
                    inputs = (row, hidden_of(old, int(n), row))
                    for j, (part, stack) in enumerate(
                        ((new.gate_up, old.gate_up_proj), (new.down, old.down_proj))
                    ):
                        wanted = weight * inputs[j] @ stack[n].T
                        rest = weight * inputs[j] @ part.expert(int(n))[0] - wanted
                        squares[j] += rest.detach().double().square().sum()
                        norms[j] += wanted.detach().double().square().sum()
        return (squares / norms).sqrt().tolist()

    plain, weighted = copy.deepcopy(model), copy.deepcopy(model)
    replace_experts(plain, format=format, parameters=0.7)
    inputs = (batch for batch in ({"input_ids": TOKENS}, ((TOKENS + 7) % 32,)))
    table = replace_experts(weighted, format=format, parameters=0.7, inputs=inputs)
    assert [name for name, module in weighted.named_modules() if not module.training] == ["model.norm"]
    first = errors(weighted.model.layers[0].mlp.experts)
    # (A little is added to the diagonal of each covariance.)
    assert table[0].weighted_errors == pytest.approx(first, abs=0.05)
    for error, larger in zip(first, errors(plain.model.layers[0].mlp.experts), strict=True):
        assert error < 0.9 * larger
    assert all(a > b for a, b in zip(table[0].errors, table[0].weighted_errors, strict=True))
    assert "weighted by inputs" in str(table[0])


def test_covariances_are_those_of_the_outputs_and_experts_without_inputs_are_fitted(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input counts with its routing weight. Without inputs the fit of an expert is the plain one."""
    model = made("Mixtral")
    old = model.model.layers[0].mlp.experts
    calls: list[tuple[Any, ...]] = []
    handle = old.register_forward_pre_hook(lambda _, args: calls.append(args))
    token = TOKENS[:1, :1]
    with torch.no_grad():
        model(token)
    handle.remove()
    ((rows, (index,), (weights,)),) = calls
    replaced = copy.deepcopy(model)
    replace_experts(replaced, "*.0.*", format="lowrank", gate_up_rank=3, down_rank=3, inputs=[token])
    new = replaced.model.layers[0].mlp.experts
    for n in {0, 1, 2, 3} - {*index.tolist()}:
        for part, stack in ((new.gate_up, old.gate_up_proj), (new.down, old.down_proj)):
            rest = torch.linalg.norm(part.expert(n)[0] - stack[n].T)
            least = torch.linalg.svdvals(stack[n].detach())[3:].norm()
            torch.testing.assert_close(rest, least, rtol=1e-3, atol=0)
    monkeypatch.setattr(stacks, "DAMPING", 0.0)
    model.train().model.layers[0].mlp.jitter_noise = 0.5  # of the inputs, in training
    gate_up, _ = stacks._covariances(model, [old], [token])[old]
    expected = torch.zeros(4, 16, 16, dtype=torch.float64)
    for n, weight in zip(index.tolist(), weights, strict=True):
        expected[n] = (weight**2 * rows.T @ rows).double()
    torch.testing.assert_close(gate_up, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek"])
def test_saved_and_loaded(made: Any, name: str, tmp_path: Path) -> None:
    model = made(name)
    replace_experts(model, format=BASE_AND_LOW_RANK, parameters=0.7)
    model.train()
    loss(model).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path / "transformers")
    save(model, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "transformers")
    other = load(tmp_path / "ours", model=made(name))
    for loaded in (again, other):
        assert torch.equal(loss(loaded).logits, loss(model).logits)
        assert sum(isinstance(module, RoutedExperts) for module in loaded.modules()) >= 1
    # (With the router's logits transformers' Mixtral does not generate.)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_router_logits": False}
    assert torch.equal(again.generate(TOKENS, **options), model.generate(TOKENS, **options))


def test_saved_experts_are_not_replaced_by_new_ones_without_this_package(made: Any, tmp_path: Path) -> None:
    """The file has no dense stacks of the right shape."""
    from safetensors.torch import load_file

    model = made("Mixtral")
    replace_experts(model, format="lowrank")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    dense = [key for key in state if re.search(r"experts\.(\d+\.)?(w\d|gate_up_proj|down_proj)", key)]
    assert dense and all(state[key].numel() <= 2 for key in dense)


def test_frozen_experts_stay_frozen_and_options_reach_the_module(made: Any) -> None:
    model = made("Mixtral").to(torch.bfloat16)
    model.model.layers[1].mlp.experts.requires_grad_(False)
    dry = replace_experts(model, "*.1.*", format="lowrank", parameters=0.5, dry_run=True)
    (replaced,) = replace_experts(model, "*.1.*", format="lowrank", parameters=0.5, batch_hint=64)
    assert [replaced._replace(errors=(), output_error=None)] == dry
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert type(first).__name__ == "MixtralExperts"
    assert second.gate_up.options["batch_hint"] == 64
    assert {p.requires_grad for p in second.parameters()} == {second.training} == {False}
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16}
    assert replaced.after == sum(p.numel() for p in second.parameters()) <= 0.5 * replaced.before
    assert loss(model).logits.isfinite().all()
    (default,) = replace_experts(model.train(), "*.0.*")
    assert 0.6 * default.before < default.after <= 0.8 * default.before
    assert model.model.layers[0].mlp.experts.training
    with pytest.raises(ValueError, match="n_restarts"):
        replace_experts(made("Mixtral"), fit={"n_restarts": 0})
    for dry_run in (False, True):
        with pytest.raises(
            TypeError, match=r"fit may only have the keys \['n_restarts', .*'seed'\], got \['bias', 'steps'\]"
        ):
            replace_experts(made("Mixtral"), fit={"seed": 1, "steps": 4, "bias": True}, dry_run=dry_run)


class Doubled(nn.Module):
    """Experts that compute more than their weights say."""

    def __init__(self, scale: float = 2.0):
        super().__init__()
        self.num_experts, self.act_fn, self.scale = 3, nn.SiLU(), scale
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for n in range(3):
            row, place = (top_k_index == n).nonzero(as_tuple=True)
            part = hidden_of(self, n, hidden_states[row]) @ self.down_proj[n].T
            y = y.index_add(0, row, top_k_weights[row, place, None] * part)
        return self.scale * y


def with_hook(model: Any) -> None:
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)


def tied(model: Any) -> None:
    model.more = nn.Module()
    model.more.weight = model.model.layers[1].mlp.experts.down_proj


def doubled(model: Any) -> None:
    model.model.layers[1].mlp.experts = Doubled()


def with_a_bias(model: Any) -> None:
    model.model.layers[1].mlp.experts.down_proj_bias = nn.Parameter(torch.zeros(4, 16))


def not_finite(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    "spoil, message",
    [
        (with_hook, "forward hook"),
        (tied, "shares a parameter with the rest of the model, 'more.weight'"),
        (doubled, "multiplies by 2"),
        (with_a_bias, "no others.*down_proj_bias.* of MixtralExperts"),
        (not_finite, "must be finite"),
    ],
)
def test_nothing_is_replaced_where_one_cannot_be(made: Any, spoil: Any, message: str) -> None:
    model = made("Mixtral")
    spoil(model)
    with pytest.raises(ValueError, match=f"layers.1.mlp.experts' cannot be replaced: .*{message}"):
        replace_experts(model, format="lowrank")
    assert not any(isinstance(module, RoutedExperts) for module in model.modules())


def test_experts_of_any_model_are_replaced() -> None:
    """Not of transformers, of one expert a row, with any activation."""
    model = nn.Sequential(Doubled(scale=1.0))
    model[0].act_fn = nn.GELU()
    with pytest.raises(ValueError, match="outputs are not those"):
        replace_experts(model)  # its method has another one
    model[0].act_fn = nn.SiLU()
    replace_experts(model, format="dense")
    assert isinstance(model[0], RoutedExperts) and isinstance(model[0].activation, nn.SiLU)


def test_both_weights_must_fit_together() -> None:
    def refused(down: nn.Parameter, message: str) -> None:
        model = nn.Sequential(Doubled(scale=1.0))
        model[0].down_proj = down
        with pytest.raises(ValueError, match=message):
            replace_experts(model)

    refused(
        nn.Parameter(torch.randn(3, 4, 8), requires_grad=False), "the same dtype and the same requires_grad"
    )
    refused(nn.Parameter(torch.randn(3, 4, 8, dtype=torch.float64)), "must have the same dtype")
    refused(nn.Parameter(torch.randn(3, 4, 7)), r"must have shape .* got \(3, 16, 4\) and \(3, 4, 7\)")
    refused(nn.Parameter(torch.randn(2, 4, 8)), r"must have shape .* got \(3, 16, 4\) and \(2, 4, 8\)")


def test_other_experts_are_refused_with_the_cause(made: Any, transformers: Any) -> None:
    sizes = {**COMMON, "intermediate_size": 8, "num_local_experts": 4, "head_dim": 8}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    with pytest.raises(ValueError, match=r"no others.*down_proj_bias.* of GptOssExperts"):
        replace_experts(model)
    with pytest.raises(ValueError, match="must name a module of routed experts"):
        replace_experts(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"must reach all modules .*model\.layers\.0\.mlp.experts"):
        replace_experts(model := made("Mixtral"), inputs=[])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="format 'dense' has"):
        replace_experts(made("Mixtral"), format="dense", parameters=0.8)
    with pytest.raises(TypeError, match=r"those of the old experts, got options \['activation', 'experts'\]"):
        replace_experts(made("Mixtral"), experts=3, activation="relu")
    with pytest.raises(TypeError, match="inputs must be an iterable of batches, got a single Tensor"):
        replace_experts(made("Mixtral"), inputs=torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("levels", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_a_stack_has_its_matrices(levels: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    stack, biases = torch.randn(*levels, 5, 4), torch.randn(*levels, 4) if bias else None
    layer = MuMoE.from_experts(stack, biases, format="lowrank", rank=4, gate="softmax")
    assert layer.fit_errors[0] < 1e-6 and layer.gate.gate is not None
    for index in np.ndindex(*levels):
        matrix, vector = layer.expert(index)
        torch.testing.assert_close(matrix, stack[index])
        if biases is not None:
            torch.testing.assert_close(vector, biases[index])
    fit = {"n_restarts": 1, "input_covariance": torch.eye(5 + bias)}
    rough = MuMoE.from_experts(stack, biases, format="lowrank", rank=1, fit=fit)
    whole = stack if biases is None else torch.cat([stack, biases.unsqueeze(-2)], -2)
    error = torch.linalg.vector_norm(mt.to_dense(rough.weight).detach() - whole)
    assert rough.fit_errors == pytest.approx((float(error / torch.linalg.vector_norm(whole)),))


def test_stacks_of_a_wrong_shape() -> None:
    for stack, bias in ((torch.ones(3), None), (torch.ones(3, 5, 4), torch.ones(3, 5))):
        with pytest.raises(ValueError, match="a stack must have shape"):
            MuMoE.from_experts(stack, bias, rank=2)
    with pytest.raises(TypeError, match="the stack must be a tensor, got list"):
        MuMoE.from_experts([torch.ones(5, 4)], rank=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the bias must be a tensor, got bool"):
        MuMoE.from_experts(torch.ones(3, 5, 4), True, rank=2)  # type: ignore[arg-type]
