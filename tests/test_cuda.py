"""What a device computes is what a CPU computes in float64; layers run on it as they do on a CPU.

The device is a GPU where torch sees one, and else the CPU, so that these tests run everywhere. On a machine
with a GPU ``python -m pytest -m cuda tests/test_cuda.py`` runs them alone.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nasty_rows import nasty

import mumoe_tensor as mt
from mumoe_tensor import gates

torch = pytest.importorskip("torch")

from published import CASES, layer_of, read, state_of  # noqa: E402
from torch import distributed, nn  # noqa: E402

from benchmarks.devices import graphed, launches, precision  # noqa: E402
from mumoe_tensor.models import GPT2, GPT2Config, load_model, save_model  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP, entmax15  # noqa: E402
from mumoe_tensor.nn.kernels import serve  # noqa: E402
from mumoe_tensor.nn.kernels.coefficients import coefficients  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["cp", "tucker", "tr", "tt", "hadamard", "dense"]


def sparsemax_of_layers(logits: Any) -> Any:
    """By a kernel where there is one."""
    return coefficients(logits, power=1) if serve(logits) else gates.sparsemax(logits)


#: The gates under test, and what they are in float64.
GATES = {
    "entmax15": (entmax15, gates.entmax15),
    "entmax15 of any backend": (gates.entmax15, gates.entmax15),
    "sparsemax": (gates.sparsemax, gates.sparsemax),
    "sparsemax of layers": (sparsemax_of_layers, gates.sparsemax),
    "softmax": (gates.softmax, gates.softmax),
    "top_k": (partial(gates.top_k, k=1), partial(gates.top_k, k=1)),
}
#: Half a unit in the last place of coefficients near one, or what float32 is computed to.
ROUNDING = {"float16": 2**-12, "bfloat16": 2**-9, "float32": 3e-7, "float64": 1e-13}

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture
def device() -> Any:
    return torch.device(DEVICE)


def block_of(format: str, experts: tuple[int, ...] = (4, 3), **options: Any) -> Any:
    """A block on the CPU whose gate tells inputs apart."""
    torch.manual_seed(0)
    rank = (3,) * len(mt.get_format(format).bonds(len(experts)))
    block = MuMoEMLP(24, 40, 24, experts, format, rank, input_norm=True, **options)
    nn.init.normal_(block.gate.weight)
    return block


def results(module: Any, x: Any) -> dict[str, Any]:
    """Outputs, coefficients and all gradients of a module."""
    x = x.detach().clone().requires_grad_()
    y, coefficients = module(x, return_coefficients=True)
    y.square().sum().backward()
    of_parameters = {name: p.grad for name, p in module.named_parameters()}
    return {"output": y, **dict(enumerate(coefficients)), "gradient of the input": x.grad, **of_parameters}


def assert_equal(actual: dict[str, Any], expected: dict[str, Any], device: Any, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.device.type == device.type, name
        exact = expected[name].detach().double().cpu()
        error = (value.detach().double().cpu() - exact).abs().max()
        assert error <= tolerance * exact.abs().max(), name


# ------------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_nasty_rows(gate: str, dtype: str, device: Any) -> None:
    function, exactly = GATES[gate]
    for n in (1, 2, 17, 256, 4096, *([2**16] if DEVICE == "cuda" else [])):
        rows = torch.tensor(np.stack(list(nasty(n).values()))).to(getattr(torch, dtype))
        p = function(rows.to(device))
        assert (p.device.type, p.dtype, p.shape) == (device.type, rows.dtype, rows.shape)
        close = dict(atol=1.01 * ROUNDING[dtype], rtol=0, equal_nan=True)
        torch.testing.assert_close(p.double().cpu(), exactly(rows.double()), **close)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_gates(gate: str, device: Any) -> None:
    function, exactly = GATES[gate]
    torch.manual_seed(0)
    gradient = torch.randn(20, 300)
    actual = []
    for call, where, dtype in ((function, device, torch.float32), (exactly, "cpu", torch.float64)):
        torch.manual_seed(1)
        logits = (torch.randn(20, 300) * torch.logspace(-2, 1, 20)[:, None]).to(where, dtype)
        call(logits.requires_grad_()).backward(gradient.to(where, dtype))
        actual.append(logits.grad.double().cpu())
    torch.testing.assert_close(*actual, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_harms_no_other(gate: str, bad: float, device: Any) -> None:
    rows = torch.tensor(nasty(64)["normal"]).repeat(3, 1)
    rows[1, slice(None) if bad == -np.inf else slice(5, 6)] = bad
    p = GATES[gate][0](rows.to(device)).cpu()
    assert p[1].isnan().all()
    torch.testing.assert_close(p[::2], GATES[gate][0](rows[::2]), atol=3e-7, rtol=0)


@given(shape=st.tuples(st.integers(0, 5), st.integers(1, 70)), seed=st.integers(0, 2**32 - 1))
def test_entmax15_of_any_shape(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3), dtype=torch.float32)
    p = entmax15(logits.to(DEVICE)).double().cpu()
    torch.testing.assert_close(p, gates.entmax15(logits.double()), atol=3e-7, rtol=0)


# ----------------------------------------------------------------------------------------------- layers


@every_format
@pytest.mark.parametrize(
    ("experts", "options"),
    [
        ((4, 3), {}),
        ((7,), {"gate_norm": "layer"}),
        ((2, 3, 2), {"gate_norm": "none", "bias": False, "recompute": True}),
    ],
    ids=["two levels", "layer norm", "three levels"],
)
def test_layers_and_gradients(
    format: str, experts: tuple[int, ...], options: dict[str, Any], device: Any
) -> None:
    block, x = block_of(format, experts, **options), torch.randn(3, 11, 24)
    exact = copy.deepcopy(block).double()
    actual = results(block.to(device), x.to(device))
    assert_equal(actual, results(exact, x.double()), device, 2e-5)
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(
            block.state_dict()[name].cpu().to(value.dtype), value, atol=1e-5, rtol=1e-5
        )


@every_format
def test_inference(format: str, device: Any) -> None:
    # Enough rows that products of weights alone may be made ahead, and weights that change in between.
    block, x = block_of(format).eval(), torch.randn(2000, 24)
    exact = copy.deepcopy(block).double()
    block.to(device)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                block(x.to(device)).double().cpu(), exact(x.double()), atol=1e-5, rtol=1e-4
            )
            for module in (block, exact):
                module.up.factors[0].mul_(2)


def test_few_of_many_experts(device: Any) -> None:
    layer, x = MuMoE(24, 8, 1200, "cp", 5, gate_norm="layer"), torch.randn(40, 24)
    nn.init.normal_(layer.gate.weight)
    exact = results(copy.deepcopy(layer).double(), x.double())
    assert (exact[0] > 0).double().mean() < 0.08
    assert_equal(results(layer.to(device), x.to(device)), exact, device, 2e-5)


def test_a_masked_batch(device: Any) -> None:
    block, x, mask = block_of("tr"), torch.randn(5, 9, 24), torch.arange(45).reshape(5, 9) % 4 > 0
    exact = copy.deepcopy(block).double()
    block.to(device)
    y = block(x.to(device), mask=mask.to(device))
    torch.testing.assert_close(
        y[mask.to(device)].double().cpu(), exact(x.double(), mask=mask)[mask], atol=1e-5, rtol=1e-4
    )


@every_format
def test_single_experts(format: str, device: Any) -> None:
    block = block_of(format)
    matrix, bias = block.up.expert((3, 1))
    for actual, expected in zip(block.to(device).up.expert((3, 1)), (matrix, bias), strict=True):
        assert actual.device.type == device.type
        torch.testing.assert_close(actual.cpu(), expected)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(format: str, dtype: Any, device: Any) -> None:
    block = block_of(format).to(device)
    seen: list[Any] = []
    block.gate.gate = lambda logits: seen.append(logits.dtype) or torch.softmax(logits, -1)
    x = torch.randn(16, 24, device=device)
    exact = block(x)
    with torch.autocast(device.type, dtype=dtype):
        y = block(x)
    assert y.dtype == dtype and set(seen) == {torch.float32}
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-5), ("TF32", 5e-3), ("bfloat16", 5e-2)])
def test_precision_of_products(name: str, tolerance: float, device: Any) -> None:
    block, x = block_of("cp", gate_norm="layer"), torch.randn(64, 24)
    exact = copy.deepcopy(block).double()(x.double())
    before = torch.get_float32_matmul_precision()
    with precision(name) as dtype:
        y = block.to(device, dtype)(x.to(device, dtype))
    assert (y.double().cpu() - exact).abs().max() < tolerance * exact.abs().max()
    assert torch.get_float32_matmul_precision() == before


@every_format
def test_the_functional_core(format: str, device: Any) -> None:
    sizes = dict(experts=(4, 3), in_features=9, out_features=5, bias=True)
    rank = (3,) * len(mt.get_format(format).bonds(2))
    z, *coefficients = (torch.rand(6, n, dtype=torch.float64) for n in (9, 4, 3))
    weight = mt.FactorizedTensor.random(format, **sizes, rank=rank, like=z, seed=0)
    on_device = mt.FactorizedTensor(format, [f.to(device) for f in weight.arrays])
    y = mt.multilinear_moe(on_device, z.to(device), [a.to(device) for a in coefficients], bias=True)
    assert y.device.type == device.type
    torch.testing.assert_close(y.cpu(), mt.multilinear_moe(weight, z, coefficients, bias=True))


# ----------------------------------------------------------------------------------- graphs and waiting


@every_format
@pytest.mark.parametrize("trained", [True, False], ids=["step", "inference"])
def test_captured_as_a_graph(format: str, trained: bool, device: Any) -> None:
    block = block_of(format, gate_norm="layer").to(device).train(trained)
    x = torch.randn(64, 24, device=device)
    outputs: dict[str, Any] = {}

    def call() -> None:
        block.zero_grad()
        with torch.set_grad_enabled(trained):
            y = block(x)
        # (Not `y`: with it the graph of one stream would live on into the next.)
        outputs["y"] = y.detach()
        if trained:
            y.square().sum().backward()

    replay = graphed(call, device.type)
    # Other inputs and weights in the same memory.
    with torch.no_grad():
        x.normal_()
        block.down.factors[0].mul_(1.5)
    replay()
    actual = [outputs["y"], *(p.grad for p in block.parameters() if trained)]
    actual = [value.clone() for value in actual]
    call()
    expected = [outputs["y"], *(p.grad for p in block.parameters() if trained)]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_launches_are_counted(device: Any) -> None:
    x = torch.randn(8, 8, device=device)
    assert launches(lambda: (x + 1).t().relu(), device.type) == 2


@contextmanager
def no_waiting(device: Any) -> Iterator[None]:
    """An error where the processor waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_format
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_nothing_waits_for_the_device(format: str, norm: str, device: Any) -> None:
    block = block_of(format, gate_norm=norm).to(device)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = torch.randn(2000, 24, device=device)
    before = block.up.factors[0].clone()
    with no_waiting(device):
        block(x).square().mean().backward()
        optimizer.step()
        block.eval()
        with torch.no_grad():
            y = block(x)
    assert y.isfinite().all()
    assert not torch.equal(block.up.factors[0], before)


# ------------------------------------------------------------------------------ models, files, processes


def gpt2_of(format: str) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocabulary=50, context=16, width=24, depth=2, heads=2, hidden=40)
    return GPT2(GPT2Config(**sizes, format=format, experts=(4,)))


@pytest.mark.parametrize("format", ["mlp", "cp", "tr"])
def test_a_model(format: str, device: Any) -> None:
    model, tokens = gpt2_of(format), torch.randint(50, (3, 16))
    exact = copy.deepcopy(model).double()(tokens)
    model.to(device)
    on_device = tokens.to(device)
    with no_waiting(device):
        logits = model(on_device)
        nn.functional.cross_entropy(logits.flatten(0, 1), on_device.flatten()).backward()
    torch.testing.assert_close(logits.double().cpu(), exact, atol=1e-5, rtol=1e-4)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.generate(on_device, 2, temperature=0).shape == (3, 18)


def test_a_model_asks_a_device_for_no_value() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        model = gpt2_of("cp")
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(value.shape, device="cuda"))
        tokens = torch.empty(3, 16, dtype=torch.int64, device="cuda")
        assert model(tokens).device.type == "cuda"


@pytest.mark.parametrize("path", CASES[::3], ids=lambda path: path.stem)
def test_published_layers(path: Path, device: Any) -> None:
    settings, tensors = read(path)
    layer = layer_of(settings, state_of(tensors)).eval().to(device)
    y = layer(tensors["x"].to(device))
    recorded = tensors["y"].reshape(y.shape)
    torch.testing.assert_close(y.cpu(), recorded, rtol=1e-4, atol=1e-5)
    y.backward(tensors["grad_y"].reshape(y.shape).to(device))
    for parameter in layer.parameters():
        parameter.data = parameter.grad
    gradients = layer.to_published(settings["version"])
    for name, gradient in gradients.items():
        if not name.startswith("bn."):
            torch.testing.assert_close(gradient.cpu(), tensors[f"grad.{name}"], rtol=1e-4, atol=1e-5)


@every_format
def test_states_go_from_device_to_device(format: str, device: Any) -> None:
    block = block_of(format).to(device).eval()
    x = torch.randn(5, 24)
    expected = block(x.to(device)).cpu()
    for start, end in ((device, "cpu"), ("cpu", device)):
        file = io.BytesIO()
        torch.save(block.to(start).state_dict(), file)
        file.seek(0)
        made = MuMoEMLP.from_config(block.config, device=end).eval()
        made.load_state_dict(torch.load(file, map_location=end, weights_only=True))
        torch.testing.assert_close(made(x.to(end)).cpu(), expected, atol=1e-5, rtol=1e-4)


def test_models_go_from_device_to_device(tmp_path: Path, device: Any) -> None:
    pytest.importorskip("safetensors")
    model, tokens = gpt2_of("tr").to(device).eval(), torch.randint(50, (3, 16))
    save_model(model, tmp_path / "model.safetensors")
    expected = model(tokens.to(device)).cpu()
    for end in (device, torch.device("cpu")):
        loaded = load_model(tmp_path / "model.safetensors", end)
        assert {p.device.type for p in loaded.parameters()} == {end.type}
        torch.testing.assert_close(loaded(tokens.to(end)).cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
def test_fsdp2_on_one_process(tmp_path: Path, device: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    alone = block_of("tr").to(device)
    sharded, x = copy.deepcopy(alone), torch.randn(16, 24, device=device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        for child in (sharded.gate, sharded.up, sharded.down, sharded):
            fully_shard(child)
        for module in (alone, sharded):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
        state = sharded.state_dict()
        for name, value in alone.state_dict().items():
            actual = state[name]
            actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
            torch.testing.assert_close(actual, value, atol=1e-5, rtol=1e-4)
    finally:
        distributed.destroy_process_group()


# Last, because a compiler takes longer than all of the above. On a CPU other tests compile the other formats.
@pytest.mark.parametrize("format", ["cp", "tr"] if DEVICE == "cuda" else ["cp"])
def test_compiled_once_for_all_batch_sizes(format: str, device: Any) -> None:
    block = block_of(format).to(device)
    eager = copy.deepcopy(block)
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "eager"  # for CPUs see `test_torch`
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 17, 2, 64):
            x = torch.randn(batch, 3, 24, device=device)
            outputs, gradients = [], []
            for call, module in ((compiled, block), (eager, eager)):
                module.zero_grad()
                outputs.append(call(x))
                outputs[-1].square().sum().backward()
                gradients.append([p.grad for p in module.parameters()])
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
