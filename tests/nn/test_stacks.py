"""Experts of a router, and mixtures of experts of transformers whose stacks they replace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import replace_experts  # noqa: E402

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 32
COMMON = {
    "vocab_size": 32, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
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
        {"moe_intermediate_size": 8, "num_experts": 4, "head_dim": 6, **ROUTER},
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
NO_DENSE = mt.sum_of(mt.shared("dense"), "lowrank")


@pytest.fixture
def made(transformers: Any) -> Callable[[str], Any]:
    """A small model by name."""

    def make(name: str) -> Any:
        start, sizes = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{start.removesuffix('For')}Config")(**COMMON, **sizes)
        model = getattr(transformers, f"{start}CausalLM")(config)
        for parameter in model.parameters():
            # (As they start the experts of two layers change the logits little, and a bad fit is not seen.)
            nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else None
        return model.eval()

    return make


def loss(model: Any) -> Any:
    return model(TOKENS, labels=TOKENS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "format, rank", [("dense", ()), ("lowrank", 12), (NO_DENSE, 12), ("tucker", (4, 12, 16))]
)
def test_full_rank_gives_the_same_logits_and_gradients(made: Any, name: str, format: Any, rank: Any) -> None:
    model = made(name)
    before, replaced = loss(model), copy.deepcopy(model)
    router, expected = None, None
    if "tucker" in (format,):
        ranks = {"gate_up_rank": rank, "down_rank": (4, 8, 12)}
    else:
        ranks = {"gate_up_rank": rank, "down_rank": rank}
    table = replace_experts(replaced, format=format, **ranks)
    after = loss(replaced)
    assert len(table) == (1 if name == "DeepSeek" else 2)
    assert max(error for each in table for error in each.errors) < 1e-6
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    before.loss.backward()
    after.loss.backward()
    router = [key for key, _ in model.named_parameters() if "gate.weight" in key]
    assert router
    expected, gradients = dict(model.named_parameters()), dict(replaced.named_parameters())
    for key in [*router, "model.embed_tokens.weight"]:
        torch.testing.assert_close(gradients[key].grad, expected[key].grad, rtol=1e-3, atol=1e-6)
    if MODELS[name][1].get("output_router_logits"):
        torch.testing.assert_close(after.aux_loss, before.aux_loss)
