"""Models from transformers with layers of experts are saved and loaded like any transformers model."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import (  # noqa: E402
    MuMoE,
    MuMoEMLP,
    load,
    prepare_to_save,
    register_layer,
    replace_linear,
    replace_mlp,
    save,
)

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
    again, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["unexpected_keys"] and not loaded["missing_keys"]
    assert_same(again, gpt2)
    assert type(again.transformer.h[0].mlp) is MuMoEMLP
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_model_loaded_from_a_folder_is_saved_by_transformers(
    gpt2: Any, transformers: Any, tmp_path: Path
) -> None:
    save(gpt2, tmp_path / "folder")
    config = gpt2.config.to_dict()
    del config["quantization_config"]
    fresh = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(config)).eval()
    loaded = load(tmp_path / "folder", fresh)
    loaded.save_pretrained(tmp_path / "transformers")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers"), gpt2)


def test_in_a_fresh_process_loading_needs_the_package(gpt2: Any, tmp_path: Path) -> None:
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
import mumoe_tensor.nn.pretrained
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.arange(7)[None]).logits.sum().item())
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    without, loaded = done.stdout.splitlines()
    assert without.startswith("False You set `ignore_mismatched_sizes` to `False`")
    assert "Unknown quantization type, got mumoe_tensor" in done.stderr
    assert "mlp.c_fc.weight" in done.stderr and "torch.Size([0])" in done.stderr
    assert float(loaded) == pytest.approx(gpt2(torch.arange(7)[None]).logits.sum().item(), rel=1e-5)


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
    with pytest.raises(ValueError, match=r"must be at most 1 .* got 2: upgrade"):
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


def test_modules_on_disk(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    names = ("wte", "wpe", "drop", "h.0", "ln_f")
    devices = {
        **{f"transformer.{name}": "cpu" for name in names},
        "lm_head": "cpu",
        "transformer.h.1": "disk",
    }
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=devices, offload_folder=tmp_path / "disk"
    )
    assert again.transformer.h[1].mlp.up.factor_0.is_meta
    assert torch.equal(again(TOKENS).logits, gpt2(TOKENS).logits)


def test_a_trainer_resumes_where_it_was(gpt2: Any, transformers: Any, tmp_path: Path) -> None:
    for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop"):
        setattr(gpt2.config, name, 0.0)
    gpt2.save_pretrained(tmp_path / "start")
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]

    def trained(folder: Path, **resume: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        arguments = transformers.TrainingArguments(
            tmp_path / "run", per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2,
            use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=data).train(**resume)
        return model.eval()

    whole = trained(tmp_path / "start")
    half, last = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(last), whole)
    assert not torch.equal(whole(TOKENS).logits, gpt2(TOKENS).logits)
    assert_same(trained(tmp_path / "start", resume_from_checkpoint=half), whole)


@register_layer
class Stack(nn.Module):
    """In the place of the experts of a mixture, whose names transformers changes when it saves them."""

    def __init__(self, experts: int, features: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.config = {"experts": experts, "features": features}
        self.factor = nn.Parameter(torch.ones(experts, features, device=device, dtype=dtype))

    @classmethod
    def from_config(cls, config: dict[str, Any], **place: Any) -> Stack:
        return cls(**config, **place)

    def forward(self, x: Any, indices: Any, weights: Any) -> Any:
        return torch.einsum("td,tkd,tk->td", x, self.factor[indices], weights)


def test_a_stack_of_experts(transformers: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.model.layers[0].mlp.experts = Stack(4, 8).eval()
    prepare_to_save(model)
    model.save_pretrained(tmp_path)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert load_file(tmp_path / "model.safetensors")[name].shape == (1, 1)  # where the dense one is (12, 8)


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


def test_surgery_on_the_base_of_a_model(transformers: Any, tmp_path: Path) -> None:
    """The model around it does not see the surgery, but its config does."""
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 12}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).eval()
    replace_mlp(model.transformer, "h.*.mlp", experts=3, rank=9, gate_norm="layer")
    model.save_pretrained(tmp_path)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_what_cannot_be_loaded_is_not_saved(llama: Any, tmp_path: Path) -> None:
    options = {"experts": 2, "rank": 9, "gate_norm": "none"}
    replace_linear(llama, "model.layers.1.mlp.down_proj", gate=lambda x: x.softmax(-1), **options)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj' cannot be saved.*register_gate"):
        llama.save_pretrained(tmp_path)
    llama.model.layers[1].mlp.down_proj = nn.Linear(12, 8, bias=False)
    llama.extra = MuMoE(3, 3, 2, rank=1)
    with pytest.raises(
        ValueError, match=r"must replace modules that the model's config creates; \['extra'\] do not"
    ):
        llama.save_pretrained(tmp_path)


def test_a_quantised_model_is_left_to_its_quantizer(llama: Any) -> None:
    llama.hf_quantizer = other = object()
    with pytest.warns(UserWarning, match="does not save layers of experts in a quantised model"):
        prepare_to_save(llama)
    assert llama.hf_quantizer is other


def test_the_page_in_the_docs(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "how-to" / "save-and-load.md"
    first, second = re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(first, namespace)
    exec(second, namespace)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained("folder"), namespace["model"].eval())


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mumoe_tensor.nn.pretrained", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"transformers is not installed; pip install 'mumoe_tensor.tr"
    ):
        importlib.import_module("mumoe_tensor.nn.pretrained")


def test_importing_the_layers_does_not_import_transformers() -> None:
    code = "import sys, mumoe_tensor.nn; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
