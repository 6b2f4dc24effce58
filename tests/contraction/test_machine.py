"""Machines: what they weigh, and the times that are predicted for them."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.contraction.machine import ITEMSIZE, MACHINES, as_machine, machine_of
from mumoe_tensor.testing.strategies import specs

BATCHES = st.sampled_from([1, 7, 64, 1024])
RATES = st.floats(1e9, 1e15)
MACHINE = st.builds(
    mt.Machine,
    flops=RATES,
    bandwidth=RATES,
    launch=st.sampled_from([0.0, 4e-6]),
    dtype=st.sampled_from([*ITEMSIZE]),
)


@given(specs(most=40), BATCHES, MACHINE)
def test_a_plan_takes_no_less_than_its_flops_and_its_moves(spec, batch, machine) -> None:
    plan = mt.plan(spec, batch=batch, machine=machine)
    products = [step for step in plan.steps if step.kind != "mul"]
    launches = machine.launch * len(plan.steps)
    assert plan.seconds >= (sum(step.flops for step in products) / machine.flops + launches) * (1 - 1e-9)
    elements = sum(step.read + step.write for step in plan.steps)
    assert plan.seconds >= (elements * ITEMSIZE[machine.dtype] / machine.bandwidth + launches) * (1 - 1e-9)


@given(specs(most=40), MACHINE)
def test_more_inputs_take_no_less_time(spec, machine) -> None:
    plan = mt.plan(spec, batch=64, machine=machine)
    of_terms = [replace(term, batch=batch).seconds for term in plan.terms for batch in (1, 2, 64, 1000)]
    for k in range(0, len(of_terms), 4):
        assert of_terms[k : k + 4] == sorted(of_terms[k : k + 4])


@given(specs(most=40), BATCHES, st.sampled_from([(1, 16), (16, 64), (16, 340), (64, 5000)]))
def test_where_moves_are_dearer_a_plan_does_not_move_more(spec, batch, elements) -> None:
    cheap, dear = (
        mt.plan(spec, batch=batch, machine=mt.Machine(1e12, 1e12, element=element)) for element in elements
    )
    for one, other in zip(cheap.terms, dear.terms, strict=True):
        moved, fewer = (sum(step.moved for step in term.steps) for term in (one, other))
        # Each is the best by its weight among the same orders, but for elements that all orders move.
        if one.flops == other.flops:
            assert fewer <= moved
        assert replace(other, machine=cheap.machine).time >= one.time or one.flops > other.flops


@given(specs(most=40), BATCHES)
def test_a_machine_changes_no_result_but_its_order(spec, batch) -> None:
    fewest = mt.plan(spec, batch=batch, minimize="flops").flops
    for name in MACHINES:
        assert mt.plan(spec, batch=batch, machine=name).flops <= 1.05 * fewest + 1


def test_names_stand_for_a_machine_of_each_dtype() -> None:
    sizes = dict(experts=4, in_features=6, out_features=5, rank=3)
    for name, of_dtype in MACHINES.items():
        assert of_dtype.keys() == ITEMSIZE.keys()
        for dtype, machine in of_dtype.items():
            assert machine.dtype == dtype
            for given_ in (name, machine, asdict(machine)):
                assert mt.plan("cp", **sizes, machine=given_, dtype=dtype).machine == machine
                assert mt.cost("cp", **sizes, machine=given_, dtype=dtype).plans[0].machine == machine
        assert mt.plan("cp", **sizes, machine=name).machine == of_dtype["float32"]
    assert mt.plan("cp", **sizes) == mt.plan("cp", **sizes, machine="cpu")


def test_an_element_is_worth_the_flops_of_its_bytes() -> None:
    assert mt.Machine(flops=800e12, bandwidth=4e12, dtype="bfloat16").element == 400
    assert mt.Machine(flops=1.0, bandwidth=1e6).element == 1
    assert mt.Machine(flops=800e12, bandwidth=4e12, element=7).element == 7


def test_devices_are_planned_for_by_their_kind() -> None:
    assert machine_of("cpu", "float64") == machine_of("meta", "float64") == MACHINES["cpu"]["float64"]
    for kind in ("cuda", "mps", "xpu"):
        assert machine_of(kind, "bfloat16") == MACHINES["cuda"]["bfloat16"]
    assert machine_of("cuda", "complex64") == MACHINES["cuda"]["float32"]
    assert machine_of("cpu", "float16", "h200") == MACHINES["h200"]["float16"]
    chosen = mt.Machine(1e12, 1e12, dtype="bfloat16")
    assert machine_of("cpu", "float32", chosen) == chosen


@pytest.mark.parametrize(
    ("machine", "dtype", "message"),
    [
        ("gpu", None, "machine must be one of 'cpu', 'cuda', 'h200', got 'gpu'"),
        ("cpu", "int8", "dtype must be one of"),
        (mt.Machine(1e12, 1e12), "bfloat16", "must be that of the machine, 'float32', got 'bfloat16'"),
        (3, None, "a machine must be a name, a Machine or its attributes, got 3"),
        ({"flops": 1e12}, None, "must have flops and bandwidth, and may have .*, got {'flops'"),
        ({"flops": 1e12, "bandwidth": 1e12, "speed": 1}, None, "must have flops and bandwidth"),
        ({"flops": 0, "bandwidth": 1e12}, None, "flops of a machine must be positive, got 0"),
        ({"flops": 1e12, "bandwidth": -1}, None, "bandwidth of a machine must be positive, got -1"),
        ({"flops": inf, "bandwidth": 1e12}, None, "flops of a machine must be finite"),
        ({"flops": 1e12, "bandwidth": nan}, None, "bandwidth of a machine must be finite"),
        ({"flops": "fast", "bandwidth": 1e12}, None, "flops of a machine must be a number"),
        ({"flops": 1e12, "bandwidth": 1e12, "launch": -1e-6}, None, "launch of a machine must be at least 0"),
        ({"flops": 1e12, "bandwidth": 1e12, "element": 1.5}, None, "element of a machine must be an integer"),
        ({"flops": 1e12, "bandwidth": 1e12, "element": -1}, None, "element of a machine must be at least 0"),
        ({"flops": 1e12, "bandwidth": 1e12, "gate_passes": -1}, None, "gate_passes of a machine must be at"),
        ({"flops": 1e12, "bandwidth": 1e12, "dtype": "int8"}, None, "dtype of a machine must be one of"),
    ],
)
def test_bad_machines_are_refused(machine: Any, dtype: str | None, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        as_machine(machine, dtype)
    with pytest.raises((ValueError, TypeError), match=message):
        mt.plan("cp", experts=4, in_features=6, out_features=5, rank=3, machine=machine, dtype=dtype)


def test_the_gate_and_the_activation_of_a_block_take_time() -> None:
    block = mt.LayerSpec("cp", experts=64, in_features=32, hidden=64, out_features=32, rank=8)
    machine = mt.Machine(1e12, 1e10, launch=1e-6, gate_passes=3)
    bare, gated = (mt.cost(block, batch=256, machine=machine, gate=gate) for gate in (False, True))
    layers = sum(plan.seconds for plan in bare.plans)
    assert bare.seconds == pytest.approx(layers + machine.seconds(0, 2 * 256 * 64))
    product = machine.seconds(2 * 256 * 32 * 64, 256 * 32 + 32 * 64 + 256 * 64)
    assert gated.seconds == pytest.approx(bare.seconds + product + 3 * machine.seconds(0, 2 * 256 * 64))
    swiglu = mt.cost(replace(block, gated=True), batch=256, machine=machine)
    assert swiglu.seconds == pytest.approx(1.5 * layers + machine.seconds(0, 5 * 256 * 64), rel=0.2)
