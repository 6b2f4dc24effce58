"""Edits of biases in all that is done with a layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from forked import leave, start  # noqa: E402
from torch import distributed, nn  # noqa: E402

from mumoe_tensor.analysis import ablate, edit_bias, mean_coefficients, remove_edit  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, gather, parallelize  # noqa: E402

N, OUT = 6, 3


def filled(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def layer_of(experts: Any = N, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return filled(MuMoE(4, OUT, experts, **{"rank": 5, "gate_norm": "layer", **options}))


def inputs(rows: int = 7) -> Any:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def edited_of(*arguments: Any, **options: Any) -> Any:
    layer = layer_of(*arguments, **options)
    for name, outputs, strength in (("up", [0, 2], 3.0), ("down", 1, -2.0)):
        generator = torch.Generator().manual_seed(len(name))
        means = [torch.rand(n, generator=generator) for n in layer.gate.num_experts]
        edit_bias(layer, name, means, outputs, strength)
    return layer


def added(layer: Any, x: Any) -> Any:
    """What the edits of `edited_of` add, by the equation."""
    total = torch.zeros(*x.shape[:-1], OUT)
    for name, outputs, strength in (("up", [0, 2], 3.0), ("down", [1], -2.0)):
        generator = torch.Generator().manual_seed(len(name))
        share = torch.ones(x.shape[:-1])
        for a in layer.gate(x):
            share = share * (a.detach().float() @ torch.rand(a.shape[-1], generator=generator))
        total[..., outputs] += strength * share[..., None]
    return total


# ---- mean coefficients -----------------------------------------------------------------------------------


def test_mean_coefficients_of_a_subpopulation() -> None:
    layer = layer_of((4, 3), gate_norm="batch")
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), layer).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    actual = mean_coefficients(model, layer, iter(inputs(10).split(4)))
    modes = [module.training for module in model]
    assert modes == [True, True, False] and not layer.gate._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = [a.double().mean(0) for a in model.eval()[2].gate(model[0](inputs(10)))]
    torch.testing.assert_close(list(actual), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="need at least one input"):
        mean_coefficients(model, layer, [])


def test_who_looks_like_the_mean_is_corrected_most() -> None:
    layer, x = layer_of(), inputs(50)
    (mean,) = mean_coefficients(layer, layer, [x[:1]])
    before = layer(x)
    edit_bias(layer, "one", mean, 1, 1.0)
    change = (layer(x) - before).detach()
    torch.testing.assert_close(change[:, 1], layer.gate(x)[0].detach() @ mean.float())
    assert change[:, [0, 2]].abs().max() == 0 and change[:, 1].max() > 1.5 * change[:, 1].mean()


# ---- states and copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [N, (3, 2), ()])
def test_a_fresh_layer_takes_edits_up_from_the_state(experts: Any, tmp_path: Path) -> None:
    options = {"rank": 5 if experts else (4,)}
    layer, x = edited_of(experts, **options), inputs()
    torch.save({"model.layer." + k: v for k, v in layer.state_dict().items()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for other in (layer_of(experts, 1, **options), edited_of(experts, seed=1, **options)):
        model = nn.ModuleDict({"model": nn.ModuleDict({"layer": other})})
        model.load_state_dict(state)
        assert torch.equal(other(x), layer(x)) and list(other.experts.edits) == ["up", "down"]
    fresh = layer_of(experts, 2, **options)
    fresh.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(fresh(x), layer(x))


def test_states_without_edits_are_as_ever() -> None:
    keys = {"experts.factor_0", "experts.factor_1", "experts.factor_2", "gate.weight"}
    layer, edited = layer_of(), edited_of()
    assert set(layer.state_dict()) == keys and not dict(layer.named_buffers())
    assert layer.experts.edits is None and len([*layer.modules()]) == 3
    assert set(edited.state_dict()) - keys == {
        f"experts.edits.{name}.{buffer}" for name in ("up", "down") for buffer in ("mean_0", "outputs")
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        edited.load_state_dict(layer.state_dict())
    edited.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(edited(inputs()), layer(inputs()) + added(layer, inputs()))


def test_states_of_other_sizes_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        layer_of(N + 1).load_state_dict(edited_of().state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_edits_of_their_own(copied: Any) -> None:
    layer, x = edited_of(), inputs()
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    remove_edit(other, "up")
    remove_edit(other, "down")
    torch.testing.assert_close(other(x) + added(layer, x), layer(x))


def test_means_are_copied() -> None:
    layer, mean, x = layer_of(), torch.rand(N), inputs()
    edit_bias(layer, "one", mean, 0, 1.0)
    before = layer(x)
    mean.zero_()
    assert torch.equal(layer(x), before)


# ---- dtypes, devices, compilation, training --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_edits_move_with_the_layer(dtype: Any) -> None:
    x = inputs()
    expected = edited_of()(x)
    for layer in (edited_of().to(dtype), edited_of(dtype=dtype)):
        assert {buffer.dtype for buffer in layer.buffers()} == {dtype}
        assert layer(x.to(dtype)).dtype == dtype
    actual = edited_of().to(dtype)(x.to(dtype)).float()
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.3)
    assert {buffer.device.type for buffer in edited_of().to("meta").buffers()} == {"meta"}
    assert edited_of(device="meta").experts.edits["up"].outputs.is_meta


@pytest.mark.parametrize("grad", [True, False])
def test_autocast(grad: bool) -> None:
    layer, x = edited_of(), inputs()
    plain, expected = layer_of(), layer(x)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = layer(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("train", [True, False])
def test_compiled_layers_see_edits(train: bool) -> None:
    torch._dynamo.reset()
    layer, x = layer_of((3, 2)).train(train), inputs()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    before = compiled(x)
    edit_bias(layer, "one", [torch.rand(3), torch.rand(2)], 1, 4.0)
    torch.testing.assert_close(compiled(x), layer(x))
    assert (compiled(x) - before).abs().max() > 0.1
    remove_edit(layer, "one")
    torch.testing.assert_close(compiled(x), before)


def test_gradients_and_second_derivatives() -> None:
    layer, x = edited_of().double(), inputs(3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    layer(x).sum().backward()
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    # Training changes the layer below the edit, not the edit.
    before = {name: value.clone() for name, value in layer.named_buffers()}
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_other_calls_of_torch() -> None:
    layer, x = edited_of().eval(), inputs()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(layer_twin(layer), state, (x,)), layer(x))


def layer_twin(layer: Any) -> Any:
    twin = edited_of(seed=5).eval()
    assert [name for name, _ in twin.named_buffers()] == [name for name, _ in layer.named_buffers()]
    return twin


# ---- blocks, parts, published layers ---------------------------------------------------------------------


@pytest.mark.parametrize("which", ["up", "down", "gate_proj"])
@pytest.mark.parametrize("activation", ["gelu", lambda x: x.sin()])
def test_any_layer_of_a_block(which: str, activation: Any) -> None:
    torch.manual_seed(0)
    options: Any = dict(gate_norm="layer", activation=activation, gated=which == "gate_proj")
    block = filled(MuMoEMLP(4, OUT, 5, (3, 2), "tr", (2, 2, 2, 3), **options))
    twin, x = copy.deepcopy(block), inputs()
    experts: Any = getattr(block, which)
    means = [torch.rand(3), torch.rand(2)]
    edit_bias(experts, "one", means, 1, 2.0)
    # The same by hand: a bias more, where the layer's outputs leave it.
    share = 2 * (block.gate(x)[0] @ means[0]) * (block.gate(x)[1] @ means[1])
    getattr(twin, which).register_forward_hook(
        lambda module, args, y: y + share[:, None] * torch.eye(y.shape[-1])[1]
    )
    torch.testing.assert_close(block(x), twin(x))
    with ablate(block, [0, 1, 2]):
        assert torch.equal(block(x), torch.zeros(7, 5))
    with pytest.raises(ValueError, match="pass its up or down"):
        edit_bias(block, "two", means, 1, 2.0)


def test_published_layers_have_no_edits() -> None:
    with pytest.raises(ValueError, match=r"remove them first.*'up', 'down'"):
        edited_of().to_published()
    layer = edited_of()
    remove_edit(layer, "up")
    remove_edit(layer, "down")
    assert layer.to_published()


@pytest.mark.parametrize("level", [0, 1])
def test_kept_experts_keep_their_edits(level: int) -> None:
    layer = edited_of((4, 3))
    smaller = layer.keep_experts(level, [2, 0])
    for index in ([0, 1], [1, 0]):
        old = list(index)
        old[level] = [2, 0][index[level]]
        for actual, expected in zip(smaller.expert(index), layer.expert(old), strict=True):
            torch.testing.assert_close(actual, expected)


def divided_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    x = inputs().requires_grad_()
    # The processes start differently: that of the first counts.
    divided = parallelize(edited_of(seed=rank))
    divided(x).square().sum().backward()
    actual = {"y": divided(x), "x": x.grad, "gate": divided.gate.weight.grad, "whole": gather(divided)(x)}
    torch.save({name: value.detach() for name, value in actual.items()}, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
def test_divided_layers_add_edits_once(tmp_path: Path) -> None:
    start(divided_worker, str(tmp_path))
    layer, x = edited_of(), inputs().requires_grad_()
    layer(x).square().sum().backward()
    expected = {"y": layer(x), "x": x.grad, "gate": layer.gate.weight.grad, "whole": layer(x)}
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "up"}, "'up' exists"),
        ({"name": "a.b"}, "without dots, got 'a.b'"),
        ({"name": ""}, "without dots"),
        ({"name": "keys"}, "got 'keys'"),
        ({"name": "training"}, "got 'training'"),
        ({"means": torch.rand(N + 1)}, r"\(6,\) experts, got means of shapes \[\(7,\)\]"),
        ({"means": [torch.rand(N), torch.rand(N)]}, "got means of shapes"),
        ({"outputs": OUT}, r"outputs must be one or more different integers .* less than 3, .* got \[3\]"),
        ({"outputs": [0, -1]}, r"got \[-1\]"),
        ({"outputs": []}, "one or more .* got none"),
        ({"layer": nn.Linear(2, 2)}, "Linear has"),
        ({"strength": float("nan")}, "strength must be finite, got nan"),
        ({"strength": -float("inf")}, "strength must be finite, got -inf"),
        ({"strength": 1e39}, "finite in torch.float32, got 1e"),
        (
            {"means": torch.tensor([torch.nan, *[0.5] * (N - 1)])},
            "finite in torch.float32, got .*nan",
        ),
    ],
)
def test_edits_that_cannot_be(change: Any, message: str) -> None:
    layer = edited_of()
    before = list(layer.state_dict())
    given = dict(layer=layer, name="new", means=torch.rand(N), outputs=0, strength=1.0)
    with pytest.raises(ValueError, match=message):
        edit_bias(**{**given, **change})
    assert list(layer.state_dict()) == before
    with pytest.raises(ValueError, match=r"one of \['up', 'down'\], got 'new'"):
        remove_edit(layer, "new")
    with pytest.raises(ValueError, match=r"one of \[\]"):
        remove_edit(layer_of(), "new")


@pytest.mark.parametrize(
    "mean",
    [torch.full((N,), 1e300, dtype=torch.float64), torch.ones(N) * 1j, torch.ones(N, dtype=torch.int64)],
)
def test_means_are_floats_that_the_layer_can_hold(mean: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"floats that are finite in torch\.float32"):
        edit_bias(layer_of(), "new", mean, 0, 1.0)


@pytest.mark.parametrize("change", [{"means": [[0.1] * N]}, {"means": [None]}, {"name": 1}])
def test_means_and_names_of_other_types(change: Any) -> None:
    with pytest.raises(TypeError, match=r"must be tensors, one per level|must be a string, got 1"):
        edit_bias(
            layer_of(), **{"name": "new", "means": torch.rand(N), "outputs": 0, "strength": 1.0} | change
        )


@pytest.mark.parametrize("strength", ["1", None, True, 1j])
def test_strengths_are_numbers(strength: Any) -> None:
    with pytest.raises(TypeError, match="strength must be a number, got "):
        edit_bias(layer_of(), "new", torch.rand(N), 0, strength)


def test_edits_are_as_precise_as_their_layer() -> None:
    experts = Experts(4, OUT, N, "cp", 5, bias=False, dtype=torch.float64)
    mean = torch.rand(N, dtype=torch.float64)
    edit_bias(experts, "one", mean, 1, 0.1)
    torch.testing.assert_close(
        experts.expert(2)[1], 0.1 * mean[2] * torch.eye(OUT).double()[1], rtol=1e-14, atol=0
    )


def test_experts_alone() -> None:
    experts = Experts(4, OUT, N, "cp", 5, bias=False)
    x, a = inputs(), torch.rand(7, N)
    before = experts(x, [a])
    assert experts.expert(2)[1] is None
    mean = torch.rand(N)
    edit_bias(experts, "one", mean, [1], 2.0)
    torch.testing.assert_close(experts(x, [a]) - before, torch.outer(2 * a @ mean, torch.eye(OUT)[1]))
    torch.testing.assert_close(experts.expert([2])[1], 2 * mean[2] * torch.eye(OUT)[1])
    remove_edit(experts, "one")
    assert torch.equal(experts(x, [a]), before) and experts.expert(2)[1] is None
