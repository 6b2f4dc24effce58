"""The way of a call through the package."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import mumoe_tensor  # noqa: E402
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
    assert sum(one != other for one, other in pairwise(files)) <= 10
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
