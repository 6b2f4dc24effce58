"""The zoo: small models from transformers, timm and torch, whose layers surgery replaces or refuses.

Each is built by its library from the sizes here, without weights of others. `examine` replaces its layers and
does with it what its users do.

    python tests/zoo.py                  # examine all thoroughly, and write the page of the docs
    python tests/zoo.py load FOLDER      # load all models that were saved there, and compare their outputs
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vision import define_operators

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "models-of-others.md"
#: The options of all replacements: their rank is enough for layers of up to 16 inputs or outputs, and a bias.
OPTIONS: dict[str, Any] = {"experts": 4, "format": "cp", "rank": 17, "gate_norm": "layer"}


def tokens(*names: str) -> dict[str, Tensor]:
    """Inputs of a language model, and of a model with an encoder and a decoder."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(3, 32, (2, 8), generator=generator) for name in names or ("input_ids",)}


def images(name: str, size: int) -> dict[str, Tensor]:
    return {name: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def speech() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, **tokens("decoder_input_ids")}


def vectors() -> dict[str, Tensor]:
    return {"src": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Model:
    """A model and what surgery does with it.

    Attributes
    ----------
    library : {"transformers", "timm", "torch"}
    name : str
        Of its class; in timm of the model.
    sizes : dict
        That make it small.
    blocks, linears : tuple of str
        Patterns of what `replace_mlp` and `replace_linear` replace.
    refused : dict of str to str
        Patterns of blocks that are refused, each with words of the error.
    inputs : callable
        The arguments of a call.
    options : dict
        Further options of the replacement.
    compiled : bool
        Whether the tests compile it; `examine` of the whole table compiles all.
    """

    library: str
    name: str
    sizes: dict[str, Any]
    blocks: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = tokens
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.library} {self.name}{f', {self.note}' if self.note else ''}"

    @property
    def is_replaced(self) -> bool:
        return bool(self.blocks or self.linears)

    def make(self) -> Any:
        """The model, with weights that hide nothing: heads of zeros and small scales are drawn anew."""
        torch.manual_seed(0)
        network = self._make()
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-3:
                nn.init.normal_(parameter, std=0.1)
        return network

    def _make(self) -> Any:
        if self.library == "torch":
            return nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**self.sizes), 2, enable_nested_tensor=False
            )
        if self.library == "timm":
            import timm

            kind = getattr(timm.models, self.name, None)
            make = kind if isinstance(kind, type) else partial(timm.create_model, self.name)
            return make(num_classes=5, **self.sizes)
        import transformers

        kind = getattr(transformers, self.name)
        return kind(kind.config_class(**self.sizes))


TOKENS = {
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
PICTURES = {**WIDTHS, "image_size": 16, "patch_size": 8}
VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
           "decoder_ffn_dim": 24, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
           "begin_suppress_tokens": None}  # fmt: skip
OPT = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
       "word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
INLINED = "must take one input"


def of_transformers(name: str, sizes: dict[str, Any], *blocks: str, **more: Any) -> Model:
    return Model("transformers", name, sizes, blocks, **more)


def of_timm(name: str, sizes: dict[str, Any], *blocks: str, size: int = 28, **more: Any) -> Model:
    return Model("timm", name, sizes, blocks, inputs=lambda: images("x", size), **more)


def causal(name: str, **more: Any) -> Model:
    """A language model whose blocks are named as those of Llama."""
    return of_transformers(name, {**TOKENS, **WIDTHS, **HEADS}, "model.layers.*.mlp", **more)


MODELS = [
    of_transformers(
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32, **TOKENS},
        "transformer.h.*.mlp", compiled=True,
    ),
    *(
        of_transformers(
            f"{name}ForMaskedLM", {**TOKENS, **WIDTHS},
            linears=tuple(f"{prefix}.encoder.layer.?.{part}.dense" for part in ("intermediate", "output")),
        )
        for name, prefix in (("Bert", "bert"), ("Roberta", "roberta"))
    ),
    of_transformers(
        "DistilBertForMaskedLM",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, **TOKENS},
        "distilbert.transformer.layer.*.ffn",
    ),
    of_transformers(
        "ViTForImageClassification", PICTURES, "vit.layers.*.mlp", inputs=lambda: images("pixel_values", 16)
    ),
    of_transformers(
        "DeiTForImageClassification", PICTURES, "deit.layers.*.mlp", inputs=lambda: images("pixel_values", 16)
    ),
    of_transformers(
        "CLIPVisionModel", PICTURES, "*.mlp", inputs=lambda: images("pixel_values", 16)
    ),
    of_transformers(
        "Dinov2Model", PICTURES, "*.mlp", inputs=lambda: images("pixel_values", 16)
    ),
    of_transformers(
        "Dinov2Model", {**PICTURES, "use_swiglu_ffn": True, "mlp_ratio": 2}, "*.mlp",
        inputs=lambda: images("pixel_values", 16), options={"activation": "silu"}, note="SwiGLU",
    ),
    of_transformers(
        "T5ForConditionalGeneration", T5, "*.DenseReluDense",
        inputs=lambda: tokens("input_ids", "decoder_input_ids"),
    ),
    of_transformers(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, "*.DenseReluDense",
        inputs=lambda: tokens("input_ids", "decoder_input_ids"), compiled=True, note="gated",
    ),
    causal("LlamaForCausalLM", compiled=True),
    causal("MistralForCausalLM"),
    causal("Qwen2ForCausalLM"),
    causal("Qwen3ForCausalLM"),
    causal("GemmaForCausalLM"),
    causal("Gemma2ForCausalLM"),
    causal("SmolLM3ForCausalLM"),
    causal("Olmo2ForCausalLM"),
    causal("PhiForCausalLM"),
    causal("Phi3ForCausalLM"),
    of_transformers("GPTNeoXForCausalLM", {**TOKENS, **WIDTHS}, "gpt_neox.layers.*.mlp"),
    of_transformers(
        "OPTForCausalLM", OPT, linears=("model.decoder.layers.*.fc?",),
        refused={"model.decoder.layers.?": INLINED},
    ),
    of_transformers(
        "WhisperForConditionalGeneration", WHISPER, linears=("model.*.layers.*.fc?",), inputs=speech,
        refused={"model.encoder.layers.?": INLINED},
    ),
    of_timm("vit_tiny_patch16_224", VIT, "blocks.*.mlp"),
    of_timm("deit3_small_patch16_224", VIT, "blocks.*.mlp"),
    of_timm(
        "MlpMixer", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2}, "blocks.*.mlp_*",
        size=32,
    ),
    of_timm(
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)},
        "layers.*.mlp", size=32, compiled=True,
    ),
    of_timm("eva02_tiny_patch14_224", {**VIT, "patch_size": 14}, "blocks.*.mlp"),
    of_timm("eva02_base_patch14_224", VIT, refused={"blocks.*.mlp": "LayerNorm"}),
    of_timm("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "stages.*.mlp", size=64),
    of_timm(
        "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, refused={"stages.*.mlp": "Conv2d"},
        size=64,
    ),
    of_timm("vit_small_patch14_dinov2", VIT, "blocks.*.mlp"),
    of_timm("vit_giant_patch14_dinov2", {**VIT, "embed_dim": 12}, "blocks.*.mlp"),
    Model(
        "torch", "TransformerEncoder",
        {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "batch_first": True}, inputs=vectors,
        refused={"layers.?": "must use one input", "layers.*.linear?": "reads the weight"},
    ),
]  # fmt: skip


# ---- what is done with a model ---------------------------------------------------------------------------


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    y = model(**inputs)
    if not isinstance(y, Tensor):
        y = y.logits if "logits" in y else y.last_hidden_state
    return y


def replace(model: Model, network: Any, **more: Any) -> list[Any]:
    """Replace what the patterns of a model name."""
    from mumoe_tensor.nn import replace_linear, replace_mlp

    options = {**OPTIONS, **model.options, **more}
    done = [each for pattern in model.blocks for each in replace_mlp(network, pattern, **options)]
    return done + [each for pattern in model.linears for each in replace_linear(network, pattern, **options)]


def refusal(network: Any, pattern: str) -> str:
    """The error of the replacement of blocks, or of linear layers where the pattern names those."""
    from mumoe_tensor.nn import replace_linear, replace_mlp

    function = replace_linear if "linear" in pattern else replace_mlp
    try:
        function(network, pattern, **OPTIONS)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{pattern} is not refused")


def difference(y: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected outputs."""
    return float(torch.linalg.vector_norm(y - expected) / torch.linalg.vector_norm(expected))


def train(network: Any, inputs: dict[str, Tensor], names: list[str]) -> None:
    """Five steps, after which the loss is lower and every parameter of the new layers is another."""
    parameters = dict(network.named_parameters())
    before = {key: p.detach().clone() for key, p in parameters.items() if key.startswith(tuple(names))}
    target = torch.randn_like(outputs_of(network.eval(), inputs))

    def loss() -> Tensor:
        return nn.functional.mse_loss(outputs_of(network, inputs), target)

    with torch.no_grad():
        start = float(loss())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        assert float(loss()) < start, "the loss does not fall"
    same = [key for key, value in before.items() if torch.equal(parameters[key], value)]
    assert before and not same, f"{same} are not trained"


def checkpoint(network: Any, inputs: dict[str, Tensor], layer: str) -> None:
    """Gradient checkpointing computes the layers again, and the same gradients."""
    network = copy.deepcopy(network).train()
    calls: list[int] = []
    network.get_submodule(layer).gate.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for enabled in (False, True):
        if enabled and hasattr(network, "set_grad_checkpointing"):
            network.set_grad_checkpointing()
        elif hasattr(network, "activation_checkpointing_enable") and enabled:
            network.activation_checkpointing_enable()
        elif enabled:  # before transformers 5.24
            network.gradient_checkpointing_enable()
        network.zero_grad()
        torch.manual_seed(0)
        outputs_of(network, inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert len(calls) == 3, "the layers are not computed again"
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def generated(network: Any, inputs: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return network.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def compile_(network: Any, inputs: dict[str, Tensor], backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    with torch.no_grad():
        assert difference(outputs_of(compiled, inputs), outputs_of(network, inputs)) < 1e-5


def save_to(model: Model, network: Any, folder: Path) -> None:
    """Save a model as its library's users do, and its outputs beside it."""
    from mumoe_tensor.nn import save

    if model.library == "transformers":
        network.save_pretrained(folder)
    else:
        save(network, folder)
    with torch.no_grad():
        torch.save(outputs_of(network, model.inputs()), folder / "outputs.pt")


def load_from(model: Model, folder: Path) -> None:
    """Load a model that `save_to` saved; its outputs are the same."""
    import mumoe_tensor.nn.pretrained  # noqa: F401
    from mumoe_tensor.nn import load

    if model.library == "transformers":
        import transformers

        network = getattr(transformers, model.name).from_pretrained(folder)
    else:
        network = load(folder, model=model.make())
    with torch.no_grad():
        y = outputs_of(network.eval(), model.inputs())
    assert difference(y, torch.load(folder / "outputs.pt")) < 1e-6, "other outputs after loading"


def examine(model: Model, folder: Path, everything: bool = False) -> dict[str, str]:
    """Replace the layers of a model, and train, save and compile it; the entries of its row in the table."""
    network = model.make().eval()
    reasons = [refusal(network, pattern) for pattern in model.refused]
    row = {"refused": "\n".join(reasons)}
    for reason, words in zip(reasons, model.refused.values(), strict=True):
        assert words in reason, reason
    if not model.is_replaced:
        return row
    inputs = model.inputs()
    with torch.no_grad():
        expected = outputs_of(network, inputs)
    if generates := everything and hasattr(network, "generate") and network.can_generate():
        sentences = generated(network, inputs)
    done = replace(model, network)
    names = [name for each in done for name in each.names]
    with torch.no_grad():
        error = difference(outputs_of(network, inputs), expected)
    assert error < 1e-4, f"outputs differ by {error:.1e}"
    row |= {"replaced": f"{len(done)}", "difference": f"{error:.0e}"}
    if generates:
        assert torch.equal(generated(network, inputs), sentences), "another sentence is generated"
    row["generate"] = "yes" if generates else "–"
    train(network, inputs, names)
    row["training"] = "yes"
    if everything:
        checkpoint(network, inputs, names[0])
        row["checkpointing"] = "yes"
    if everything or model.compiled:
        compile_(network, inputs, "inductor" if everything else "eager")
        row["compile"] = "yes"
    save_to(model, network, folder)
    row["saving"] = "yes"
    return row


def folder_of(model: Model, folder: Path) -> Path:
    return folder / "".join(x if x.isalnum() else "-" for x in model.key)


def examine_all(folder: Path, everything: bool = False) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The rows of all models by their keys, and the errors of those that fail."""
    rows, errors = {}, []
    for model in MODELS:
        try:
            rows[model.key] = examine(model, folder_of(model, folder), everything)
        except Exception as error:
            errors.append(f"{model.key}: {type(error).__name__}: {error}")
        if everything:
            print(model.key, rows.get(model.key) or errors[-1], flush=True)
    return rows, errors


def load_all(folder: Path) -> list[str]:
    """The errors of the models that cannot be loaded from where `examine_all` saved them."""
    errors = []
    for model in MODELS:
        if model.is_replaced:
            try:
                load_from(model, folder_of(model, folder))
            except Exception as error:
                errors.append(f"{model.key}: {type(error).__name__}: {error}")
    return errors


# ---- the page of the docs --------------------------------------------------------------------------------

INTRODUCTION = f"""# Models from other libraries

`replace_mlp` and `replace_linear` put layers of experts into models from transformers, timm and torch; see
[put layers into a model](../how-to/put-layers-into-a-model.md). The models in this table are small and
randomly initialised. Each replaced layer has {OPTIONS["experts"]} experts, with a rank high enough to keep
the outputs equal. *Difference* is the relative difference of the model's outputs in float32. Every model also
generates the same tokens as before (if it generates any), trains for five steps with and without gradient
checkpointing, compiles with `torch.compile`, and loads in a new process after it is saved, with
`save_pretrained` for transformers and with `mumoe_tensor.nn.save` for the others. `make zoo` checks this and
writes the table.
"""


def calls_of(model: Model) -> str:
    """The function that replaces its layers, and the patterns, for two cells of the table."""
    function, patterns = ("replace_mlp", model.blocks) if model.blocks else ("replace_linear", model.linears)
    more = [f"`{name}={value!r}`" for name, value in model.options.items()]
    return f"`{function}` | {'<br>'.join([*(f'`{pattern}`' for pattern in patterns), *more])}"


def title(model: Model) -> str:
    return f"{model.library} {model.name}{f' ({model.note})' if model.note else ''}"


COLUMNS = {"replaced": "Layers", "difference": "Difference", "generate": "Generates"}


def page(rows: dict[str, dict[str, str]]) -> str:
    """The page of the docs."""
    lines = [
        INTRODUCTION,
        f"| Model | Function | Patterns | {' | '.join(COLUMNS.values())} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for model in MODELS:
        if model.is_replaced:
            cells = [rows[model.key][column] for column in COLUMNS]
            lines.append(f"| {title(model)} | {calls_of(model)} | {' | '.join(cells)} |")
    lines += ["", "## Layers that raise an error", "", "These layers cannot be replaced:", ""]
    for model in MODELS:
        for pattern, reason in zip(
            model.refused, rows[model.key].get("refused", "").splitlines(), strict=True
        ):
            lines.append(f"- {title(model)}, `{pattern}`: {reason}")
    return "\n".join(lines) + "\n"


def main() -> None:
    library = define_operators()  # noqa: F841  (as long as it lives)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if sys.argv[1:2] == ["load"]:
        errors = load_all(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows, errors = examine_all(Path(folder), everything=True)
            command = [sys.executable, __file__, "load", folder]
            loaded = subprocess.run(command, capture_output=True, text=True)
            if loaded.returncode:
                errors.append(loaded.stderr)
        if not errors:
            PAGE.write_text(page(rows), encoding="utf-8")
    sys.exit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
