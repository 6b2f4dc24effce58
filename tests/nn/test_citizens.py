"""What torch's tools, and tools made for torch, expect of a layer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import distributed, fx, nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402
from torch.optim.swa_utils import AveragedModel, update_bn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from mumoe_tensor.analysis import TopInputs, edit_bias  # noqa: E402
from mumoe_tensor.nn import ExpertGate, Experts, MuMoE, MuMoEMLP, entmax15, functional  # noqa: E402

NORMS = ["batch", "layer", "none"]
GATES = ["entmax15", "sparsemax", "softmax"]
#: Its outputs are padded, and the bias is a term.
SUM = mt.sum_of(mt.shared({"name": "kron", "splits": {"o": [2, 3]}}), "cp")
KINDS: dict[str, Callable[..., Any]] = {
    "layer": lambda **options: MuMoE(8, 5, 4, "cp", 6, **options),
    "layer of two levels": lambda **options: MuMoE(8, 5, (4, 3), "tr", (2, 2, 2, 3), **options),
    "layer without levels": lambda **options: MuMoE(8, 5, (), "cp", 6, **options),
    "block": lambda **options: MuMoEMLP(8, 6, 5, 4, "tucker", (3, 4, 4), input_norm=True, **options),
    "gated block": lambda **options: MuMoEMLP(8, 6, 5, 4, SUM, (2, 3), gated=True, **options),
    "layer of a sum": lambda **options: MuMoE(8, 5, 4, SUM, (2, 3), **options),
    "layer that makes products ahead": lambda **options: MuMoE(8, 5, 4, "tucker", (4, 24, 24), **options),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, **options: Any) -> Any:
    """A layer whose gate tells inputs apart, and whose norm has seen some."""
    torch.manual_seed(0)
    layer = KINDS[kind](**options)
    nn.init.normal_(layer.gate.weight)
    if not layer.gate.weight.is_meta:
        layer(inputs())
    return layer


def inputs(rows: int = 20) -> Any:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


def experts_of(layer: Any) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, Experts)]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# ---- parameters that are computed ------------------------------------------------------------------------


@kinds
def test_pruned_factors_train_and_count_in_evaluation(kind: str) -> None:
    layer, x = made(kind), inputs(3000)
    for experts in experts_of(layer):
        for name, _ in list(experts.named_parameters()):
            prune.l1_unstructured(experts, name, amount=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        assert all((factor == 0).any() for experts in experts_of(layer) for factor in experts.factors)
        experts_of(layer)[-1].factor_0_orig.mul_(3)
        assert not torch.allclose(layer(x), before)


@kinds
def test_parametrized_factors(kind: str) -> None:
    layer, x = made(kind).eval(), inputs(3000)
    before = layer(x)
    for experts in experts_of(layer):
        parametrizations.weight_norm(experts, "factor_0")
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer(x)
        for experts in experts_of(layer):
            experts.parametrizations.factor_0.original0.mul_(2)
        assert not torch.allclose(layer(x), before)
    layer.train()(x).sum().backward()
    for experts in experts_of(layer):
        parametrize.remove_parametrizations(experts, "factor_0")
    assert {name for name, _ in layer.named_parameters()} == {
        name for name, _ in made(kind).named_parameters()
    }


def test_experts_are_taken_only_of_weights_that_are_parameters() -> None:
    layer = made("layer")
    for part, name in ((layer.experts, "factor_0"), (layer.gate, "weight")):
        prune.l1_unstructured(part, name, amount=0.5)
        with pytest.raises(
            ValueError, match=r"or a parametrization: make it permanent first \(prune\.remove"
        ):
            layer.keep_experts(0, [1, 2])
        prune.remove(part, name)
        assert layer.keep_experts(0, [1, 2]).experts.num_experts == (2,)


# ---- batch norm ------------------------------------------------------------------------------------------


def test_update_bn_estimates_the_statistics_of_the_gate() -> None:
    model = nn.Sequential(made("layer"))
    batches = [5 + 3 * inputs(rows) for rows in (10, 20, 30)]
    averaged = AveragedModel(model)
    update_bn(batches, averaged)
    norm = averaged.module[0].gate.norm
    logits = [x @ model[0].gate.weight.T for x in batches]
    assert norm.num_batches_tracked == 3 and norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in logits]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in logits]).mean(0))


@kinds
def test_conversion_to_synchronised_batch_norm_leaves_the_gate_alone(kind: str) -> None:
    layer, x = made(kind), inputs()
    norm = layer.gate.norm
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(8), layer))
    assert isinstance(converted[0], nn.SyncBatchNorm)
    assert converted[1] is layer and layer.gate.norm is norm
    assert layer(x).isfinite().all()


def test_batch_norm_without_statistics() -> None:
    layer, x = made("layer"), inputs()
    expected = layer(x)
    torch.func.replace_all_batch_norm_modules_(layer)
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(training)(x), expected.detach())


@pytest.mark.parametrize("gate_norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool], ids=str)
def test_masks_of_bool_and_of_integers(gate_norm: str, dtype: Any) -> None:
    layer, x = made("layer", gate_norm=gate_norm), inputs(15).reshape(3, 5, 8)
    mask = torch.arange(15).reshape(3, 5) % 4 > 0
    torch.testing.assert_close(layer(x, mask=mask.to(dtype)), layer(x, mask=mask))


@pytest.mark.parametrize("gate_norm", NORMS)
@pytest.mark.parametrize("kind", ["layer", "layer without levels", "block"])
@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(5, 3, dtype=torch.bool), ValueError),
        (torch.ones(3, 1, dtype=torch.bool), ValueError),
        (torch.ones(15, dtype=torch.bool), ValueError),
        (torch.ones(3, 5, 1, dtype=torch.bool), ValueError),
        (torch.tensor(True), ValueError),
        (torch.full((3, 5), 2), ValueError),
        (-torch.ones(3, 5, dtype=torch.int64), ValueError),
        (torch.ones(3, 5), TypeError),
        (torch.ones(3, 5, dtype=torch.complex64), TypeError),
        ([[True] * 5] * 3, TypeError),
        (True, TypeError),
    ],
)
def test_other_masks_are_refused(gate_norm: str, kind: str, mask: Any, error: type[Exception]) -> None:
    layer = made(kind, gate_norm=gate_norm)
    with pytest.raises(error, match=r"a mask (of integers )?must"):
        layer(inputs(15).reshape(3, 5, 8), mask=mask)


# ---- what is no dense tensor -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning", "ignore:.*beta state:UserWarning")
@pytest.mark.parametrize(
    "made_sparse",
    [
        lambda x: torch.nested.nested_tensor([x, x[:3]]),
        lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.numpy(),
    ],
)
def test_inputs_that_are_no_dense_tensors_are_refused(made_sparse: Any) -> None:
    x = made_sparse(inputs())
    for kind in KINDS:
        with pytest.raises(TypeError, match=r"^an input must be a (dense tensor|torch.Tensor), got"):
            made(kind)(x)
    with pytest.raises(TypeError, match="an input must be a"):
        Experts(8, 5, 4, "cp", 3)(x, [torch.ones(20, 4)])
    with pytest.raises(TypeError, match="an input must be a"):
        ExpertGate(8, [4])(x)


# ---- attributes ------------------------------------------------------------------------------------------


def test_sizes_are_attributes() -> None:
    layer, block = made("layer"), made("block")
    for module in (layer, layer.experts, block):
        assert (module.in_features, module.out_features) == (8, 5)
    assert (block.hidden_features, block.up.out_features, block.down.in_features) == (6, 6, 6)
    gate = made("layer of two levels").gate
    assert (gate.in_features, gate.out_features) == (8, 7)


@kinds
def test_there_is_no_bias_or_weight_to_share(kind: str) -> None:
    layer = made(kind)
    assert layer.bias is None
    for name in ("weight", "bias"):
        with pytest.raises(TypeError, match=f"no {name} that can be a parameter or shared"):
            setattr(layer, name, nn.Parameter(torch.zeros(5, 8)))
    with pytest.raises(AttributeError, match="'size': it contains factors; to_dense"):
        layer.mixtures[0].weight.size()


# ---- offloading and sharding -----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_by_accelerate(kind: str, with_buffers: bool, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    layer, x = made(kind).eval(), inputs(200)
    if isinstance(layer, MuMoE):
        edit_bias(layer, "more", [torch.rand(n) for n in layer.experts.num_experts], 1, 2.0)
    model = nn.Sequential(nn.Linear(8, 8), layer).eval()
    device = torch.device("cpu")
    with torch.no_grad():
        expected = model(x)
        if where == "cpu":
            accelerate.cpu_offload(model, device, offload_buffers=with_buffers)
        else:
            accelerate.disk_offload(model, tmp_path, device, offload_buffers=with_buffers)
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), expected)


def drawn(sharded: Callable[[Any], Any], kind: str, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(8, 8), KINDS[kind]())
    return sharded(model)


@pytest.mark.filterwarnings("ignore:FSDP:UserWarning", "ignore:.*FSDP:FutureWarning")
@kinds
def test_fsdp_of_a_model_without_values(kind: str, one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    model = drawn(lambda model: FullyShardedDataParallel(model, device_id=cpu), kind, "meta")
    check_trains(model)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@kinds
def test_fsdp2_of_a_model_without_values(kind: str, one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (1,))
    model = drawn(lambda model: fully_shard(model, mesh=mesh), kind, "meta")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    check_trains(model)


@kinds
def test_distributed_data_parallel(kind: str, one_process: None) -> None:
    check_trains(nn.parallel.DistributedDataParallel(drawn(nn.Identity(), kind, "cpu")))


def check_trains(model: Any) -> None:
    """The first outputs are those of a fresh layer, and every parameter is trained."""
    x, losses = inputs(200), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(model(x).square().mean())
        losses[-1].backward()
        assert all((parameter.grad != 0).any() for parameter in model.parameters())
        optimizer.step()
    assert 0.01 < losses[0] < 1 and losses[1].isfinite() and losses[1] != losses[0]


def test_every_module_draws_its_own_tensors() -> None:
    for module in made("block").modules():
        if hasattr(module, "reset_parameters"):
            own = {*module._parameters, *module._buffers}
            before = {name: value.clone() for name, value in module.state_dict().items()}
            module.reset_parameters()
            changed = {name for name, value in module.state_dict().items() if not value.equal(before[name])}
            assert changed <= own


# ---- records of a call -----------------------------------------------------------------------------------


def check_record(record: Callable[..., Any], layer: Any) -> None:
    """A record is right for other batches, and for logits that take other numbers of Newton steps."""
    for x in (inputs(4), inputs(3000), 30 * inputs(50), 1e-3 * inputs(50)):
        torch.testing.assert_close(record(x), layer(x), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "gate_norm", "with_gradients"),
    [*product(KINDS, ["batch"], [False, True]), *product(["layer"], ["layer", "none"], [False])],
)
def test_jit_trace(kind: str, gate_norm: str, with_gradients: bool) -> None:
    layer = made(kind, gate_norm=gate_norm).eval()
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.set_grad_enabled(with_gradients):
        # (Tracing warns that it is deprecated, and of sizes that are compared: of features.)
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(layer, inputs(5)), file)
        file.seek(0)
        traced = torch.jit.load(file)
    check_record(traced, layer)
    for module in (traced, layer):
        module(inputs(50)).sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    for name, parameter in traced.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_jit_trace_of_equal_logits(gate: str) -> None:
    layer = ExpertGate(8, [1024], gate=gate, gate_norm="none").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, torch.zeros(2, 8))
    nn.init.normal_(layer.weight)
    x = inputs(50) * torch.logspace(-2, 2, 50)[:, None]
    torch.testing.assert_close(traced(x)[0], layer(x)[0])
    torch.testing.assert_close(traced(x)[0].sum(-1), torch.ones(50))


@pytest.mark.parametrize(
    ("kind", "with_gradients"), [*product(KINDS, [True]), ("layer that makes products ahead", False)]
)
def test_make_fx(kind: str, with_gradients: bool) -> None:
    layer = made(kind).eval()
    with torch.set_grad_enabled(with_gradients):
        graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(inputs(5))
    check_record(graph, layer)
    assert operations(graph) == {"aten"}


@kinds
def test_exported_programs_have_operations_of_torch_alone(kind: str) -> None:
    layer = made(kind).eval()
    batch = torch.export.Dim("batch", min=2, max=4000)
    program = torch.export.export(layer, (inputs(5),), dynamic_shapes=({0: batch},))
    check_record(program.module(), layer)
    assert operations(program.graph_module) == {"aten"}


def test_records_of_many_experts_have_operations_of_torch_alone() -> None:
    layer, x = MuMoE(8, 5, 1024, "cp", 6, gate_norm="none").eval(), inputs(5)
    for graph in (make_fx(layer)(x), torch.export.export(layer, (x,)).graph_module):
        assert operations(graph) == {"aten"}


def operations(graph: Any) -> set[str]:
    """Namespaces of the operations of a graph."""
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}


def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    for kind in ("layer of two levels", "gated block", "layer that makes products ahead"):
        layer = made(kind).eval()
        batch = torch.export.Dim("batch", min=2, max=4000)
        program = torch.onnx.export(
            layer, (inputs(5),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
        onnx.checker.check_model(program.model_proto)
        evaluator = onnx.reference.ReferenceEvaluator(program.model_proto)
        (y,) = evaluator.run(None, {program.model_proto.graph.input[0].name: inputs(50).numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(inputs(50)).detach(), rtol=1e-4, atol=2e-6)


@kinds
def test_symbolic_trace_takes_the_layers_as_leaves(kind: str) -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (MuMoE, MuMoEMLP)) or super().is_leaf_module(module, name)

    model = nn.Sequential(nn.Linear(8, 8), made(kind)).eval()
    graph = fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(graph(inputs()), model(inputs()))
    with pytest.raises(TypeError, match=r"got Proxy; a torch\.fx Tracer must treat the layers as leaves"):
        fx.symbolic_trace(model)


@pytest.mark.parametrize("gate", ["entmax15", "softmax"])
def test_compiled_gradients(gate: str) -> None:
    layer, x = made("layer", gate=gate), inputs()
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer.eval()
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(parameters, x), torch.func.grad(loss)(parameters, x))


# ---- adapters --------------------------------------------------------------------------------------------


def test_adapters_of_peft_on_factors(transformers: Any) -> None:
    peft = pytest.importorskip("peft")
    for kind in KINDS:
        layer, x = made(kind), inputs()
        model = nn.Sequential(nn.Linear(8, 8), layer)
        names = [name for name, p in model.named_parameters() if "factor_" in name and p.ndim in (2, 3)]
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_parameters=names, target_modules=[])
        ).eval()
        torch.testing.assert_close(adapted(x), model.eval()(x))
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert trained
        adapted(x).sum().backward()
        assert all(p.grad is not None for p in trained)


# ---- devices without float64 -----------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As on Apple's MPS: nothing has a result in float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"this device has no float64 ({function})")
        return result


@contextmanager
def no_float64() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, NoFloat64():
        patch.setattr(functional, "_HAS_FLOAT64", {})
        patch.setattr(functional, "is_eager_on_cpu", lambda x: False)  # the device is not the CPU
        yield


@pytest.mark.parametrize("gate", GATES)
@kinds
def test_layers_without_float64(kind: str, gate: str) -> None:
    expected, layer = (made(kind, gate=gate) for _ in range(2))
    y = expected(inputs())
    y.sum().backward()
    with no_float64():
        torch.testing.assert_close(layer(inputs()), y)
        layer(inputs()).sum().backward()
        with torch.no_grad():
            layer.eval()(inputs(3000))
    for one, other in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [2, 256, 4096])
def test_entmax15_is_as_exact_without_float64(n: int) -> None:
    rows = torch.randn(8, n) * torch.logspace(-6, 6, 8)[:, None]
    cloud = 1 + 1e-6 * torch.rand(1, n)
    cloud[0, 0] = 2.5
    rows = torch.cat([rows, rows + 1e4, cloud, torch.ones(1, n)])
    exact = mt.entmax15(rows.double())
    with no_float64():
        near = entmax15(rows)
        assert functional._HAS_FLOAT64 == {"cpu": False}
    assert (near - exact).abs().max() <= 3e-7


def test_fits_top_inputs_and_edits_without_float64() -> None:
    linear, x = nn.Linear(8, 5), inputs()
    with no_float64():
        layer = MuMoE.from_linear(linear, 4, rank=5, gate_norm="layer")
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
        top = TopInputs(4, 3)
        for _ in range(2):
            top.update(layer.gate(x)[0])
        assert top.rows == 40 and (top.indices >= 0).all()
        layer.experts.add_edit("more", [torch.rand(4)], torch.ones(5))
        assert ((layer(x) - linear(x)) > 1e-3).all()
