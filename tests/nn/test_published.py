"""The layers give the recorded results of the published ones, and their parameters back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from published import CASES, layer_of, read, state_of  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_outputs_and_gradients_are_the_recorded_ones(path: Path) -> None:
    settings, tensors = read(path)
    layer = layer_of(settings, state_of(tensors)).eval()
    x = tensors["x"].requires_grad_()
    y = layer(x)
    assert y.shape == (*x.shape[:-1], tensors["y"].shape[-1])
    (y * tensors["grad_y"].reshape(y.shape)).sum().backward()
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.reshape(tensors["y"].shape), tensors["y"], **close)
    torch.testing.assert_close(x.grad, tensors["grad_x"], **close)
    for parameter in layer.parameters():
        parameter.data = parameter.grad
    gradients = layer.to_published(settings["version"])
    recorded = {name.removeprefix("grad."): g for name, g in tensors.items() if name.startswith("grad.")}
    assert recorded.keys() == {name for name in gradients if not name.startswith("bn.")}
    for name, gradient in recorded.items():
        torch.testing.assert_close(gradients[name], gradient, **close)
    trained = layer_of(settings, state_of(tensors)).train()(tensors["x"])
    torch.testing.assert_close(trained.reshape(tensors["y_train"].shape), tensors["y_train"], **close)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_parameters_come_back_bit_equal(path: Path) -> None:
    settings, tensors = read(path)
    state = state_of(tensors)
    written = layer_of(settings, state).to_published(settings["version"])
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(written[name], value), name


def test_what_does_not_fit_is_refused() -> None:
    _, tensors = read(next(path for path in CASES if path.stem == "v2-cp-E2-bn-bias-linear"))
    state = state_of(tensors)
    with pytest.raises(ValueError, match=r"has no parameters named \['bn.0.mean'\]"):
        MuMoE.from_published({**state, "bn.0.mean": state["bn.0.running_mean"]}, "cp")
    with pytest.raises(ValueError, match="a factor for each of 2 level"):
        MuMoE.from_published({k: v for k, v in state.items() if k != "MuMoE.factors.3"}, "cp")
    with pytest.raises(ValueError, match=r"'projs.0'"):
        MuMoE.from_published({}, "cp")
    with pytest.raises(ValueError, match="must be consistent"):
        MuMoE.from_published({**state, "projs.1": state["projs.1"][:, :2]}, "cp")
    with pytest.raises(ValueError, match="a factor for each"):
        MuMoEMLP.from_published(state, "cp")
    with pytest.raises(ValueError, match="version must be one of 'v1', 'v2'"):
        MuMoE.from_published(state, "cp").to_published("v3")


def block_state() -> dict[str, Any]:
    state: dict[str, Any] = MuMoEMLP(5, 6, 4, (3, 2), "cp", 2).to_published()
    return state


def widened(state: dict[str, Any], name: str, axis: int, by: int) -> dict[str, Any]:
    """The state with one tensor larger, or smaller, along an axis."""
    value = state[name]
    size = value.shape[axis] + by
    return {**state, name: torch.cat([value, value], axis).narrow(axis, 0, size)}


@pytest.mark.parametrize(
    ("name", "axis"),
    [(f"{prefix}.factors.{k}", 0) for prefix in ("MuMoE", "MuMoE2") for k in range(3)]
    + [("MuMoE.factors.3", 0), ("projs.0", 0), ("projs.0", 1), ("projs.1", 0), ("projs.1", 1)],
)
@pytest.mark.parametrize("by", [-2, -1, 1, 2])
def test_sizes_that_do_not_fit_together_are_refused(name: str, axis: int, by: int) -> None:
    state = block_state()
    if state[name].shape[axis] + by < 1:
        return
    with pytest.raises(ValueError, match="shapes of gates and weights must be consistent"):
        MuMoEMLP.from_published(widened(state, name, axis, by), "cp")


def test_a_bias_is_in_all_weights_or_in_none() -> None:
    state = block_state()
    for name in ("MuMoE.factors.2", "MuMoE2.factors.2"):
        with pytest.raises(ValueError, match="shapes of gates and weights must be consistent"):
            MuMoEMLP.from_published(widened(state, name, 0, -1), "cp")
    without = widened(widened(state, "MuMoE.factors.2", 0, -1), "MuMoE2.factors.2", 0, -1)
    assert MuMoEMLP.from_published(without, "cp").config["bias"] is False
    assert MuMoEMLP.from_published(state, "cp").config["bias"] is True


def test_gates_that_are_no_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="must have gate matrices"):
        MuMoE.from_published({"projs.0": torch.ones(3)}, "cp")


def test_statistics_are_those_of_every_level_or_none() -> None:
    layer = MuMoE(5, 4, (3, 2), rank=2)
    layer.gate.norm.running_mean.normal_(), layer.gate.norm.num_batches_tracked.fill_(7)
    state = layer.to_published()
    read = MuMoE.from_published(state, "cp")
    for name, value in layer.gate.norm.state_dict().items():
        assert torch.equal(read.gate.norm.state_dict()[name], value)
    anew = MuMoE.from_published({k: v for k, v in state.items() if not k.startswith("bn.")}, "cp")
    assert int(anew.gate.norm.num_batches_tracked) == 0 and (anew.gate.norm.running_mean == 0).all()
    for end in (".running_var", "1.running_var", "0.running_mean", "running_mean"):
        with pytest.raises(ValueError, match=r"batch norm must have|no parameters named"):
            MuMoE.from_published({k: v for k, v in state.items() if not k.endswith(end)}, "cp")
    swapped = {**state, "bn.0.running_var": state["bn.1.running_var"], "bn.1.running_var": torch.ones(3)}
    with pytest.raises(ValueError, match=r"\(3, 2\) per level, .* got .*'running_var': \[\(2,\), \(3,\)\]"):
        MuMoE.from_published(swapped, "cp")
    with pytest.raises(ValueError, match="num_batches_tracked must be the same"):
        MuMoE.from_published({**state, "bn.1.num_batches_tracked": torch.tensor(3)}, "cp")


def test_what_the_published_layers_do_not_have_is_refused() -> None:
    block = MuMoEMLP(5, 6, 4, (3, 2), "cp", 2)
    with pytest.raises(ValueError, match="'v1' of the published layers has no block of 2 weights"):
        block.to_published("v1")
    other = MuMoEMLP(5, 6, 4, (3, 2), "cp", 3).to_published()
    mixed = {name: (other if name.startswith("MuMoE2") else block_state())[name] for name in other}
    with pytest.raises(ValueError, match=r"the same rank, got \[\(2,\), \(3,\)\]"):
        MuMoEMLP.from_published(mixed, "cp")
    edit_bias(block.down, "edit", [torch.rand(3), torch.rand(2)], 1, 2.0)
    with pytest.raises(ValueError, match=r"no bias edits: remove them first; got \['edit'\]"):
        block.to_published()


@pytest.mark.parametrize("gate_norm", ["layer", "none"])
def test_statistics_of_batch_norm_need_batch_norm(gate_norm: Any) -> None:
    state = MuMoE(5, 4, 3, rank=2).to_published()
    with pytest.raises(ValueError, match=f"must be 'batch' .* got gate_norm='{gate_norm}' for "):
        MuMoE.from_published(state, "cp", gate_norm=gate_norm)


def test_published_parameters_are_copies_of_their_dtype() -> None:
    layer = MuMoE(5, 4, 3, rank=2, gate_norm="none", dtype=torch.float64)
    state = layer.to_published()
    read = MuMoE.from_published(state, "cp", gate_norm="none")
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float64}
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = layer(x)
    for value in state.values():
        value.zero_()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(read(x), expected)


@pytest.mark.parametrize(
    "format",
    ["btt", "shared-expert", {"name": "cp", "splits": {"i": 2}}, {"name": "cp", "splits": {"n1": 2}}],
    ids=str,
)
def test_formats_that_split_modes_and_sums_were_not_published(format: Any) -> None:
    layer = MuMoE(6, 8, 4, format, (2,) * len(mt.get_format(format).bonds(1)))
    with pytest.raises(TypeError, match="must have a TensorLy container"):
        layer.to_published("v1")
    state = MuMoE(6, 8, 4, "cp", 2).to_published("v1")
    with pytest.raises((TypeError, ValueError), match=r"has no container|must not split modes"):
        MuMoE.from_published(state, format)
