"""Models are saved into folders, and loaded whole or not at all."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP, load, replace_linear, replace_mlp, save  # noqa: E402


class Network(nn.Module):
    """An embedding that is tied to the head, and a block between them that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.blocks = nn.ModuleList(
            [block, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), block]
        )
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Any) -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.fixture
def network() -> Network:
    """With layers of experts, some updates and an edit."""
    torch.manual_seed(0)
    network = Network()
    replace_mlp(network, "blocks.0", experts=3, format="tr", rank=(2, 2, 7))
    replace_linear(network, "blocks.1.0", experts=(2, 2), format="kron", parameters="match")
    edit_bias(network.blocks[0].down, "more", torch.ones(3) / 3, outputs=[1], strength=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.arange(11)).square().mean().backward()
        optimizer.step()
    return network


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    tokens = torch.arange(11)
    assert torch.equal(copy.deepcopy(one).eval()(tokens), copy.deepcopy(other).eval()(tokens))


def test_a_model_comes_back(network: Network, tmp_path: Path) -> None:
    save(network, tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "layers.json",
        "weights.safetensors",
    ]
    fresh = Network().eval()
    fresh.blocks[1].train()
    assert load(tmp_path / "folder", model=fresh) is fresh
    assert_equal(fresh, network)
    assert fresh.blocks[0] is fresh.blocks[2] and fresh.head.weight is fresh.embedding.weight
    assert not fresh.blocks[0].training and fresh.blocks[1][0].training
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    # And into a model that has the layers: their parameters stay, as an optimizer has them.
    parameters = [*fresh.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load(tmp_path / "folder", model=fresh)
    assert all(one is other for one, other in zip(fresh.parameters(), parameters, strict=True))
    assert_equal(fresh, network)


def test_a_model_on_meta_gets_memory(network: Network, tmp_path: Path) -> None:
    save(network, tmp_path)
    with torch.device("meta"):
        empty = Network()
    full = load(tmp_path, empty)
    assert_equal(full, network)
    assert full.head.weight is full.embedding.weight and full.blocks[0] is full.blocks[2]
    with torch.device("meta"):
        untied = Network()
        untied.head.weight = nn.Parameter(torch.empty(11, 6))
    load(tmp_path, untied)
    with torch.no_grad():
        untied.head.weight.zero_()
    assert torch.equal(untied.embedding.weight, network.embedding.weight)
    empty.register_buffer("positions", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"buffers must have values; \['positions'\] are on the meta"):
        load(tmp_path, empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(network: Network, dtype: Any, tmp_path: Path) -> None:
    network.to(dtype).blocks[0].gate.to(torch.float32)
    save(network, tmp_path)
    fresh = load(tmp_path, Network().to(dtype))
    assert fresh.blocks[0].gate.weight.dtype == torch.float32 and fresh.blocks[0].up.factor_0.dtype == dtype
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_a_layer_needs_no_model(tmp_path: Path) -> None:
    layer = MuMoE(5, 4, 3, rank=2)
    save(layer, tmp_path)
    again = load(tmp_path)
    assert again.config == layer.config
    assert torch.equal(again.weight.factors[-1], layer.weight.factors[-1])
    assert load(tmp_path, model=again) is again
    save(nn.Sequential(layer), tmp_path)
    with pytest.raises(
        ValueError, match=r"model must be given to load layers of a model, got layers \['0'\]"
    ):
        load(tmp_path)


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        change(weights)
        save_file(weights, folder / "weights.safetensors")

    return damage


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "layers.json").read_text())
        change(content)
        (folder / "layers.json").write_text(json.dumps(content))

    return damage


FACTOR = "blocks.0.up.factor_0"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (changed(lambda w: w.pop("norm.bias")), "norm.bias is missing"),
    "missing factor": (changed(lambda w: w.pop(FACTOR)), f"{FACTOR} is missing"),
    "left over": (changed(lambda w: w.update(more=torch.ones(1))), "more is left over"),
    "shape": (changed(lambda w: w.update({"norm.bias": torch.ones(7)})), r"norm.bias has shape \(7,\) inst"),
    "factor's shape": (changed(lambda w: w.update({FACTOR: torch.ones(2)})), f"{FACTOR} has shape"),
    "dtype": (
        changed(lambda w: w.update({"norm.bias": torch.ones(6).half()})),
        "norm.bias has dtype torch.float16 instead of torch.float32",
    ),
    "factor's dtype": (
        changed(lambda w: w.update({FACTOR: torch.ones(w[FACTOR].shape).long()})),
        f"{FACTOR} has dtype torch.int64",
    ),
    "untied": (
        lambda folder: (
            changed(lambda w: w.update({"head.weight": w["embedding.weight"] + 1}))(folder),
            described(lambda d: d["tied"].pop("head.weight"))(folder),
        ),
        "head.weight differs from embedding.weight, to which the model ties it",
    ),
    "later": (described(lambda d: d.update(version=2)), "must be at most 1 .* got 2: upgrade"),
    "no version": (described(lambda d: d.pop("version")), "must have a version, .* got None and"),
    "version": (described(lambda d: d.update(version=0)), "a positive integer, .* got 0 and"),
    "tied": (described(lambda d: d.update(tied=[])), "tied must be an object that maps names"),
    "tied to nothing": (
        described(lambda d: d["tied"].update({"head.weight": "x"})),
        "head.weight is missing",
    ),
    "tied to a list": (described(lambda d: d["tied"].update({"head.weight": []})), "tied must be an object"),
    "class": (described(lambda d: d["layers"]["blocks.0"].update({"class": "X"})), "got 'X': first import"),
    "list for a class": (
        described(lambda d: d["layers"]["blocks.0"].update({"class": []})),
        r"class of a layer must be registered .* got \[\]",
    ),
    "list for edits": (
        described(lambda d: d["layers"]["blocks.0"].update(edits=["more"])),
        r"keys of edits must be .* got \['more'\]",
    ),
    "edits of nothing": (
        described(lambda d: d["layers"]["blocks.0"].update(edits={"across": ["more"]})),
        "keys of edits must be submodules that support edits",
    ),
    "option": (described(lambda d: d["layers"]["blocks.0"]["config"].update(wide=1)), "wide"),
    "place": (
        described(lambda d: d["layers"].update({"blocks.3": d["layers"].pop("blocks.0")})),
        "must have a module 'blocks.3'",
    ),
    "no layer": (described(lambda d: d["layers"].pop("blocks.1.0")), r"blocks\.1\.0\..* is left over"),
    "edit": (described(lambda d: d["layers"]["blocks.0"].pop("edits")), "edits.more.* is left over"),
    "no JSON": (lambda folder: (folder / "layers.json").write_text("{"), "must be JSON"),
    "cut": (
        lambda folder: (folder / "weights.safetensors").write_bytes(
            (folder / "weights.safetensors").read_bytes()[:-1]
        ),
        "complete safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_leaves_the_model_as_it_was(network: Network, damage: str, tmp_path: Path) -> None:
    change, match = DAMAGES[damage]
    save(network, tmp_path)
    change(tmp_path)
    fresh = Network()
    modules, before = dict(fresh.named_modules()), copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=match) as caught:
        load(tmp_path, model=fresh)
    assert str(caught.value).startswith(str(tmp_path))
    assert dict(fresh.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_model_that_refuses_a_layer_stays_as_it_was(network: Network, tmp_path: Path) -> None:
    class Fixed(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, MuMoE):
                raise RuntimeError("fixed")
            super().__setattr__(name, value)

    save(network, tmp_path)
    fresh = Network()
    fresh.blocks[1] = Fixed(*fresh.blocks[1])
    modules = dict(fresh.named_modules(remove_duplicate=False))
    with pytest.raises(RuntimeError, match="fixed"):
        load(tmp_path, model=fresh)
    assert dict(fresh.named_modules(remove_duplicate=False)) == modules


def test_a_folder_is_replaced_whole_or_not_at_all(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(network, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(Network(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(Network(), tmp_path)
    assert json.loads((tmp_path / "layers.json").read_text())["layers"] == {}


def test_only_ordinary_tensors_are_saved(tmp_path: Path) -> None:
    for model in (nn.LazyLinear(3), nn.Linear(2, 2, device="meta"), Stateful()):
        with pytest.raises(ValueError, match=r"ordinary tensors with values; '(weight|_extra_state)' is"):
            save(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_model_is_a_module(tmp_path: Path) -> None:
    for call in (lambda: save(nn.Linear(2, 2).state_dict(), tmp_path), lambda: load(tmp_path, "model")):
        with pytest.raises(TypeError, match=r"a model must be a torch.nn.Module, got (OrderedDict|str)"):
            call()


class Stateful(nn.Module):
    def get_extra_state(self) -> Any:
        return {"calls": 1}


def test_views_of_one_tensor_come_back(tmp_path: Path) -> None:
    def views() -> nn.Module:
        model, base = nn.Module(), torch.randn(4, 4)
        model.whole, model.part, model.start = map(nn.Parameter, (base, base[1:3], base[:2]))
        model.transposed = nn.Parameter(base.T)
        model.register_buffer("bits", base.view(torch.int32))
        return model

    model, fresh = views(), views()
    save(model, tmp_path)
    assert json.loads((tmp_path / "layers.json").read_text())["tied"] == {}
    load(tmp_path, fresh)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: save(nn.Linear(2, 2), tmp_path), lambda: load(tmp_path)):
        with pytest.raises(ModuleNotFoundError, match=r"safetensors is not installed; pip install 'mum"):
            call()
    assert not any(tmp_path.iterdir())


def test_blocks_with_functions_of_other_modules(tmp_path: Path) -> None:
    model = nn.Sequential(MuMoEMLP(4, 5, 4, 2, rank=2, activation=nn.PReLU(), gate="softmax"))
    save(model, tmp_path)
    again = load(tmp_path, nn.Sequential(nn.Identity()))
    x = torch.randn(6, 4)
    assert torch.equal(again(x), model(x)) and isinstance(again[0].activation, nn.PReLU)
