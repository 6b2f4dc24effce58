"""The kernels of GPUs: interpreted on a CPU, compiled for a GPU, and what an eager call launches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty_rows import nasty

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402

from benchmarks.devices import launches  # noqa: E402
from mumoe_tensor import gates  # noqa: E402
from mumoe_tensor.nn import ExpertGate, MuMoE, MuMoEMLP, entmax15, functional, kernels  # noqa: E402
from mumoe_tensor.nn.routing import ReLUTopK, TopK  # noqa: E402
from mumoe_tensor.nn.sparse import SparseCoefficients  # noqa: E402

HERE = Path(__file__).parent
#: The MLP block of GPT-2: experts, format and rank, then the most kernels of a forward and a backward pass.
BLOCKS = {
    "one level": (256, "cp", 556, 13, 26),
    "Tensor Ring": (256, "tr", (4, 4, 149), 13, 28),
    "two levels": ((4096, 4096), "cp", 256, 18, 37),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def test_kernels_in_the_interpreter() -> None:
    # Triton reads the variable when it is imported.
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_kernels_are_compiled_for_a_gpu(tmp_path: Path) -> None:
    # Without one: all but running them. In a process of its own, as it imports Triton.
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_kernels.py")],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 8 and all(line.endswith("bytes") for line in lines)


def test_a_cpu_never_imports_triton() -> None:
    code = """
import sys, torch
from mumoe_tensor.nn import MuMoEMLP
block = MuMoEMLP(4, 8, 4, 6, "cp", 3)
block(torch.randn(5, 4)).sum().backward()
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- which tensors they take -----------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of a GPU, without values."""
    monkeypatch.setattr(kernels, "_HAS_TRITON", [True])
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.usefixtures("fake_gpu")
def test_one_place_decides() -> None:
    x = torch.empty(4, 6, device="cuda")
    assert all(kernels.serve(x.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert not kernels.serve(x.double()) and not kernels.serve(torch.empty(4, 6))
    assert launches(lambda: entmax15(x), "fake") == 1
    assert launches(lambda: entmax15(x.double()), "fake") > 5


def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HAS_TRITON", [False])
    with FakeTensorMode():
        assert not kernels.serve(torch.empty(4, 6, device="cuda"))


@pytest.mark.parametrize("k", [1, 3])
def test_experts_are_selected_without_reading_values(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", {"meta", "cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: True)
    for n in (3, 5, 64):
        rows = torch.tensor(np.stack([*nasty(n).values(), *(np.zeros((3, n), "f4"))]))
        rows[-3, n // 2], rows[-2, 1], rows[-1, :] = torch.nan, torch.inf, -torch.inf
        rows = torch.cat([rows, torch.tensor([-0.0, 0.0]).repeat(n)[:n][None]])
        for ours, exact in ((TopK(k), gates.top_k), (ReLUTopK(k, bias=False), gates.relu_top_k)):
            assert type(ours.select(rows)) is SparseCoefficients
            torch.testing.assert_close(ours(rows), exact(rows, k), equal_nan=True)


# ---- launches, and nothing that waits --------------------------------------------------------------------


def block(name: str, norm: str, device: str) -> Any:
    experts, format, rank, *_ = BLOCKS[name]
    return MuMoEMLP(768, 3072, 768, experts, format, rank, gate_norm=norm, device=device)


def on_fake_gpu(module: Any) -> Any:
    """A module of fake tensors, on a GPU."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    moved = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    held[name] = torch.nn.Parameter(moved) if held is part._parameters else moved
    return module


@pytest.mark.parametrize("norm", ["batch", "layer"])
@every_block
def test_launches_of_a_step(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # (Tensors without values; fake tensors of a GPU have no backward pass on a build for CPUs. An operation
    # that reads values raises an error.)
    monkeypatch.setattr(kernels, "DEVICES", {"meta", "cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: True)
    made, x = block(name, norm, "meta"), torch.empty(1024, 768, device="meta", requires_grad=True)
    *_, forward, backward = BLOCKS[name]
    assert launches(lambda: made(x), "meta") <= forward
    assert launches(lambda: made.eval()(x), "meta") <= forward - 2
    y, leaves = made.train()(x), (x, *made.parameters())
    gradient = torch.empty_like(y)
    step = partial(torch.autograd.grad, y, leaves, gradient, retain_graph=True)
    assert launches(step, "meta") <= backward


@pytest.mark.parametrize(("has_float64", "most"), [(True, 36), (False, 40)])
def test_launches_without_kernels(has_float64: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few logits are sorted. (Apple's MPS has no float64.)
    monkeypatch.setattr(functional, "_HAS_FLOAT64", {"meta": has_float64})
    made = block("one level", "layer", "meta")
    assert launches(lambda: made(torch.empty(8, 768, device="meta")), "meta") <= most


def test_levels_of_one_size_are_one_call_of_the_gate() -> None:
    x = torch.empty(8, 768, device="meta")
    one, two = (
        launches(partial(ExpertGate(768, sizes, gate_norm="layer", device="meta"), x), "meta")
        for sizes in ((16,), (16, 16))
    )
    assert one == two


@every_block
@pytest.mark.usefixtures("fake_gpu")
def test_launches_of_a_forward_pass_on_a_fake_gpu(name: str) -> None:
    made, x = on_fake_gpu(block(name, "batch", "cpu")).eval(), torch.empty(1024, 768, device="cuda")
    assert launches(lambda: made(x), "fake") <= BLOCKS[name][3] - 2


GATES = ["entmax15", "sparsemax", "softmax", {"name": "topk", "k": 2}]
#: Few experts, and enough that a layer may sum few of them.
LEVELS = (7, (4, 2000))


# Whoever reads a value of a GPU waits for it, and no graph can be captured. These tensors have none to read.


@pytest.mark.parametrize("gate", ["entmax15", "sparsemax"])
@pytest.mark.usefixtures("fake_gpu")
def test_a_forward_pass_reads_no_values(gate: Any) -> None:
    x = torch.empty(30, 8, device="cuda")
    for experts, norm in product(LEVELS, ("layer", "batch", "none")):
        layer = on_fake_gpu(MuMoE(8, 6, experts, "cp", 5, gate=gate, gate_norm=norm))
        # (On a build for CPUs batch norm cannot be traced in training, and some other gates not at all.)
        for is_training in (norm != "batch", False):
            assert layer.train(is_training)(x).device.type == "cuda"


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_step_reads_no_values(gate: Any, has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", {"meta", "cpu"})
    monkeypatch.setattr(kernels, "serve", lambda x: has_kernels)
    for experts, norm in product(LEVELS, ("layer", "batch", "none")):
        layer = MuMoE(8, 6, experts, "cp", 5, gate=gate, gate_norm=norm, device="meta")
        layer(torch.empty(30, 8, device="meta")).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
