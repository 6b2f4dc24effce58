"""MLP-Mixer and GPT-2: sizes, what they compute, generation, files, and the same by surgery."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call, grad, vmap  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from mumoe_tensor.models import (  # noqa: E402
    GPT2,
    GPT2Config,
    Mixer,
    MixerConfig,
    load_model,
    save_model,
)
from mumoe_tensor.models.blocks import StochasticDepth, drop_probabilities  # noqa: E402
from mumoe_tensor.nn import ExpertGate, replace_mlp  # noqa: E402
from mumoe_tensor.nn.weights import read_tensors, write_tensors  # noqa: E402

S16 = MixerConfig(
    image_size=224, channels=3, patch=16, width=512, depth=8, token_hidden=256, channel_hidden=2048,
    classes=1000,
)  # fmt: skip
SMALL_MIXER = MixerConfig(
    image_size=6, channels=3, patch=2, width=8, depth=2, token_hidden=5, channel_hidden=12, classes=4
)
SMALL_GPT2 = GPT2Config(vocabulary=19, context=6, width=8, depth=2, heads=2, hidden=16)
MIXER_RANKS = [
    {},
    dict(format="cp", experts=(4,), token_rank=(3,), channel_rank=(5,)),
    dict(format="tr", experts=(3, 2), token_rank=(2, 3, 2, 3), channel_rank=(2, 2, 2, 4)),
]
GPT2_RANKS = [
    {},
    dict(format="cp", experts=(4,), rank=(6,)),
    dict(format="tr", experts=(3, 2), rank=(2, 3, 2, 3)),
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def named(options: dict[str, Any]) -> str:
    return options.get("format", "dense")


def drawn(model: Any) -> Any:
    """A model in float64 that is none of the starting points where much is zero or one."""
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def tokens_of(rows: int = 3, count: int = 6) -> Tensor:
    return torch.randint(19, (rows, count), generator=torch.Generator().manual_seed(0))


# ---- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 18_528_264),
        (dict(format="cp", token_rank=(147,), channel_rank=(384,)), 18_630_616),
        (dict(format="tr", token_rank=(4, 4, 37), channel_rank=(4, 4, 97)), 18_290_792),
    ],
    ids=["dense", "cp", "tr"],
)
def test_mixer_s16_has_the_published_parameters(options: dict[str, Any], parameters: int) -> None:
    assert count(Mixer(replace(S16, **options), "meta")) == parameters


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 124_373_760),
        (dict(format="cp", experts=(64,), rank=(599,)), 124_487_976),
        (dict(format="cp", experts=(256,), rank=(556,)), 124_789_536),
        (dict(format="tr", experts=(64,), rank=(4, 4, 153)), 124_790_880),
        (dict(format="tr", experts=(256,), rank=(4, 4, 149)), 125_159_136),
    ],
    ids=["dense", "cp-64", "cp-256", "tr-64", "tr-256"],
)
def test_gpt2_has_the_published_parameters(options: dict[str, Any], parameters: int) -> None:
    assert count(GPT2(GPT2Config(**options), "meta")) == parameters


@pytest.mark.parametrize("experts", [(64,), (8, 8)])
@pytest.mark.parametrize("format", ["cp", "tr", "tt"])
def test_open_ranks_come_nearest_to_the_dense_blocks(format: str, experts: tuple[int, ...]) -> None:
    mixer, gpt2 = replace(S16, depth=1), GPT2Config(depth=1)
    for kind, config, name, rank_name in (
        (Mixer, mixer, "token_", "token_rank"),
        (Mixer, mixer, "channel_", "channel_rank"),
        (GPT2, gpt2, "", "rank"),
    ):

        def block_of(name: str = name, kind: Any = kind, config: Any = config, **options: Any) -> int:
            block = kind(replace(config, **options), "meta").blocks[0]
            return count(block.get_submodule(f"{name}mlp")) + count(
                block.get_submodule(f"{name or 'mlp_'}norm")
            )

        dense, own = block_of(), dict(format=format, experts=experts)
        assert block_of(**own) == pytest.approx(dense, rel=0.06 if name == "token_" else 0.01)
        rank = getattr(kind(replace(config, **own), "meta").config, rank_name)
        assert block_of(**own, **{rank_name: rank}) == block_of(**own)
        least = abs(dense - block_of(**own))
        for step in (-1, 1):
            other = {rank_name: (*rank[:-1], rank[-1] + step)}
            assert abs(dense - block_of(**own, **other)) >= least


# ---- what they compute ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MIXER_RANKS, ids=named)
@pytest.mark.parametrize("training", [True, False])
def test_mixer_is_its_equations(options: dict[str, Any], training: bool) -> None:
    model = drawn(Mixer(replace(SMALL_MIXER, gate="softmax", gate_norm="layer", **options)))
    images = torch.rand(3, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model.train(training)(images), reference.mixer(model, images))


@pytest.mark.parametrize("options", GPT2_RANKS, ids=named)
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_gpt2_is_its_equations(options: dict[str, Any], norm: Any) -> None:
    model = drawn(GPT2(replace(SMALL_GPT2, gate="softmax", gate_norm=norm, **options)))
    torch.testing.assert_close(model(tokens_of()), reference.gpt2(model, tokens_of()))


@pytest.mark.parametrize("options", GPT2_RANKS, ids=named)
def test_logits_depend_on_no_later_token(options: dict[str, Any]) -> None:
    model = drawn(GPT2(replace(SMALL_GPT2, **options)))
    tokens = tokens_of()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 19
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert (before[:, 3:] - after[:, 3:]).abs().amax((0, 2)).min() > 1e-3


def test_grey_images_may_come_without_their_channel() -> None:
    model = Mixer(replace(SMALL_MIXER, channels=1))
    images = torch.rand(2, 1, 6, 6)
    assert torch.equal(model(images), model(images[:, 0]))


def test_gpt2_starts_as_published() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocabulary=500, context=64, width=128, depth=8, heads=2, hidden=512))
    block: Any = model.blocks[-1]
    usual = [model.token_embedding, model.position_embedding, block.attention.inputs, block.mlp.up]
    for modules, std in ((usual, 0.02), ([block.attention.output, block.mlp.down], 0.005)):
        for module in modules:
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.05)
    logits = model(torch.randint(500, (2, 64)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(500, (128,)))
    assert float(loss.detach()) == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)


@pytest.mark.parametrize("format", ["mlp", "cp"])
def test_everything_learns(format: str) -> None:
    """All parameters get a gradient, but the gate of a level whose experts are equal yet."""
    images, tokens = torch.rand(4, 3, 6, 6), tokens_of()
    for model, x in (
        (Mixer(replace(SMALL_MIXER, format=format, experts=(4,))), images),
        (GPT2(replace(SMALL_GPT2, format=format, experts=(4,))), tokens),
    ):
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_both_compile_whole() -> None:
    common: Any = dict(depth=1, stochastic_depth=0.5)
    for model, x in (
        (Mixer(replace(SMALL_MIXER, **common, **MIXER_RANKS[1])), torch.rand(4, 3, 6, 6)),
        (GPT2(replace(SMALL_GPT2, **common, dropout=0.1, **GPT2_RANKS[1])), tokens_of()),
    ):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(x).sum().backward()
        torch.testing.assert_close(model.eval()(x), compiled.eval()(x))


def test_gradients_of_single_rows() -> None:
    model = GPT2(replace(SMALL_GPT2, format="cp", experts=(4,)))
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        every = vmap(grad(loss), (None, 0))(parameters, tokens_of())
        one = grad(loss)(parameters, tokens_of()[1])
    for name, value in one.items():
        torch.testing.assert_close(every[name][1], value, rtol=1e-4, atol=1e-5)


# ---- stochastic depth -----------------------------------------------------------------------------------


def test_stochastic_depth_drops_rows_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    branch = torch.rand(10_000, 2, 3) + 1
    drop = StochasticDepth(0.3)
    ratio = (drop(branch) / branch).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    values, shares = ratio[:, 0].round(decimals=4).unique(return_counts=True)
    assert values.tolist() == pytest.approx([0, 1 / 0.7], abs=1e-4)
    assert shares[0] / len(branch) == pytest.approx(0.3, abs=0.02)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.03)
    assert drop.eval()(branch) is branch


def test_probabilities_of_dropping_rise_with_depth() -> None:
    assert drop_probabilities(0.1, 5) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert drop_probabilities(0.1, 1) == [0.1]
    model: Any = Mixer(replace(S16, stochastic_depth=0.14), "meta")
    assert [b.drop.probability for b in model.blocks] == pytest.approx([0.02 * k for k in range(8)])
    torch.manual_seed(0)
    options: Any = dict(depth=1, stochastic_depth=0.5)
    for model, x in (
        (Mixer(replace(SMALL_MIXER, **options)), torch.rand(1, 3, 6, 6).expand(50, 3, 6, 6)),
        (GPT2(replace(SMALL_GPT2, **options)), tokens_of(1).expand(50, 6)),
    ):
        # Of two branches neither, one, the other or both.
        assert len(model(x).detach().flatten(1).round(decimals=4).unique(dim=0)) == 4


# ---- generation -----------------------------------------------------------------------------------------


def test_generation_repeats_with_a_generator() -> None:
    model = drawn(GPT2(SMALL_GPT2))
    start = tokens_of(2, 3)
    same, again, other = (
        model.generate(start, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert same.shape == (2, 12) and torch.equal(same[:, :3], start)
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert model.training


def test_generation_draws_what_the_logits_say() -> None:
    model = drawn(GPT2(SMALL_GPT2)).eval()
    start = tokens_of(1, 8)
    logits = model(start[:, 2:])[0, -1].detach()  # of more than the context the last are seen
    greedy = model.generate(start, 3, temperature=0.0)
    assert greedy[0, 8] == logits.argmax()
    assert torch.equal(greedy, model.generate(start, 3, top_k=1))
    assert torch.equal(greedy, model.generate(start, 3, temperature=1e-30))
    generator = torch.Generator().manual_seed(0)
    options = dict(temperature=2.0, top_k=5, generator=generator)
    drawn_tokens = model.generate(start.expand(20_000, 8), 1, **options)[:, -1]
    best = logits.topk(5)
    shares = torch.bincount(drawn_tokens, minlength=19) / 20_000
    expected = torch.zeros(19, dtype=torch.float64).index_put((best.indices,), (best.values / 2).softmax(0))
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.015)


def input_of(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """What a gate is given for tokens."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("options", GPT2_RANKS[1:], ids=named)
def test_coefficients_of_a_text(options: dict[str, Any]) -> None:
    model = drawn(GPT2(replace(SMALL_GPT2, **options)))
    start, generator = tokens_of(2, 3), torch.Generator().manual_seed(0)
    text, actual = model.generate(start, 7, generator=generator, return_coefficients=True)
    assert list(actual) == [f"blocks.{k}.mlp.gate" for k in range(2)] and text.shape == (2, 10)
    gates = {name: module for name, module in model.named_modules() if isinstance(module, ExpertGate)}
    assert not any(gate._forward_hooks for gate in gates.values())
    model.eval()
    for end in range(1, 11):
        window = text[:, max(0, end - 6) : end]
        for name, levels in actual.items():
            assert [a.shape for a in levels] == [(2, 10, n) for n in model.config.experts]
            for level, expected in zip(levels, gates[name](input_of(model, name, window)), strict=True):
                torch.testing.assert_close(level[:, end - 1], expected[:, -1].detach())


# ---- files ----------------------------------------------------------------------------------------------

MODELS = [(Mixer, replace(SMALL_MIXER, **options)) for options in MIXER_RANKS] + [
    (GPT2, replace(SMALL_GPT2, **options)) for options in GPT2_RANKS
]


@pytest.mark.parametrize(("kind", "config"), MODELS, ids=lambda x: getattr(x, "format", None))
def test_a_saved_model_comes_back(kind: Any, config: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = kind(config)
    x = torch.rand(4, 3, 6, 6) if kind is Mixer else tokens_of()
    model(x)  # moves the statistics of batch norm
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is kind and loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(x), model.eval()(x))
    loaded.train()(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_a_solved_rank_and_bfloat16_come_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = GPT2Config(vocabulary=50, context=8, width=32, depth=1, heads=2, hidden=128, format="cp")
    model = GPT2(replace(config, experts=(8,))).bfloat16()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config.rank == model.config.rank and model.config.rank
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def rewritten(path: Path, **metadata: str) -> Path:
    """The file with other metadata."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = metadata
    made = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + data[8 + size :])
    return path


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    save_model(Mixer(SMALL_MIXER), path)
    whole = path.read_bytes()
    config = json.loads(
        json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])["__metadata__"]["config"]
    )
    for damaged in (b"", whole[:100], whole[:-4], b"\x80\x04" + whole[2:], whole + b"rest"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="it must be a complete safetensors file"):
            load_model(path)
    for metadata, message in (
        ({}, "kind"),
        (dict(kind="head", config="{}"), "head"),
        (dict(kind="mixer"), "config"),
        (dict(kind="mixer", config="{"), "must be JSON"),
        (dict(kind="mixer", config="[]"), "a JSON object"),
        (dict(kind="mixer", config=json.dumps({**config, "more": 1})), "more"),
        (dict(kind="mixer", config=json.dumps({**config, "patch": 4})), "patches must tile"),
        (dict(kind="mixer", config=json.dumps({**config, "patch": 3})), "size mismatch"),
        (dict(kind="mixer", config=json.dumps({**config, "depth": 3})), "Missing key"),
        (dict(kind="gpt2", config="{}"), "Missing key"),
    ):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            load_model(rewritten(path, **metadata))
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="must be a Mixer or a GPT2, got Linear"):
        save_model(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    assert path.exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(4), "b": torch.ones(1)}, "b is in only one of them"),
        ({"a": torch.ones(2, 2)}, "a must match its checksum"),
        ({"a": torch.ones(4).view(torch.int32)}, "a must match its checksum"),
    ],
    ids=["one too many", "another shape", "another type"],
)
def test_tensors_that_are_not_those_of_the_checksums(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(4)}, {"kind": "test"})
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=0), "depth must be positive"),
        (dict(width=8.0), "width must be an integer"),
        (dict(stochastic_depth=1.0), "stochastic_depth must be at least 0 and less than 1, got 1.0"),
        (dict(gate="relu"), "gate must be one of"),
        (dict(gate_norm="group"), "gate_norm must be one of"),
        (dict(init="zero"), "init must be one of"),
        (dict(format="cpp"), "unknown format 'cpp'"),
        (dict(experts=4), "experts must be a tuple"),
        (dict(experts=(4, 0)), "every number of experts must be positive"),
    ],
)
def test_wrong_configs_are_told(options: dict[str, Any], message: str) -> None:
    for config in (SMALL_MIXER, SMALL_GPT2):
        with pytest.raises((ValueError, TypeError), match=message):
            replace(config, **options)


def test_what_does_not_fit_together_is_told() -> None:
    with pytest.raises(ValueError, match="image_size=6 is not a multiple of patch=4"):
        replace(SMALL_MIXER, patch=4)
    with pytest.raises(ValueError, match="width=8 is not a multiple of heads=3"):
        replace(SMALL_GPT2, heads=3)
    with pytest.raises(ValueError, match="dropout must be at least 0 and less than 1"):
        replace(SMALL_GPT2, dropout=-0.1)
    with pytest.raises(ValueError, match=r"has no rank, got {'rank': \(3,\)}"):
        replace(SMALL_GPT2, rank=(3,))
    with pytest.raises(ValueError, match="one entry per bond"):
        replace(SMALL_MIXER, format="tr", token_rank=(3,))
    with pytest.raises(ValueError, match=r"format 'hadamard' has none: pass the rank \(\)"):
        GPT2(replace(SMALL_GPT2, format="hadamard"))
    assert GPT2(replace(SMALL_GPT2, format="hadamard", rank=())).config.rank == ()
    with pytest.raises(ValueError, match="the smallest rank must fit the budget"):
        Mixer(replace(SMALL_MIXER, format="cp", experts=(500,)))


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 3, 6, 8), (3, 6, 6), (18,), (1, 3, 6, 6)], ids=str)
def test_wrong_images_are_told(shape: tuple[int, ...]) -> None:
    images = torch.ones(shape, dtype=torch.uint8 if shape == (1, 3, 6, 6) else None)
    with pytest.raises(ValueError, match=r"images must be floats of shape \(rows, 3, 6, 6\), got torch\."):
        Mixer(SMALL_MIXER)(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 7, dtype=torch.long), "at most context = 6 tokens, got 7"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one row and token"),
        (torch.zeros(4, dtype=torch.long), "of shape \\(4,\\)"),
        (torch.zeros(1, 4), "must be integers .* got torch.float32"),
        (torch.tensor([[3, 19]]), "from 0 to 18, got values from 3 to 19"),
        (torch.tensor([[-1, 3]]), "from 0 to 18, got values from -1 to 3"),
    ],
)
def test_wrong_tokens_are_told(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2(SMALL_GPT2)(tokens)


def test_wrong_choices_of_generation_are_told() -> None:
    model = GPT2(SMALL_GPT2)
    for options, message in (
        (dict(steps=0), "steps must be positive"),
        (dict(steps=1, top_k=0), "top_k must be from 1 to the vocabulary of 19, got 0"),
        (dict(steps=1, top_k=20), "top_k must be from 1"),
        (dict(steps=1, temperature=-1.0), "temperature must be finite and at least 0, got -1.0"),
        (dict(steps=1, temperature=float("nan")), "got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens_of(), **options)
    with pytest.raises(ValueError, match="from 0 to 18"):
        model.generate(torch.tensor([[50]]), 2)
    with pytest.raises(ValueError, match="must have an ExpertGate"):
        model.coefficients(tokens_of())


# ---- the same by surgery --------------------------------------------------------------------------------


@pytest.fixture
def timm(torchvision_schemas: None) -> Any:
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    ("format", "ranks", "parameters"),
    [("cp", (147, 384), 18_630_616), ("tr", ((4, 4, 37), (4, 4, 97)), 18_290_792)],
)
def test_timms_mixer_with_our_blocks_has_our_parameters(
    timm: Any, format: str, ranks: Any, parameters: int
) -> None:
    with torch.device("meta"):
        model = timm.create_model("mixer_s16_224", pretrained=False)
    assert count(model) == 18_528_264
    for pattern, rank in zip(("blocks.*.mlp_tokens", "blocks.*.mlp_channels"), ranks, strict=True):
        done = replace_mlp(
            model, pattern, experts=64, format=format, rank=rank, activation="gelu", device="meta"
        )
        assert len(done) == 8
    assert count(model) == parameters


def test_timms_mixer_computes_the_same(timm: Any) -> None:
    torch.manual_seed(0)
    config = MixerConfig(
        image_size=32, channels=3, patch=16, width=16, depth=2, token_hidden=8, channel_hidden=64, classes=5
    )
    ours = Mixer(config).eval()
    theirs = timm.models.mlp_mixer.MlpMixer(
        num_classes=5, img_size=32, patch_size=16, num_blocks=2, embed_dim=16
    ).eval()
    names = {
        "patches": "stem.proj", "token_norm": "norm1", "channel_norm": "norm2", "token_mlp": "mlp_tokens",
        "channel_mlp": "mlp_channels", "up": "fc1", "down": "fc2",
    }  # fmt: skip
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("format", "rank"), [("cp", 7), ("tr", (2, 3, 4))])
def test_a_gpt2_of_transformers_with_our_blocks(transformers: Any, format: str, rank: Any) -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=12)
    model = transformers.GPT2LMHeadModel(config)
    # Biases in all linear layers and norms, which the head has none of.
    attention, dense, norm = 16 * 48 + 48 + 16 * 16 + 16, 16 * 64 + 64 + 64 * 16 + 16, 2 * 16
    rest = (50 + 12) * 16 + norm + 2 * (attention + 2 * norm)
    assert count(model) == rest + 2 * dense
    replace_mlp(model, "transformer.h.*.mlp", experts=5, format=format, rank=rank, gate_norm="layer")
    first, second = (5, 17, 64), (5, 65, 16)
    if format == "cp":
        layers = sum(7 * sum(sizes) for sizes in (first, second))
    else:
        layers = sum(2 * 3 * n + 3 * 4 * i + 4 * 2 * o for n, i, o in (first, second))
    assert count(model) == rest + 2 * (16 * 5 + layers)
    tokens = torch.randint(50, (2, 12))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gates = [module for module in model.modules() if isinstance(module, ExpertGate)]
    assert len(gates) == 2 and torch.isfinite(loss.detach())


def test_transformers_gpt2_computes_the_same(transformers: Any) -> None:
    """With all its biases zero it is ours."""
    torch.manual_seed(0)
    ours: Any = GPT2(SMALL_GPT2).eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2,
            n_embd=8,
            n_head=2,
            vocab_size=19,
            n_positions=6,
            n_inner=16,
            activation_function="gelu",
        )
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.3)
        body = theirs.transformer
        body.wte.weight.copy_(ours.token_embedding.weight)
        body.wpe.weight.copy_(ours.position_embedding.weight)
        body.ln_f.weight.copy_(ours.norm.weight)
        for block, own in zip(body.h, ours.blocks, strict=True):
            for one, other in (
                (block.attn.c_attn, own.attention.inputs),
                (block.attn.c_proj, own.attention.output),
                (block.mlp.c_fc, own.mlp.up),
                (block.mlp.c_proj, own.mlp.down),
            ):
                one.weight.copy_(other.weight.T)
            block.ln_1.weight.copy_(own.attention_norm.weight)
            block.ln_2.weight.copy_(own.mlp_norm.weight)
    torch.testing.assert_close(ours(tokens_of()), theirs(tokens_of()).logits, rtol=1e-4, atol=1e-4)
