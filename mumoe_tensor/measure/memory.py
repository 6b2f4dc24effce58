"""Peak memory of a call, and calls in a fresh process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch


class Meter(NamedTuple):
    """Functions that read the memory of a device, in bytes."""

    reset: Callable[[], object]
    now: Callable[[], int]
    peak: Callable[[], int]


def growth(call: Callable[[], object], device: str = "cpu") -> int:
    """Peak growth of memory during a call, in bytes: of the resident set, or on CUDA of torch's allocations.

    Parameters
    ----------
    device : {"cpu", "cuda"}, default "cpu"
    """
    meter = METERS[device]
    meter.reset()
    before = meter.now()
    call()
    return meter.peak() - before


def in_fresh_process(function: str, *arguments: Any) -> Any:
    """Call a function in a new process, whose memory is not affected by earlier calls.

    Parameters
    ----------
    function : str
        The function as ``"package.module:function"``, which the process imports.
    *arguments : Any
        Arguments, which are pickled, as is the result.

    Raises
    ------
    OSError
        If the arguments cannot be pickled, or the process fails.
    """
    try:
        order = pickle.dumps((function, arguments))
    except (AttributeError, pickle.PicklingError) as error:  # e.g. for a class inside a function
        raise OSError(f"the process that measures memory cannot import what it needs: {error}") from error
    command = [sys.executable, "-c", "from mumoe_tensor.measure.memory import _answer; _answer()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=order, capture_output=True, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = (lines or [f"exit status {done.returncode}"])[-1]
        raise OSError(f"the process that measures memory failed: {last}")
    return pickle.loads(done.stdout)


def _answer() -> None:
    """Call the function of `in_fresh_process`, in the new process."""
    name, arguments = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(resolve_name(name)(*arguments)))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _cuda_peak() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


METERS = {
    # Writing 5 resets the peak resident set size (proc(5)).
    "cpu": Meter(
        lambda: Path("/proc/self/clear_refs").write_text("5"),
        lambda: _status("VmRSS"),
        lambda: _status("VmHWM"),
    ),
    "cuda": Meter(torch.cuda.reset_peak_memory_stats, torch.cuda.memory_allocated, _cuda_peak),
}
