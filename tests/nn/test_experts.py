"""The way of a call through the package, and what it is planned for."""

from __future__ import annotations

import copy
import pickle
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import mumoe_tensor  # noqa: E402
import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.contraction.machine import MACHINES  # noqa: E402
from mumoe_tensor.formats import Bias  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoE  # noqa: E402

PACKAGE = str(Path(mumoe_tensor.__file__).parent)


def modules_called(layer: Any, x: Any) -> list[str]:
    """Files of this package in which a function starts during a call, in order.

    Every frame that `sys.setprofile` reports as called counts, also those of comprehensions (before Python
    3.12) and each step of a generator. Calls within torch do not.
    """
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_call_takes_a_short_way(training: bool, gradients: bool) -> None:
    layer, x = MuMoE(64, 32, (8, 4), "tr").train(training), torch.randn(16, 64)
    with torch.set_grad_enabled(gradients):
        layer(x)  # what is prepared once
        files = modules_called(layer, x)
    assert len(files) <= 40
    # (The gate of each level is computed in a file of its own.)
    assert sum(one != other for one, other in pairwise(files)) <= 14
    rooms = {Path(file).stem for file in files}
    assert {"layers", "gate", "experts", "contraction", "execute"} <= rooms


@pytest.mark.parametrize(("experts", "rank", "expected"), [((), 2, "factorized"), ((), 64, "reconstructed")])
def test_a_matrix_of_parts_is_formed_where_that_is_cheaper(experts: Any, rank: int, expected: str) -> None:
    layer = Experts(144, 144, experts, "tt-matrix", rank, bias=True, dtype=torch.float64)
    assert layer.plan.terms[0].implementation == expected
    x = torch.randn(5, 144, dtype=torch.float64)
    matrix, bias = layer.expert(())
    torch.testing.assert_close(layer(x, []), x @ matrix + bias)


def test_with_experts_the_weight_is_not_formed() -> None:
    layer = Experts(144, 144, 2, "tt-matrix", (2, 64), bias=False)
    assert layer.plan.implementation == "factorized"


def test_terms_are_added_without_changing_a_parameter() -> None:
    layer = Experts(16, 16, (), "btt", 2)
    before = [p.detach().clone() for p in layer.parameters()]
    x = torch.randn(3, 16, requires_grad=True)
    for _ in range(2):
        layer(x, []).sum().backward()
    torch.testing.assert_close([p.detach() for p in layer.parameters()], before)
    torch.testing.assert_close(layer.factors[-1].grad.sum(), torch.tensor(2.0 * 3 * 16))


def test_a_first_term_that_is_a_parameter_stays_as_it_is() -> None:
    layer = Experts(16, 12, (), mumoe_tensor.sum_of(Bias(), "btt"), 2, dtype=torch.float64)
    x, bias = torch.randn(3, 16, dtype=torch.float64), layer.factors[0].detach().clone()
    matrix, row = layer.expert(())
    torch.testing.assert_close(row, bias)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(layer(x, []), x @ matrix + bias)
    torch.testing.assert_close(layer.factors[0].detach(), bias)


# ---- what the plan is for --------------------------------------------------------------------------------

#: Its order on a GPU is another than on a CPU.
LEVELS = {"experts": (8, 8, 4), "format": "cp", "rank": 64, "bias": False, "batch_hint": 32}


def cp(**options: Any) -> Experts:
    return Experts(96, 384, **LEVELS | options)


def test_experts_are_planned_for_the_device_and_dtype_they_are_on() -> None:
    layer = cp()
    assert layer.plan.machine == MACHINES["cpu"]["float32"]
    assert layer.to(torch.bfloat16).plan.machine == MACHINES["cpu"]["bfloat16"]
    assert layer.to("meta").plan.machine == MACHINES["cpu"]["bfloat16"]
    assert layer.to_empty(device="cpu").double().plan.machine == MACHINES["cpu"]["float64"]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.plan.machine == MACHINES["cpu"]["float64"]
        assert copied.float().plan == cp().plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_a_gpu_are_planned_for_it_also_where_parameters_are_replaced(dtype: Any) -> None:
    layer = cp(device="meta")
    before = layer.plan.terms[0].program
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        place = {"device": "cuda", "dtype": dtype}
        for name, factor in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(torch.empty(factor.shape, **place)))
        coefficients = [torch.empty(32, n, **place) for n in layer.num_experts]
        assert layer(torch.empty(32, 96, **place), coefficients).device.type == "cuda"
        program = layer._terms[0].policy.program
        assert layer.plan.machine == MACHINES["cuda"][str(dtype).removeprefix("torch.")]
    assert program == layer.plan.terms[0].program
    assert (program != before) == (dtype == torch.bfloat16)  # where elements are worth some hundred FLOPs


def test_a_machine_that_is_named_stays_and_changes_no_result() -> None:
    machine = mt.Machine(flops=1e12, bandwidth=1e9, dtype="bfloat16")
    layer, gpu, chosen = cp(), cp(machine="h200"), cp(machine=machine)
    assert gpu.plan.machine == MACHINES["h200"]["float32"] and chosen.plan.machine == machine
    assert gpu.plan.terms[0].program != layer.plan.terms[0].program
    z, a = torch.randn(5, 96), [torch.rand(5, n) for n in layer.num_experts]
    for other in (gpu, chosen):
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(z, a), layer(z, a), rtol=1e-4, atol=1e-5)
        assert other.config["machine"] and Experts.from_config(other.config).plan == other.plan
    assert gpu.double().plan.machine == MACHINES["h200"]["float64"]
    assert chosen.double().plan.machine == machine
    assert "machine" not in layer.config


@pytest.mark.parametrize("after", ["to", "replaced"])
def test_a_plan_for_another_dtype_is_compiled_whole(after: str) -> None:
    layer, z = cp(), torch.randn(3, 96, dtype=torch.float64)
    a = [torch.rand(3, n, dtype=torch.float64) for n in layer.num_experts]
    if after == "to":
        layer.double()
        assert (
            layer._planned.plan.machine == MACHINES["cpu"]["float64"]
        )  # before a call, which may be recorded
    else:
        for name, factor in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(factor.detach().double()))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, a), layer(z, a))
    assert layer.plan.machine == MACHINES["cpu"]["float64"]
