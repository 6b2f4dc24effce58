"""Layers made from what exists start as it is, in models of someone else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP, replace_linear, replace_mlp  # noqa: E402


class Block(nn.Module):
    """Linear layers and an activation, and a function that says what is done with them."""

    def __init__(self, forward: Callable[[Any, Any], Any], **more: Any):
        super().__init__()
        self._forward = forward
        parts = {"up": nn.Linear(6, 10), "act": nn.ReLU(), "down": nn.Linear(10, 6), **more}
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self._forward(self, x)


def in_order(*names: str) -> Callable[[Any, Any], Any]:
    def forward(self: Any, x: Any) -> Any:
        for name in names:
            x = getattr(self, name)(x)
        return x

    return forward


usual = in_order("up", "act", "down")


def plain(*between: nn.Module, after: tuple[nn.Module, ...] = (), bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10, bias), *between, nn.Linear(10, 6, bias), *after)


def zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def scaled(scale: Any) -> nn.Module:
    return Block(lambda self, x: self.scale * usual(self, x), scale=scale)


def gated(hidden: Callable[[Any, Any], Any], **more: Any) -> nn.Module:
    parts = {"gate": nn.Linear(6, 10), "act": nn.SiLU(), **more}
    return Block(lambda self, x: self.down(hidden(self, x)), **parts)


class Optional(nn.Sequential):
    def forward(self, x: Any, cache: Any = None) -> Any:
        return super().forward(x)


def model(*blocks: nn.Module) -> nn.Module:
    layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(6), "mlp": each}) for each in blocks)
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(6, 4)})


OPTIONS = {"experts": 4, "format": "cp", "rank": 7, "gate_norm": "layer"}

TAKEN: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: plain(nn.ReLU()),
    "no bias": lambda: plain(nn.ReLU(), bias=False),
    "dropout after the activation": lambda: plain(nn.GELU(), nn.Dropout(0.5)),
    "dropout at the end": lambda: plain(nn.GELU(), after=(nn.Dropout(0.3),)),
    "two dropouts": lambda: plain(nn.GELU(), nn.Dropout(0.5), after=(nn.Dropout(0.2),)),
    "one dropout, twice": lambda: (lambda drop: plain(nn.GELU(), drop, after=(drop,)))(nn.Dropout(0.5)),
    "torchvision's MLP": lambda: plain(nn.ReLU(True), nn.Dropout(0.4, True), after=(nn.Dropout(0.4, True),)),
    "timm's Mlp": lambda: Block(
        in_order("up", "act", "drop1", "norm", "down", "drop2"),
        drop1=nn.Dropout(0.0), norm=nn.Identity(), drop2=nn.Dropout(0.1),
    ),
    "defined backwards": lambda: Block(
        in_order("down", "act", "up"), up=nn.Linear(6, 6), down=nn.Linear(6, 6)
    ),
    "defined backwards, wider": lambda: Block(
        in_order("down", "act", "up"), up=nn.Linear(10, 6), down=nn.Linear(6, 10)
    ),
    "PReLU of channels": lambda: plain(nn.PReLU(10)),
    "GELU by tanh": lambda: plain(nn.GELU(approximate="tanh")),
    "SwiGLU": lambda: gated(lambda self, x: self.act(self.gate(x)) * self.up(x)),
    "SwiGLU, the gate last": lambda: gated(lambda self, x: self.up(x) * self.act(self.gate(x))),
    "SwiGLU with dropout": lambda: gated(
        lambda self, x: self.drop(self.act(self.gate(x)) * self.up(x)), drop=nn.Dropout(0.5)
    ),
    "SwiGLU of one layer": lambda: gated(
        lambda self, x: (lambda g, u: self.act(g) * u)(*self.up(x).chunk(2, -1)),
        up=nn.Linear(6, 20), gate=None,
    ),
    "SwiGLU of one layer, the gate last": lambda: gated(
        lambda self, x: (lambda u, g: self.act(g) * u)(*self.up(x).chunk(2, -1)),
        up=nn.Linear(6, 20), gate=None,
    ),
    "an optional input that is not used": lambda: Optional(*plain(nn.ReLU())),
    "an activation with chance": lambda: plain(nn.RReLU()),
    "zeros in the second layer": lambda: Block(usual, down=zeroed(nn.Linear(10, 6))),
}  # fmt: skip


def values_of(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Nothing of a model, and no state of random numbers, is otherwise afterwards."""
    modules, state = dict(network.named_modules()), copy.deepcopy(values_of(network))
    modes, chance = [module.training for module in modules.values()], torch.get_rng_state()
    yield
    assert dict(network.named_modules()) == modules
    assert [module.training for module in modules.values()] == modes
    after = values_of(network)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), chance)


@pytest.mark.parametrize("name", TAKEN)
def test_a_block_is_replaced_by_one_that_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    network = model(TAKEN[name](), plain(nn.ReLU())).double()
    old = network["layers"][0]["mlp"]
    with unchanged(network):
        (planned,) = replace_mlp(network, "layers.0.mlp", dry_run=True, **OPTIONS)
    assert planned.errors == () and planned.output_error is None and "not fitted" in str(planned)
    (done,) = replace_mlp(network, "layers.0.mlp", **OPTIONS)
    assert done[:3] == planned[:3] and done.name == "layers.0.mlp"
    new = network["layers"][0]["mlp"]
    assert isinstance(new, MuMoEMLP) and network["layers"][1]["mlp"][0].training
    counts = [sum(p.numel() for p in module.parameters()) for module in (old, new)]
    assert [done.before, done.after] == counts
    assert max(done.errors) < 1e-9 and done.output_error < 1e-5
    x = 3 * torch.randn(20, 6, dtype=torch.float64)
    for training in (False, True):
        outputs = []
        for module in (old, new):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
        torch.testing.assert_close(*outputs)
    shared = {id(module) for module in old.modules()} & {id(module) for module in new.modules()}
    assert not shared and not {id(p) for p in old.parameters()} & {id(p) for p in new.parameters()}


class UsesCache(nn.Sequential):
    def forward(self, x: Any, cache: Any = None) -> Any:
        return super().forward(x if cache is None else x + cache)


class UsesFlag(nn.Sequential):
    def forward(self, x: Any, flag: Any = None) -> Any:
        return super().forward(x if flag is None else 2 * x)


class TwoInputs(nn.Sequential):
    def forward(self, x: Any, mask: Any = None) -> Any:
        return super().forward(x)


class AnyInputs(nn.Sequential):
    def forward(self, *inputs: Any) -> Any:
        return super().forward(*inputs)


class Adapted(nn.Linear):
    """A linear layer with an adapter, which starts at zero."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.low, self.high = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x: Any) -> Any:
        return super().forward(x) + x @ self.low.T @ self.high.T


class Doubled(nn.Linear):
    def __call__(self, x: Any) -> Any:
        return 2 * super().__call__(x)


class Router(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x).sigmoid(), x


def with_forward(module: Any) -> Any:
    forward = module.forward
    module.forward = lambda *inputs: forward(*inputs)
    return module


def hooked(kind: str, module: nn.Module, place: Any = None) -> nn.Module:
    getattr(module if place is None else place, f"register_{kind}")(
        lambda *_: pytest.fail("a hook was called")
    )
    return module


def frozen_weight(module: Any) -> Any:
    module.weight.requires_grad_(False)
    return module


def of_nan(module: Any) -> Any:
    nn.init.constant_(module.weight, torch.nan)
    return module


class Tagged(torch.Tensor):
    pass


def tagged(module: Any) -> Any:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Tagged))
    return module


HOOKS = (
    "forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook", "state_dict_pre_hook",
    "load_state_dict_pre_hook", "load_state_dict_post_hook",
)  # fmt: skip

#: Linear layers that are refused, with words of the cause.
REFUSED_LINEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an adapter": (lambda: Adapted(6, 6), "Adapted overrides the forward method"),
    "a router": (lambda: Router(6, 6), "Router overrides the forward method"),
    "a call of its own": (lambda: Doubled(6, 6), "multiplies by 2"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "parametrization"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), "parametrization"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "pre-hook.*SpectralNorm"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5), "pre-hook.*RandomUnstr"),
    "offloaded": (lambda: with_forward(nn.Linear(6, 6)), "own forward method"),
    "lazy": (lambda: nn.LazyLinear(6), "lazy"),
    "a tensor of another class": (lambda: tagged(nn.Linear(6, 6)), "ordinary tensor, got Tagged"),
    "float8": (lambda: nn.Linear(6, 6).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "NaN": (lambda: of_nan(nn.Linear(6, 6)), "'weight' must be finite"),
    "half frozen": (lambda: frozen_weight(nn.Linear(6, 6)), "either all or none"),
    **{
        kind: ((lambda kind=kind: hooked(kind, nn.Linear(6, 6))), "hook")
        for kind in HOOKS
    },
    "a hook on the weight": (
        lambda: hooked("hook", linear := nn.Linear(6, 6), linear.weight), "'weight' has a hook"
    ),
    "a hook after the gradient of the weight": (
        lambda: hooked("post_accumulate_grad_hook", linear := nn.Linear(6, 6), linear.weight),
        "'weight' has a hook",
    ),
}  # fmt: skip

#: Blocks that are refused, with words of the cause.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm": (lambda: plain(nn.LayerNorm(10), nn.GELU()), "Linear, LayerNorm, GELU, Linear"),
    "batch norm": (lambda: plain(nn.BatchNorm1d(7), nn.GELU()), "BatchNorm1d, GELU"),
    "two activations": (lambda: plain(nn.ReLU(), nn.Tanh()), "Linear, ReLU, Tanh, Linear"),
    "no activation": (plain, "must be passed as `activation`"),
    "an activation at the end": (lambda: plain(nn.ReLU(), after=(nn.Tanh(),)), "Linear, ReLU, Linear, Tanh"),
    "an activation before": (
        lambda: Block(in_order("first", "up", "act", "down"), first=nn.Tanh()), "Tanh, Linear, ReLU"
    ),
    "dropout before the activation": (lambda: plain(nn.Dropout(0.5), nn.GELU()), "Dropout, GELU"),
    "dropout of another kind": (lambda: plain(nn.GELU(), nn.AlphaDropout(0.5)), "GELU, AlphaDropout"),
    "a detached output": (lambda: Block(lambda self, x: usual(self, x).detach()), "gradient of its input"),
    "a detached branch": (
        lambda: Block(lambda self, x: self.down(self.act(self.up(x)).detach())), "gradient of its input"
    ),
    "dropout of no module": (
        lambda: Block(lambda self, x: nn.functional.dropout(usual(self, x), 0.5, self.training)),
        "in training mode",
    ),
    "a residual": (lambda: Block(lambda self, x: x + usual(self, x)), "adds its input"),
    "a scale": (lambda: scaled(2.0), "multiplies by 2"),
    "a scale that zeros hide": (
        lambda: Block(lambda self, x: 2 * usual(self, x), down=zeroed(nn.Linear(10, 6))), "multiplies by 2"
    ),
    "a trained scale that is one": (lambda: scaled(nn.Parameter(torch.ones(()))), r"\['scale'\]"),
    "a buffer": (lambda: scaled(nn.Buffer(torch.ones(()))), r"\['scale'\]"),
    "a mean over positions": (
        lambda: Block(lambda self, x: usual(self, x - x.mean(-2, keepdim=True))), "relative difference"
    ),
    "a mean over positions of a batch": (
        lambda: Block(lambda self, x: usual(self, x - x.mean(1, keepdim=True) if x.ndim == 3 else x)),
        "relative difference",
    ),
    "a limit of large outputs": (
        lambda: Block(lambda self, x: usual(self, x).clamp(-10, 10)), "relative difference"
    ),
    "a change of its input": (lambda: Block(lambda self, x: usual(self, x.relu_())), "relative difference"),
    "any number of inputs": (lambda: AnyInputs(*plain(nn.ReLU())), r"one input, got \['inputs'\]"),
    "a second input": (lambda: TwoInputs(*plain(nn.ReLU())), "one input.*'mask'"),
    "a second input that is used": (lambda: UsesCache(*plain(nn.ReLU())), "uses 'cache'"),
    "a second input that is seen": (lambda: UsesFlag(*plain(nn.ReLU())), "uses 'flag'"),
    "a gate with a norm": (
        lambda: gated(
            lambda self, x: self.norm(self.act(self.gate(x)) * self.up(x)), norm=nn.LayerNorm(10)
        ),
        "SiLU, Linear, LayerNorm, Linear",
    ),
    "a gate that is added": (
        lambda: gated(lambda self, x: self.act(self.gate(x)) + self.up(x)), "relative difference"
    ),
    "a gate without a bias": (
        lambda: gated(lambda self, x: self.act(self.gate(x)) * self.up(x), gate=nn.Linear(6, 10, False)),
        "must have a bias",
    ),
    "a gate in thirds": (
        lambda: gated(
            lambda self, x: (lambda a, b, c: self.act(a) * b * c)(*self.up(x).chunk(3, -1)),
            up=nn.Linear(6, 30), gate=None,
        ),
        "as many inputs as the others have outputs",
    ),
    "a tuple": (lambda: Block(lambda self, x: (usual(self, x), x)), "must return a tensor, got tuple"),
    "one layer called twice": (
        lambda: Block(in_order("up", "up", "act", "down"), up=nn.Linear(6, 6), down=nn.Linear(6, 6)),
        "called once",
    ),
    "an adapter": (lambda: Block(usual, up=Adapted(6, 10)), "Adapted overrides the forward"),
    "one bias": (lambda: Block(usual, up=nn.Linear(6, 10, bias=False)), "must have a bias"),
    "half frozen": (lambda: Block(usual, up=nn.Linear(6, 10).requires_grad_(False)), "either all or none"),
    "offloaded": (lambda: with_forward(plain(nn.ReLU())), "own forward method"),
    **{
        f"{kind} on {part}": (
            lambda kind=kind, part=part: hooked(kind, block := Block(usual), block.get_submodule(part)),
            "hook",
        )
        for kind in HOOKS
        for part in ("", "act", "down")
    },
    "an encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 10, batch_first=True), "one input.*src_mask"
    ),
}  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", REFUSED_LINEAR)
def test_a_linear_layer_that_does_more_is_refused_and_nothing_changes(name: str, dry_run: bool) -> None:
    make, cause = REFUSED_LINEAR[name]
    network = nn.ModuleDict({"first": nn.Linear(6, 6), "odd": make()})
    modules, chance = dict(network.named_modules()), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"(?s)'odd' cannot be replaced: .*{cause}"):
        replace_linear(network, "*", experts=4, rank=7, dry_run=dry_run)
    assert dict(network.named_modules()) == modules and torch.equal(torch.get_rng_state(), chance)
    with pytest.raises(ValueError, match=cause):
        MuMoE.from_linear(make(), 4, rank=7)
    with pytest.raises(ValueError, match=cause):
        MuMoEMLP.from_linears(nn.Linear(6, 6), make(), 4, rank=7)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_computes_something_else_is_refused_and_nothing_changes(
    name: str, dry_run: bool
) -> None:
    make, cause = REFUSED[name]
    network = model(plain(nn.ReLU()), make())
    with (
        unchanged(network),
        pytest.raises(ValueError, match=rf"(?s)'layers.1.mlp' cannot be replaced: .*{cause}"),
    ):
        replace_mlp(network, "layers.*.mlp", dry_run=dry_run, **OPTIONS)


def test_an_activation_that_is_given_must_be_that_of_the_block() -> None:
    def functional(function: Callable[[Tensor], Tensor]) -> nn.Module:
        return Block(lambda self, x: self.down(function(self.up(x))))

    network = model(functional(torch.relu), plain(nn.ReLU(), nn.Tanh()), plain(nn.LayerNorm(10), nn.GELU()))
    for index, wrong in ((0, None), (0, "gelu"), (1, "relu"), (2, "gelu")):
        with unchanged(network), pytest.raises(ValueError, match=rf"'layers.{index}.mlp' cannot be replaced"):
            replace_mlp(network, f"layers.{index}.mlp", **OPTIONS, **({"activation": wrong} if wrong else {}))
    x = torch.randn(5, 6)
    for index, right in ((0, "relu"), (1, lambda h: torch.tanh(torch.relu(h)))):
        expected = network["layers"][index]["mlp"](x)
        replace_mlp(network, f"layers.{index}.mlp", **OPTIONS, activation=right)
        torch.testing.assert_close(network["layers"][index]["mlp"](x), expected)


def test_a_layer_too_small_leaves_the_others_as_they_are() -> None:
    network = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 3)})
    with unchanged(network), pytest.raises(ValueError, match="'b' cannot be replaced"):
        replace_linear(network, "*", experts=16, parameters="match")


def test_a_parent_that_refuses_a_new_child_leaves_the_model_as_it_is() -> None:
    class Fixed(nn.ModuleDict):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, MuMoE):
                raise RuntimeError("fixed")
            super().__setattr__(name, value)

    shared = nn.Linear(6, 6)
    network = nn.ModuleDict({"a": shared, "again": shared, "fixed": Fixed({"b": nn.Linear(6, 6)})})
    modules = dict(network.named_modules(remove_duplicate=False))
    with pytest.raises(RuntimeError, match="fixed"):
        replace_linear(network, "*", experts=4, rank=7)
    assert dict(network.named_modules(remove_duplicate=False)) == modules


def test_an_error_that_names_the_module_is_of_the_same_kind() -> None:
    network = nn.ModuleDict({"a": nn.Linear(6, 6)})
    with unchanged(network), pytest.raises(TypeError, match="'a' cannot be replaced: "):
        replace_linear(network, "a", experts=4.5, rank=7)


def test_a_module_with_several_names_stays_one() -> None:
    mlp, linear = plain(nn.GELU()), nn.Linear(6, 6)
    network = nn.ModuleDict({"layers": nn.ModuleList([mlp] * 3), "a": linear, "b": linear}).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = mlp(x), linear(x)
    (done,) = replace_mlp(network, "layers.1", **OPTIONS)
    assert done.names == ("layers.0", "layers.1", "layers.2") and done.name == "layers.0"
    assert len({id(each) for each in network["layers"]}) == 1
    (done,) = replace_linear(network, "b", **OPTIONS)
    assert done.names == ("a", "b") and network["a"] is network["b"]
    for new, expected in zip((network["layers"][0], network["a"]), before, strict=True):
        torch.testing.assert_close(new(x), expected)


@pytest.mark.parametrize("by", ["parameter", "memory", "module"])
def test_parameters_shared_with_the_rest_of_the_model_are_refused(by: str) -> None:
    network: Any = nn.ModuleDict({"embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    network["mlp"] = plain(nn.ReLU())
    if by == "parameter":
        network["head"].weight = network["embed"].weight
    elif by == "memory":
        network["head"].weight.data = network["embed"].weight.data
    else:
        network["again"] = network["mlp"][0]
    with (
        unchanged(network),
        pytest.raises(ValueError, match=r"shares a parameter .* '(embed.weight|again.weight)'"),
    ):
        if by == "module":
            replace_mlp(network, "mlp", **OPTIONS)
        else:
            replace_linear(network, "head", **OPTIONS)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_frozen_stays_so_and_dtype_and_modes_stay(kind: str, dtype: Any) -> None:
    mlp = plain(nn.PReLU(10), nn.Dropout(0.5), after=(nn.Dropout(0.1),)).to(dtype)
    mlp[0].requires_grad_(False), mlp[3].requires_grad_(False)
    network = nn.ModuleDict({"mlp": mlp, "linear": nn.Linear(6, 6, dtype=dtype).requires_grad_(False)}).eval()
    mlp[2].train()
    replace = {"linear": replace_linear, "mlp": replace_mlp}[kind]
    (done,) = replace(network, kind, **{**OPTIONS, "gate_norm": "batch"}, input_norm=True)
    new = network[kind]
    trained = [name for name, p in new.named_parameters() if p.requires_grad]
    assert trained == ([] if kind == "linear" else ["activation.weight"])
    assert {p.dtype for p in new.parameters()} == {dtype}
    modes = [name for name, module in new.named_modules() if module.training]
    assert modes == ([] if kind == "linear" else ["hidden_dropout"])
    # (The norm of the input is no part of the old module: the error of the outputs shows it.)
    assert max(done.errors) < 1e-2 < done.output_error
    assert "of outputs" in str(done)


def test_a_frozen_layer_for_both_halves_stays_frozen() -> None:
    block = TAKEN["SwiGLU of one layer"]().requires_grad_(False)
    network = model(block)
    replace_mlp(network, "layers.0.mlp", **OPTIONS)
    assert not any(p.requires_grad for p in network["layers"][0]["mlp"].parameters())


def test_the_error_of_outputs_is_of_what_they_are() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6)
    network = nn.ModuleDict({"a": linear, "rounded": nn.Linear(6, 6, dtype=torch.float16)})
    (exact,) = replace_linear(copy.deepcopy(network), "a", **OPTIONS)
    (rounded,) = replace_linear(copy.deepcopy(network), "rounded", **OPTIONS)
    (wrong,) = replace_linear(copy.deepcopy(network), "a", **OPTIONS, gate=lambda z: 2 * z.softmax(-1))
    (small,) = replace_linear(network, "a", **{**OPTIONS, "rank": 3})
    assert exact.output_error < 1e-5 < rounded.output_error < 1e-2
    assert wrong.errors[0] < 1e-5 and wrong.output_error == pytest.approx(1, abs=1e-4)
    x = torch.randn(500, 6)
    error = float(((network["a"](x) - linear(x)).norm() / linear(x).norm()).detach())
    assert small.output_error == pytest.approx(error, rel=0.3)


def test_the_error_of_outputs_is_measured_without_autocast() -> None:
    torch.manual_seed(0)
    network = model(plain(nn.GELU()))
    with torch.autocast("cpu", torch.bfloat16):
        (done,) = replace_mlp(network, "layers.0.mlp", **OPTIONS)
    assert done.output_error is not None and done.output_error < 1e-5


def test_modules_on_the_meta_device_are_read_and_not_fitted() -> None:
    with torch.device("meta"):
        network = model(plain(nn.PReLU(10)), REFUSED["a residual"][0]())
    (done,) = replace_mlp(network, "layers.0.mlp", **OPTIONS)
    assert all(p.is_meta for p in network.parameters()) and done.output_error is None
    with pytest.raises(ValueError, match="adds its input"):
        replace_mlp(network, "layers.1.mlp", **OPTIONS)
    with pytest.raises(ValueError, match="must have values"):
        MuMoE.from_linear(network["head"], 4, rank=7, device="cpu")


@pytest.mark.parametrize("pattern", ["layers.0.linear1", "layers.1.self_attn.out_proj", "*"])
def test_layers_whose_weight_torch_reads_directly_are_refused(pattern: str) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with unchanged(network), pytest.raises(ValueError, match=r"reads the weight of '(linear1|out_proj)'"):
        replace_linear(network, pattern, **OPTIONS)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 10, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 6)
    with torch.inference_mode():
        expected = decoder(x, x)
    assert len(replace_linear(decoder, "*.linear?", **{**OPTIONS, "rank": 12})) == 4
    with torch.inference_mode():
        torch.testing.assert_close(decoder.eval()(x, x), expected, rtol=1e-4, atol=1e-4)


def test_so_are_those_of_a_subclass() -> None:
    class Own(nn.TransformerEncoderLayer):
        pass

    network = nn.ModuleDict({"own": Own(6, 2, 10, batch_first=True)})
    with unchanged(network), pytest.raises(ValueError, match="reads the weight of 'linear1'"):
        replace_linear(network, "*.linear1", **OPTIONS)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def offloaded(network: nn.Module) -> nn.Module:
    accelerated: nn.Module = pytest.importorskip("accelerate").cpu_offload(network, execution_device="cpu")
    return accelerated


def sharded(network: nn.Module) -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fsdp.fully_shard(network, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    return network


class OwnParallel(nn.parallel.DistributedDataParallel):
    pass


@pytest.mark.parametrize(
    ("wrap", "cause"),
    [
        (nn.parallel.DistributedDataParallel, "wrapped in DistributedDataParallel"),
        (OwnParallel, "wrapped in DistributedDataParallel"),
        (sharded, "ordinary tensor, got DTensor"),
        (offloaded, "own forward method"),
    ],
)
def test_a_model_that_is_wrapped_already_is_refused(group: None, wrap: Any, cause: str) -> None:
    network = wrap(nn.Sequential(nn.Linear(6, 6), plain(nn.ReLU())))
    modules = dict(network.named_modules())
    for replace, pattern in ((replace_linear, "*0"), (replace_mlp, "*1")):
        with pytest.raises(ValueError, match=cause):
            replace(network, pattern, **OPTIONS)
    assert dict(network.named_modules()) == modules


def test_a_block_within_a_block_is_refused() -> None:
    network = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), plain(nn.ReLU()), nn.Linear(6, 6))})
    with unchanged(network), pytest.raises(ValueError, match=r"'a\.1' cannot be replaced.* also matches 'a'"):
        replace_mlp(network, "a*", **OPTIONS)
    assert len(replace_mlp(network, "a.1", **OPTIONS)) == 1


def test_what_is_no_linear_layer_is_left_alone() -> None:
    class Conv1D(nn.Conv1d):
        pass

    network = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Conv1D(4, 4, 3), "c": nn.Bilinear(4, 4, 4)})
    assert [done.name for done in replace_linear(network, "*", experts=4, rank=5)] == ["a"]
    with pytest.raises(ValueError, match=r"'decoder.\*' names none of \['layers.0.mlp'"):
        replace_mlp(model(plain(nn.ReLU())), "decoder.*", experts=3, rank=2)
    with pytest.raises(ValueError, match="names none of"):
        replace_linear(model(), "layers.*.norm", experts=3, rank=2)
    convolutions = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"'layers.0.mlp', a Sequential of \['Conv2d', 'GELU', 'Conv2d'\]"):
        replace_mlp(model(convolutions), "layers.*.mlp", experts=3, rank=2)


def test_a_gpt2_of_transformers(transformers: Any) -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=12)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (2, 12))
    before = gpt2(tokens).logits
    done = replace_mlp(
        gpt2, "transformer.h.*.mlp", experts=(4, 2), format="tr", rank=(1, 1, 1, 17), gate_norm="layer"
    )
    assert len(done) == 2 and max(e for r in done for e in r.errors) < 1e-5
    torch.testing.assert_close(gpt2(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_linear_layers_of_transformers(transformers: Any) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=6)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(20, (2, 6))
    before = gpt2(tokens).logits
    done = replace_linear(gpt2, "transformer.h.*.attn.c_*", experts=4, rank=9, gate_norm="layer")
    assert len(done) == 2
    torch.testing.assert_close(gpt2(tokens).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"'lm_head' cannot be replaced: it shares .*'transformer.wte.weight'"
    ):
        replace_linear(gpt2, "lm_head", experts=4, rank=9)


@pytest.mark.parametrize("kind", ["T5", "CLIP", "timm"])
def test_blocks_of_other_libraries(kind: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict()
    if kind == "timm":
        request.getfixturevalue("torchvision_schemas")
        network["mlp"] = pytest.importorskip("timm").layers.Mlp(6, 10, drop=0.3)
    else:
        transformers = request.getfixturevalue("transformers")
        if kind == "T5":
            config = transformers.T5Config(d_model=6, d_ff=10, dropout_rate=0.3)
            network["mlp"] = transformers.models.t5.modeling_t5.T5DenseActDense(config)
        else:
            config = transformers.CLIPTextConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2)
            network["mlp"] = transformers.models.clip.modeling_clip.CLIPMLP(config)
    old = network["mlp"]
    replace_mlp(network, "mlp", **OPTIONS)
    x = torch.randn(3, 4, 6)
    for training in (False, True):
        outputs = []
        for module in (old, network["mlp"]):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_options_and_layers_that_do_not_go_together() -> None:
    network = nn.ModuleDict({"a": nn.Linear(6, 6), "block": plain(nn.ReLU())})
    before = {name: id(module) for name, module in network.named_modules()}
    for options in ({}, {**OPTIONS, "bias": False}):
        with pytest.raises(TypeError, match="must include experts, but not bias"):
            replace_linear(network, "a", **options)
    with pytest.raises(TypeError, match="pattern must be a string, got 1"):
        replace_linear(network, 1, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="'a' cannot be replaced: the outputs of the new module must be finite"
    ):
        replace_linear(network, "a", **OPTIONS, gate=lambda logits: logits * torch.nan)
    network["block"][2].to(torch.float64)
    with pytest.raises(ValueError, match=r"the same dtype, got \['torch.float32', 'torch.float64'\]"):
        replace_mlp(network, "block", **OPTIONS)
    assert {name: id(module) for name, module in network.named_modules()} == before
