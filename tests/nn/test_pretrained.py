"""Models of transformers with layers of experts are saved and loaded as all models of transformers are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP, prepare_to_save, replace_linear, replace_mlp  # noqa: E402

TOKENS = torch.arange(14).reshape(2, 7) % 11


@pytest.fixture
def gpt2(transformers: Any) -> Any:
    """A GPT-2 whose blocks are replaced, with an edit, after an update."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 12}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    replace_mlp(model, "transformer.h.*.mlp", experts=3, rank=9, gate_norm="batch")
    edit_bias(model.transformer.h[0].mlp.down, "more", torch.ones(3) / 3, outputs=[1], strength=0.5)
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.eval()


@pytest.fixture
def llama(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    replace_linear(model, "model.layers.*.mlp.up_proj", experts=3, rank=9, gate_norm="layer")
    return model.eval()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, and with the same layers in the same modes."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert [m.training for m in model.modules()] == [m.training for m in expected.modules()]
    with torch.no_grad():
        for one, other in zip(model(TOKENS).values(), expected(TOKENS).values(), strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


def test_a_model_comes_back_and_is_saved_again(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(again, gpt2)
    assert type(again.transformer.h[0].mlp) is MuMoEMLP
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_without_the_package_loading_fails(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    code = """
import importlib.util, sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")
if importlib.util.find_spec("torchvision") is not None:
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("mumoe_tensor" in sys.modules, error)
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False You set `ignore_mismatched_sizes` to `False`")
    assert "Unknown quantization type, got mumoe_tensor" in done.stderr
    assert "mlp.c_fc.weight" in done.stderr and "torch.Size([0])" in done.stderr


def test_heads_and_bases(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same(base, gpt2.transformer)
    base.save_pretrained(tmp_path / "base")
    gpt2.transformer.save_pretrained(tmp_path / "part")
    for name in ("base", "part"):
        assert_same(transformers.AutoModel.from_pretrained(tmp_path / name), gpt2.transformer)
        assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name), gpt2)


def test_a_missing_factor_is_an_error(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    gpt2.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("transformer.h.0.mlp.up.factor_1", "transformer.h.1.mlp.gate.norm.running_mean"):
        rest = {key: value for key, value in weights.items() if key != name}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"must have all factors of the layers; .'{name}'. are missing"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_later_version_is_refused(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="up to version 1, got 2: upgrade it"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {}], ids=str
)
def test_shards_dtypes_and_devices(llama: Any, transformers: Any, options: Any, tmp_path: Path) -> None:
    llama.to(options.get("dtype", torch.float32)).save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert_same(again, llama)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(TOKENS, **options), llama.generate(TOKENS, **options))
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(half, llama.bfloat16())
    half.float()  # as every model can be cast


def test_layers_placed_by_hand(llama: Any, transformers: Any, tmp_path: Path) -> None:
    llama.lm_head = MuMoE(8, 11, experts=2, rank=3, gate_norm="none", bias=False)
    prepare_to_save(nn.ModuleDict({"inner": llama}))
    state = torch.get_rng_state()
    llama.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), llama.eval())
    assert_same(transformers.AutoModel.from_pretrained(tmp_path), llama.model)
    for layer in llama.model.layers:
        layer.mlp.up_proj = nn.Linear(8, 12, bias=False)
    llama.lm_head = nn.Linear(8, 11, bias=False)
    llama.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_importing_the_layers_does_not_import_transformers() -> None:
    code = "import sys, mumoe_tensor.nn; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
