"""Memory of a call, and calls in a fresh process."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mumoe_tensor.measure import memory  # noqa: E402


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_growth_is_what_a_call_holds_at_most() -> None:
    # (Elsewhere: this process may have room that another array left.)
    call = partial(np.ones, 2 * 2**20)
    assert 15 * 2**20 < memory.in_fresh_process("mumoe_tensor.measure.memory:growth", call) < 24 * 2**20


def test_on_a_device_memory_is_what_is_allocated_once_its_work_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    bytes_of = {"reset_peak_memory_stats": None, "memory_allocated": 5, "max_memory_allocated": 12}
    monkeypatch.setattr("torch.cuda.synchronize", lambda: calls.append("synchronize"))
    meter = {name: lambda name=name: calls.append(name) or bytes_of[name] for name in bytes_of}
    monkeypatch.setitem(
        memory.METERS, "cuda", memory.Meter(*(meter[name] for name in list(bytes_of)[:2]), memory._cuda_peak)
    )
    monkeypatch.setattr("torch.cuda.max_memory_allocated", meter["max_memory_allocated"])
    assert memory.growth(lambda: calls.append("call"), "cuda") == 7
    assert calls == [*list(bytes_of)[:2], "call", "synchronize", "max_memory_allocated"]


def test_a_fresh_process_is_another_one() -> None:
    assert memory.in_fresh_process("os:getpid") != os.getpid()


def test_a_process_that_fails_says_why() -> None:
    class Here:
        """No other process can import it."""

    with pytest.raises(OSError, match="failed: ZeroDivisionError"):
        memory.in_fresh_process("operator:truediv", 1, 0)
    with pytest.raises(OSError, match="cannot import what it needs: "):
        memory.in_fresh_process("builtins:repr", Here())
