"""The layers under what torch offers: compile, export, func, autocast, dtypes, devices, checkpoints."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP  # noqa: E402

SUM = mt.sum_of(mt.shared("lowrank"), {"name": "btt", "splits": {"o": [3, 5]}})
FORMATS = ["cp", "tucker", "tr", "tt", "hadamard", SUM]
#: Those of gated blocks.
GATED = ["tt", SUM]


def block_of(format: Any, experts: tuple[int, ...] = (4, 3), **options: Any) -> Any:
    torch.manual_seed(0)
    rank, gated = (3,) * len(mt.get_format(format).bonds(len(experts))), format in GATED
    block = MuMoEMLP(8, 12, 8, experts, format, rank, gated=gated, input_norm=True, **options)
    with torch.no_grad():
        block.gate.weight.normal_()
    return block


@pytest.mark.parametrize(("format", "norm"), [(SUM, "batch"), ("cp", "layer")])
def test_compile_in_one_graph_for_all_batch_sizes(format: Any, norm: str) -> None:
    block = block_of(format, gate_norm=norm)
    eager = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 17, 2):
            x = torch.randn(batch, 3, 8)
            outputs, gradients = [], []
            for call, module in ((compiled, block), (eager, eager)):
                module.zero_grad()
                outputs.append(call(x))
                outputs[-1].square().sum().backward()
                gradients.append([p.grad for p in module.parameters()])
            torch.testing.assert_close(*outputs)
            # (Eager entmax15 sorts so few logits, and compiled takes Newton steps: both are exact to rounding
            # errors, which batch norm of two rows makes larger.)
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, eager.state_dict()[name])


def test_compile_with_inductor() -> None:
    layer = MuMoE(8, 5, 4, rank=3, gate_norm="layer")
    x = torch.randn(10, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("format", FORMATS)
def test_torch_func(format: Any) -> None:
    block = block_of(format).eval().double()
    state = dict(block.state_dict())
    x = torch.randn(5, 8, dtype=torch.float64)

    def call(parameters: Any, z: Any) -> Any:
        return torch.func.functional_call(block, parameters, z)

    torch.testing.assert_close(torch.func.vmap(lambda z: call(state, z))(x), block(x))
    jacobian = torch.func.jacrev(lambda z: call(state, z))(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(block, x[0]))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, z: call({**state, **p}, z).sum()), in_dims=(None, 0)
    )(dict(block.named_parameters()), x)
    block(x).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_gate_in_float32(format: Any, dtype: Any) -> None:
    block = block_of(format)
    seen: list[Any] = []
    block.gate.gate = lambda logits: seen.append(logits.dtype) or torch.softmax(logits, -1)
    x = torch.randn(16, 8)
    exact = block(x)
    with torch.autocast("cpu", dtype=dtype):
        y = block(x)
    assert y.dtype == dtype and set(seen) == {torch.float32}
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


def test_autocast_leaves_float64_as_it_is() -> None:
    layer, x = MuMoE(8, 6, 4, "cp", 3, dtype=torch.float64).eval(), torch.randn(5, 8, dtype=torch.float64)
    nn.init.normal_(layer.gate.weight)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(format: Any, dtype: Any) -> None:
    block = block_of(format).to(dtype)
    y, coefficients = block(torch.randn(16, 8, dtype=dtype), return_coefficients=True)
    assert {y.dtype, *(a.dtype for a in coefficients)} == {dtype}
    assert block.gate.norm.running_mean.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_meta_and_back(format: Any) -> None:
    block = MuMoEMLP(8, 12, 8, 4, format, rank_for(format), device="meta", dtype=torch.float64)
    assert {p.device.type for p in block.parameters()} == {"meta"}
    assert block(torch.empty(3, 8, device="meta", dtype=torch.float64)).device.type == "meta"
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y = block(torch.randn(64, 8, dtype=torch.float64))
    assert y.isfinite().all() and 0 < y.var() < 1


def rank_for(format: Any) -> tuple[int, ...]:
    return (3,) * len(mt.get_format(format).bonds(1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_nothing_is_made_on_the_wrong_device(format: Any, norm: str) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        block = MuMoEMLP(8, 12, 8, 4, format, rank_for(format), gate_norm=norm, input_norm=True)
        for module in block.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        moved = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        held[name] = nn.Parameter(moved) if held is module._parameters else moved
        x = torch.empty(5, 3, 8, device="cuda")
        mask = torch.empty(5, 3, dtype=torch.bool, device="cuda")
        # (torch's own batch norm cannot be traced in training on a build without CUDA.)
        for training in (norm == "layer", False):
            y, coefficients = block.train(training)(x, return_coefficients=True)
            assert {y.device.type, *(a.device.type for a in coefficients)} == {"cuda"}
        assert block.eval()(x, mask=mask).device.type == "cuda"
        matrix, bias = block.up.expert(0)
        assert (matrix.device.type, bias.device.type) == ("cuda", "cuda")


def test_copies_and_files(tmp_path: Any) -> None:
    block = block_of("tr")
    x = torch.randn(6, 8)
    block(x)
    block.eval()
    again = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    config = json.loads(json.dumps(block.config))
    for state in (torch.load(file, weights_only=True), through_safetensors(block.state_dict(), tmp_path)):
        made = MuMoEMLP.from_config(config).eval()
        made.load_state_dict(state)
        again.append(made)
    for other in again:
        assert torch.equal(other(x), block(x))
    assert all(p.is_contiguous() for p in block.parameters())


def through_safetensors(state: Any, folder: Any) -> Any:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, folder / "state.safetensors")
    return safetensors.load_file(folder / "state.safetensors")


def test_a_state_of_another_config_is_refused_before_any_weight_is_touched() -> None:
    block, other = block_of("cp", (4,)), block_of("cp", (5,))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(ValueError, match=r"up.factor_0 has shape \(5, 3\) and should have \(4, 3\)"):
        block.load_state_dict(other.state_dict())
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_a_state_of_an_earlier_version_loads() -> None:
    from mumoe_tensor.training.checkpoint import Snapshot, restore, snapshot

    def model() -> nn.Module:
        return nn.Sequential(MuMoE(7, 8, 4, rank=3), block_of("tr", (4, 3)), Experts(8, 5, 4, "cp", 3)).eval()

    def run(made: nn.Module) -> torch.Tensor:
        layer, block, experts = made
        return experts(block(layer(x)), [coefficients])

    def optimizer_of(made: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(made.parameters())
        run(made).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def earlier(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("factor_", "factors."): value.clone() for name, value in state.items()}

    x, coefficients = torch.randn(5, 7), torch.rand(5, 4)
    written, read = model(), model()
    state = snapshot(written, optimizer := optimizer_of(written))
    assert sum("factors." in name for name in earlier(written.state_dict())) == 3 + 2 * 4 + 3
    read.load_state_dict(earlier(written.state_dict()))
    torch.testing.assert_close(run(read), run(written))
    for whole, made in zip(written, model(), strict=True):
        made.load_state_dict(earlier(whole.state_dict()))
    restore(read, other := optimizer_of(read), Snapshot(earlier(state.model), earlier(state.optimizer)))
    for made, its in ((written, optimizer), (read, other)):
        run(made).sum().backward()
        its.step()
    torch.testing.assert_close(read.state_dict(), written.state_dict())


def test_no_tensor_is_kept_between_calls() -> None:
    block = block_of("tucker")
    kept = {id(v) for v in block.state_dict(keep_vars=True).values()}
    block(torch.randn(6, 8)).sum().backward()
    for module in block.modules():
        held = [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
        assert not held
    assert {id(v) for v in block.state_dict(keep_vars=True).values()} == kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_advances_the_statistics_once(masked: bool, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    plain, checkpointed = block_of("cp"), block_of("cp")
    x = torch.randn(6, 8, requires_grad=True)
    mask = torch.arange(6) > 1 if masked else None
    y = plain(x, mask=mask)
    z = checkpoint(lambda v: checkpointed(v, mask=mask), x, use_reentrant=reentrant)
    y.sum().backward()
    z.sum().backward()
    torch.testing.assert_close(y, z)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value)
    assert int(checkpointed.gate.norm.num_batches_tracked) == 1


def test_layers_in_a_model_of_someone_else() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), MuMoE(8, 5, 4, rank=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(7, 6)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_factors_that_are_pruned_or_parametrized() -> None:
    from torch.nn.utils import parametrize, prune

    torch.manual_seed(0)
    layer, x = MuMoE(7, 8, 8, "cp", 4, gate_norm="none"), torch.randn(5, 7)
    nn.init.normal_(layer.gate.weight)
    expected = layer(x)
    prune.l1_unstructured(layer.experts, "factor_0", amount=0.0)
    torch.testing.assert_close(layer(x), expected)
    parametrize.register_parametrization(layer.experts, "factor_2", nn.Identity())
    torch.testing.assert_close(layer(x), expected)


def test_conversion_to_synchronised_batch_norm_leaves_the_gate_alone() -> None:
    layer, x = MuMoE(7, 8, 8, "cp", 4).eval(), torch.randn(5, 7)
    expected = layer(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(layer)(x), expected)


def test_outputs_may_be_changed_in_place() -> None:
    for format in ("dense", "cp"):
        layer, x = MuMoE(7, 8, 4, format, rank_for(format), gate_norm="none"), torch.randn(5, 7)
        expected, actual = (
            torch.autograd.grad(relu(layer(x)).sum(), list(layer.parameters()))
            for relu in (nn.functional.relu, nn.functional.relu_)
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("features", "rank"), [(7, 3), (256, 300)])
def test_batches_of_gradients(features: int, rank: int) -> None:
    # Of few entries, and of as many as are written into one array.
    torch.manual_seed(0)
    block = MuMoEMLP(features, 8, 3, 4, "cp", rank, gate_norm="layer", dtype=torch.float64)
    nn.init.normal_(block.gate.weight)
    x = torch.randn(2, features, dtype=torch.float64)
    one_by_one, at_once = (torch.autograd.functional.jacobian(block, x, vectorize=v) for v in (False, True))
    torch.testing.assert_close(one_by_one, at_once)


def test_dropout_that_stays_on_in_evaluation() -> None:
    block = MuMoEMLP(8, 8, 8, 4, "cp", 3, dropout=0.5).eval()
    assert not (block(torch.ones(4, 8)) == 0).any()
    block.dropout.train()
    assert (block(torch.ones(4, 8)) == 0).any()
