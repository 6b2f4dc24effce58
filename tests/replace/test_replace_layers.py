"""Layers in the place of others equal plain formulas, start at their bias, and are made like a block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.nn.functional import gelu  # noqa: E402

from mumoe_tensor.analysis import ablate, keep_only, watch_coefficients  # noqa: E402
from mumoe_tensor.formats import Factor, Format  # noqa: E402
from mumoe_tensor.nn import load, prepare_to_save, save  # noqa: E402
from mumoe_tensor.nn.described import describe, rebuild  # noqa: E402
from mumoe_tensor.nn.linear import matrix_of  # noqa: E402
from mumoe_tensor.nn.watch import hooked  # noqa: E402
from mumoe_tensor.replace import MixtureOfDecoders, MixtureOfTransforms, Transcoder  # noqa: E402
from mumoe_tensor.testing import dense_weight, leading_shapes, specs  # noqa: E402
from mumoe_tensor.testing.oracle import sum_of_terms  # noqa: E402

FLOAT64 = torch.float64


class Outward(Format):
    """A format of a user: CP with the factor of the output first."""

    name = title = "outward"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(f"{mode} r") for mode in reversed(modes)]


def through_json(entry: Any) -> Any:
    return json.loads(json.dumps(entry, allow_nan=False))


def decoders(spec: mt.LayerSpec, in_features: int = 3, **options: Any) -> Any:
    """The mixture of decoders whose experts have a spec, in float64."""
    if spec.experts and not options.keys() & {"k", "gate"}:
        options["k"] = min(spec.experts)
    return MixtureOfDecoders(
        in_features, spec.in_features, spec.out_features, spec.experts, format=spec.format, rank=spec.rank,
        dtype=FLOAT64, **options,
    )  # fmt: skip


def drawn(layer: Any) -> Any:
    """The layer with all parameters drawn from a normal distribution."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def with_gradients(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Outputs of a function of the parameters of a layer, and gradients of these and of the input."""
    x = x.detach().requires_grad_()
    y = function(x)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent, materialize_grads=True)]


def assert_equals(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    pairs = zip(with_gradients(layer, layer, x), with_gradients(layer, function, x), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def coefficients(layer: Any, x: Tensor, k: int) -> list[Tensor]:
    """ReLU of the k largest logits of each level."""
    levels = []
    for logits in (x @ layer.gate.weight.T + layer.gate.bias).split(layer.num_experts, -1):
        last = logits.sort(-1, descending=True).values[..., k - 1 : k]
        levels.append(torch.where(logits >= last, logits, 0).relu())
    return levels


def weight(experts: Any) -> Tensor:
    """The dense weight, of shape (N1, ..., NE, I, O)."""
    shapes = experts.weight.format.shapes(experts.weight.shape, experts.weight.rank)
    pairs = zip(experts.weight.factors, shapes, strict=True)
    factors = [torch.ones(shape, dtype=FLOAT64) if factor is None else factor for factor, shape in pairs]
    return sum_of_terms(experts.weight, factors, torch.einsum, torch.from_numpy)


def mixed(dense: Tensor, levels: list[Tensor], z: Tensor) -> Tensor:
    matrices = dense.expand(*z.shape[:-1], *dense.shape)
    for a in levels:
        matrices = (matrices * a.reshape(*a.shape, *[1] * (matrices.ndim - a.ndim))).sum(a.ndim - 1)
    return (z[..., None] * matrices).sum(-2)


# ---- plain formulas -------------------------------------------------------------------------------------


@given(specs(bias=False), st.booleans(), st.booleans(), leading_shapes(), st.data())
def test_a_mixture_of_decoders_is_its_formula_with_all_gradients(spec, gated, bias, leading, data) -> None:
    k = data.draw(st.integers(1, min(spec.experts))) if spec.experts else None
    layer = drawn(decoders(spec, k=k, gated=gated, hidden_bias=bias))

    def formula(x: Tensor) -> Tensor:
        u, v = layer.up, layer.gate_proj
        hidden = x @ u.weight.T + (u.bias if bias else 0)
        z = gelu(x @ v.weight.T + (v.bias if bias else 0)) * hidden if gated else gelu(hidden)
        levels = coefficients(layer, x, k) if spec.experts else []
        return mixed(weight(layer.mixture.experts), levels, z) + layer.bias

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


@pytest.mark.parametrize("format", [Outward(), mt.sum_of(mt.shared("dense"), Outward())])
def test_a_format_of_a_user_serves(format) -> None:
    spec = mt.LayerSpec(format, experts=(5,), in_features=6, out_features=4, rank=2)
    layer = drawn(decoders(spec, k=2))
    z = gelu(layer.up(x := torch.randn(7, 3, dtype=FLOAT64)))
    expected = mixed(torch.from_numpy(dense_weight(layer.mixture.weight)), coefficients(layer, x, 2), z)
    torch.testing.assert_close(layer(x), expected + layer.bias)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.booleans(), leading_shapes())
def test_with_constant_coefficients_it_is_the_block_with_another_decoder(counts, gated, leading) -> None:
    spec = mt.LayerSpec("hadamard", experts=counts, in_features=6, out_features=4)
    layer = drawn(decoders(spec, gated=gated))
    levels = tuple(torch.randn(n, dtype=FLOAT64) for n in counts)
    *factors, decoder = layer.mixture.weight.factors
    scale = torch.ones(4, dtype=FLOAT64)
    for c, a in zip(factors, levels, strict=True):
        scale = scale * (c.T @ a)
    last = nn.Linear(6, 4, dtype=FLOAT64)
    last.weight, last.bias = nn.Parameter((decoder * scale).T), layer.bias
    x = torch.randn(*leading, 3, dtype=FLOAT64)
    hidden = layer.up(x)
    expected = last(gelu(layer.gate_proj(x)) * hidden if gated else gelu(hidden))
    with hooked(layer.gate, lambda *_: tuple(a.expand(*leading, -1) for a in levels)):
        torch.testing.assert_close(layer(x), expected)


@given(st.integers(1, 6), st.booleans(), st.booleans(), leading_shapes(), st.data())
def test_a_transcoder_is_its_formula_with_all_gradients(latents, skip, bias, leading, data) -> None:
    k = data.draw(st.integers(1, latents))
    layer = drawn(Transcoder(3, 4, latents, k, skip=skip, bias=bias, dtype=FLOAT64))

    def formula(x: Tensor) -> Tensor:
        (a,) = coefficients(layer, x, k)
        (d,) = layer.mixture.weight.factors
        y = a @ d[:, 0] + (layer.bias if bias else 0)
        return y + x @ layer.skip.weight.T if skip else y

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.booleans(), leading_shapes())
def test_a_mixture_of_transforms_is_its_formula_with_all_gradients(ranks, bias, leading) -> None:
    layer = drawn(MixtureOfTransforms(3, 4, ranks, bias=bias, dtype=FLOAT64))

    def formula(x: Tensor) -> Tensor:
        a = mt.jumprelu(x @ layer.gate.weight.T, layer.gate.log_threshold.exp(), bandwidth=0.001)
        maps = [
            (down, up) for term in layer.mixture.weight.terms for down, up in zip(*term.factors, strict=True)
        ]
        assert [down.shape[1] for down, _ in maps] == ranks
        parts = [a[..., n : n + 1] * (x @ down @ up) for n, (down, up) in enumerate(maps)]
        return sum(parts) + (layer.bias if bias else 0)

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


# ---- the start ------------------------------------------------------------------------------------------


@given(specs(bias=False))
def test_outputs_start_at_the_bias_and_the_output_factor_learns(spec) -> None:
    layer = decoders(spec)
    nn.init.normal_(layer.bias)
    y = layer(torch.randn(50, 3, dtype=FLOAT64))
    assert torch.equal(y, layer.bias.expand(50, -1))
    y.square().sum().backward()
    for term in layer.mixture.experts._terms:
        assert layer.mixture.experts.factors[term.factors][-1].grad.any()


def test_memory_without_values_is_filled(layer: Any) -> None:
    empty = type(layer).from_config(layer.config, device="meta").to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(torch.nan)
    empty.reset_parameters()
    x = torch.randn(5, 6)
    assert not empty(x).any() and all(parameter.isfinite().all() for parameter in empty.parameters())


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_all_of_a_layer_learns(factor: float) -> None:
    """After one step, which only the output factor and what is added take, every parameter has a gradient."""
    torch.manual_seed(0)
    layers = [
        decoders(
            mt.LayerSpec("tr", experts=(8,), in_features=6, out_features=4, rank=(2, 2, 3)), k=4, gated=True
        ),
        Transcoder(3, 4, 8, k=4, skip=True, dtype=FLOAT64),
        MixtureOfTransforms(3, 4, [2, 1, 1], gate={"name": "jumprelu", "bandwidth": 5.0}, dtype=FLOAT64),
    ]
    x, target = torch.randn(100, 3, dtype=FLOAT64), torch.randn(100, 4, dtype=FLOAT64)
    for layer in layers:
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01 * factor)
        for _ in range(2):
            layer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        assert all(parameter.grad.any() for parameter in layer.parameters()) == bool(factor)


# ---- the same layers, called, saved and placed as any other -----------------------------------------------


@pytest.fixture(params=["decoders", "without experts", "random", "centres", "transcoder", "transforms"])
def layer(request: pytest.FixtureRequest) -> Any:
    """A layer of each kind, from 6 features to 4."""
    torch.manual_seed(0)
    kinds = {
        "decoders": lambda: MixtureOfDecoders(6, 9, 4, (8, 3), 2, format="cp", rank=5, gated=True),
        "without experts": lambda: MixtureOfDecoders(6, 9, 4, (), hidden_bias=False),
        "random": lambda: MixtureOfDecoders(6, 9, 4, 8, gate={"name": "random", "k": 2}, bias=False),
        "centres": lambda: MixtureOfDecoders(6, 9, 4, 8, gate={"name": "nearest_centres", "k": 2}),
        "transcoder": lambda: Transcoder(6, 4, 20, k=3, skip=True),
        "transforms": lambda: MixtureOfTransforms(6, 4, [3, 2, 2, 1]),
    }
    return drawn(kinds[request.param]())


def outputs(layer: Any, x: Tensor, **options: Any) -> Any:
    """Those with the random numbers of one seed, which the random gate draws."""
    torch.manual_seed(1)
    return layer(x, **options)


def test_a_layer_comes_back(layer: Any) -> None:
    x = torch.randn(5, 3, 6)
    (entry,) = describe(nn.Sequential(layer)).values()
    assert through_json(entry) == entry
    again = rebuild(entry)
    again.load_state_dict(layer.state_dict())
    assert describe(again)[""] == entry and str(again) == str(layer)
    assert torch.equal(outputs(again, x), outputs(layer, x))
    assert next(rebuild(entry, device="meta").parameters()).is_meta
    with pytest.raises(ValueError, match="should have"):
        again.load_state_dict({name: value[:1] for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, torch.bfloat16])
def test_dtype_and_leading_shape_stay(layer: Any, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    for leading in ((), (3,), (2, 0, 3)):
        y, levels = outputs(layer, torch.randn(*leading, 6, dtype=dtype), return_coefficients=True)
        assert (y.shape, y.dtype) == ((*leading, 4), dtype)
        assert [a.shape for a in levels] == [(*leading, n) for n in layer.num_experts]
        assert {a.dtype for a in levels} <= {dtype}
    if dtype == torch.float32:
        x = torch.randn(5, 6)
        with torch.autocast("cpu", torch.bfloat16):
            y = outputs(layer, x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), outputs(layer, x), rtol=0.1, atol=0.5)


def test_everything_is_on_one_device(layer: Any) -> None:
    on_meta = type(layer).from_config(layer.config, device="meta")
    y = on_meta(torch.randn(5, 6, device="meta"))
    y.sum().backward()
    assert {y.device.type, *(x.grad.device.type for x in on_meta.parameters())} == {"meta"}
    # (Gates that select cannot be traced for a GPU on a build of torch without CUDA.)
    gate = {} if layer.gate is None else {"gate": "softmax"}
    with FakeTensorMode(), torch.no_grad():
        fake = type(layer).from_config({**layer.config, **gate})
        for module in fake.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        moved = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        held[name] = nn.Parameter(moved) if held is module._parameters else moved
        y, levels = fake(torch.empty(5, 6, device="cuda"), return_coefficients=True)
        assert {y.device.type, *(a.device.type for a in levels)} == {"cuda"}


def test_a_compiled_layer_gives_the_same(layer: Any) -> None:
    x = torch.randn(5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, x), outputs(layer, x))


def test_the_gate_is_that_of_the_analysis(layer: Any) -> None:
    x, seen = torch.randn(5, 6), []
    if layer.gate is None:
        assert layer.num_experts == ()
        return
    with watch_coefficients(layer, lambda _, levels: seen.append(levels)):
        y, levels = outputs(layer, x, return_coefficients=True)
    assert all(map(torch.equal, seen[0], levels))
    last = layer.num_experts[-1] - 1
    with ablate(layer, last, level=len(levels) - 1):
        _, without = outputs(layer, x, return_coefficients=True)
    assert torch.equal(without[-1][:, :-1], levels[-1][:, :-1]) and not without[-1][:, -1].any()
    with keep_only(layer, []):
        rest = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(outputs(layer, x), rest + (layer.skip(x) if layer.skip else 0 * y))


def test_some_experts_are_kept() -> None:
    layer = drawn(Transcoder(6, 4, 8, k=2, skip=True, dtype=FLOAT64)).eval()
    layer.bias.requires_grad_(False)
    kept = layer.keep_experts(0, [5, 1, 2])
    x = torch.randn(9, 6, dtype=FLOAT64)
    logits = (layer.gate.weight @ x.T).T + layer.gate.bias
    largest = logits[:, [5, 1, 2]].topk(2, -1)
    a = torch.zeros(9, 3, dtype=FLOAT64).scatter(-1, largest.indices, largest.values.relu())
    d = layer.mixture.weight.factors[0][[5, 1, 2], 0]
    torch.testing.assert_close(kept(x), a @ d + layer.skip(x) + layer.bias)
    assert kept.config == {**layer.config, "latents": 3} and not kept.training
    assert not kept.bias.requires_grad and kept.skip.weight.requires_grad
    assert not {x.data_ptr() for x in kept.parameters()} & {x.data_ptr() for x in layer.parameters()}
    with pytest.raises(ValueError, match="no term may slice"):
        MixtureOfTransforms(6, 4, [2, 1]).keep_experts(0, [1])


@pytest.fixture(params=["transcoder", "one output", "decoders", "cp"])
def many(request: pytest.FixtureRequest) -> Any:
    """A layer of many experts, few of them active."""
    torch.manual_seed(0)
    kinds = {
        "transcoder": lambda: Transcoder(6, 4, 2048, k=3, skip=True, dtype=FLOAT64),
        "one output": lambda: Transcoder(6, 1, 2048, k=3, dtype=FLOAT64),
        "decoders": lambda: MixtureOfDecoders(6, 9, 4, 2048, 3, gated=True, dtype=FLOAT64),
        "cp": lambda: MixtureOfDecoders(6, 9, 4, 2048, 3, format="cp", rank=5, dtype=FLOAT64),
    }
    return drawn(kinds[request.param]())


def test_only_the_active_experts_are_saved(many: Any) -> None:
    """No tensor of all rows and experts; not even the logits, whose derivative needs none."""
    saved: list[int] = []
    weights = {parameter.data_ptr() for parameter in many.parameters()}

    def pack(x: Tensor) -> Tensor:
        saved.append(0 if x.data_ptr() in weights else x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        many(torch.randn(100, 6, dtype=FLOAT64))
    assert 0 < max(saved) <= 100 * 9


def test_the_active_experts_give_what_all_give(many: Any) -> None:
    assert_equals(many, lambda x: many(x, return_coefficients=True)[0], torch.randn(20, 6, dtype=FLOAT64))


def test_in_a_model_of_transformers(llama: Any, transformers: Any, tmp_path: Path) -> None:
    tokens = torch.arange(14).reshape(2, 7)
    layers = {
        "model.layers.0.mlp": MixtureOfDecoders.like(llama.model.layers[0].mlp, experts=16, k=4),
        "model.layers.2.mlp": Transcoder.like(llama.model.layers[2].mlp, latents=20, k=4, skip=True),
    }
    for name, layer in layers.items():
        llama.set_submodule(name, drawn(layer))
    prepare_to_save(llama)
    llama.save_pretrained(tmp_path / "one")
    save(llama, tmp_path / "other")
    with torch.no_grad():
        expected = llama(tokens).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
        assert torch.equal(again(tokens).logits, expected)
        assert type(again.model.layers[2].mlp) is Transcoder
        fresh = transformers.LlamaForCausalLM(llama.config.__class__(**sizes_of(llama.config)))
        assert torch.equal(load(tmp_path / "other", model=fresh).eval()(tokens).logits, expected)


def sizes_of(config: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in names}


# ---- like a block ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_a_block() -> None:
    block = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    x = torch.randn(5, 3, 6, dtype=FLOAT64)
    layers = [
        MixtureOfDecoders.like(block, experts=8, k=2),
        Transcoder.like(block, latents=8, k=2),
        MixtureOfTransforms.like(block, ranks=[2, 1]),
        Transcoder.like(nn.Linear(6, 4, dtype=FLOAT64), latents=8, k=2, skip=True),
    ]
    for layer in layers:
        assert layer(x).shape == (5, 3, 4) and layer(x).dtype == FLOAT64
    assert layers[0].up.out_features == 10 and type(layers[0].activation) is nn.ReLU
    assert layers[0].activation is not block[1]


def test_hidden_units_are_those_of_the_block(transformers: Any, llama: Any) -> None:
    """With the weights of the block, the hidden units have its values."""
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(**sizes)).h[0].mlp
    config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12)
    vit = transformers.models.vit.modeling_vit.ViTMLP(config)
    swiglu = llama.model.layers[0].mlp
    blocks = {
        swiglu: (swiglu.up_proj, swiglu.gate_proj, swiglu.down_proj),
        gpt2: (gpt2.c_fc, None, gpt2.c_proj),
        vit: (vit.fc1, None, vit.fc2),
    }
    for block, (up, gate_proj, down) in blocks.items():
        layer = MixtureOfDecoders.like(block, experts=())
        for old, new in ((up, layer.up), (gate_proj, layer.gate_proj)):
            if new is not None:
                matrix, bias = matrix_of(old)
                assert bias == (new.bias is not None)
                new.weight.data = matrix[: new.in_features].T
                if bias:
                    new.bias.data = matrix[-1]
        matrix, bias = matrix_of(down)
        layer.mixture.weight.factors[0].data.copy_(matrix[: matrix.shape[0] - bias])
        if bias:
            layer.bias.data = matrix[-1]
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x), block.eval()(x))


def test_a_block_on_meta_and_other_places() -> None:
    block = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)).to("meta")
    assert MixtureOfDecoders.like(block, experts=8, k=2).bias.is_meta
    layer = MixtureOfDecoders.like(block, experts=8, k=2, device="cpu", dtype=FLOAT64)
    assert {(x.device.type, x.dtype) for x in layer.parameters()} == {("cpu", FLOAT64)}


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Transcoder(6, 4, 8), ValueError, "either k or a gate"),
        (lambda: Transcoder(6, 4, 8, 2, gate="jumprelu"), ValueError, "either k or a gate"),
        (lambda: Transcoder(6, 4, 8, 9), ValueError, "k must be at most"),
        (lambda: Transcoder(6, 4, 0, 1), ValueError, "latents must be positive"),
        (lambda: Transcoder(6, 4, 8, 2, skip=1), TypeError, "skip must be True or False"),
        (lambda: MixtureOfDecoders(6, 9, 4, 8), ValueError, "either k or a gate"),
        (lambda: MixtureOfDecoders(6, 9, 4, (), 2), ValueError, "without experts must have no gate"),
        (lambda: MixtureOfDecoders(6, 9, 4, 8, 2, gated=None), TypeError, "gated must be True or False"),
        (lambda: MixtureOfDecoders(6, 9, 4, 8, 2, format="cp", rank=(1, 2)), ValueError, "rank of format"),
        (lambda: MixtureOfTransforms(6, 4, []), ValueError, "at least one entry"),
        (lambda: MixtureOfTransforms(6, 4, [2, 0]), ValueError, "every rank must be positive"),
        (lambda: Transcoder.like(nn.ReLU(), latents=8, k=2), ValueError, "two or three linear layers"),
        (lambda: MixtureOfDecoders.like(nn.Linear(6, 4), experts=8, k=2), ValueError, "two or three linear"),
    ],
)
def test_errors_state_the_rule(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
