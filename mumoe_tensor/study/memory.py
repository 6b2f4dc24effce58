"""Peak memory of a forward pass and of a step, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mumoe_tensor.formats.registry import config_entry, formats, get_format
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.study.subjects import Subject


def peaks(subject: Subject, batch: int, device: str) -> tuple[int, int]:
    """Peak memory of a forward pass and of a step, in a fresh process.

    Returns
    -------
    int, int
        Bytes over what the process took before the module was made: on a CPU the largest resident set, on
        CUDA the largest allocation. Parameters count, and in a step their gradients.

    Raises
    ------
    OSError
        If the process failed, or the system has no ``/proc`` to read it from.
    """
    spec = {f.name: getattr(subject.spec, f.name) for f in fields(subject.spec)}
    order = json.dumps([{**vars(subject), "spec": spec}, batch, device], default=config_entry)
    # Formats are registered by their modules; the main module would be another one there.
    modules = {type(format).__module__ for format in formats().values()} - {"__main__"}
    command = [sys.executable, "-m", "mumoe_tensor.study.memory", order, *modules]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise OSError(f"the process that measures memory failed: {last}")
    forward, step = json.loads(done.stdout)
    return forward, step


class Meter(NamedTuple):
    """Functions that read the memory of a device, in bytes."""

    reset: Callable[[], object]
    now: Callable[[], int]
    peak: Callable[[], int]


def measure(subject: Subject, batch: int, device: str) -> tuple[int, int]:
    """As `peaks`, in this process."""
    # After a step of a small module, libraries are loaded and their buffers allocated.
    spec, small = subject.spec, _small(subject.spec)
    replace(subject, spec=small).build(device)(torch.randn(4, 8, device=device)).sum().backward()
    meter = METERS[device]
    before = meter.now()
    module = subject.build(device)
    x = torch.randn(batch, spec.in_features, device=device)
    meter.reset()
    module.eval()
    with torch.no_grad():
        module(x)
    forward = meter.peak() - before
    module.train()
    module(x.requires_grad_()).sum().backward()
    return forward, meter.peak() - before


def _small(spec: LayerSpec) -> LayerSpec:
    """A layer of 8 features and 2 experts a level, of rank one."""
    sizes: dict[str, Any] = {
        "in_features": 8, "hidden": spec.hidden and 8, "out_features": 8, "experts": (2,) * spec.num_levels
    }  # fmt: skip
    try:
        return replace(spec, **sizes, rank=(1,) * len(spec.full_rank))
    except ValueError:  # the format has parts or slices of other sizes
        return replace(spec, **sizes, format=get_format("tr"), rank=(1,) * (spec.num_levels + 2))


def growth(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which memory grows at most in a call: the resident set, on CUDA what torch allocates.

    Parameters
    ----------
    device : {"cpu", "cuda"}, default "cpu"
    """
    meter = METERS[device]
    meter.reset()
    before = meter.now()
    call()
    return meter.peak() - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _cuda_peak() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


METERS = {
    # Writing 5 resets the largest resident set (proc(5)).
    "cpu": Meter(
        lambda: Path("/proc/self/clear_refs").write_text("5"),
        lambda: _status("VmRSS"),
        lambda: _status("VmHWM"),
    ),
    "cuda": Meter(torch.cuda.reset_peak_memory_stats, torch.cuda.memory_allocated, _cuda_peak),
}


if __name__ == "__main__":
    order, *modules = sys.argv[1:]
    for module in modules:
        import_module(module)
    values, *options = json.loads(order)
    print(json.dumps(measure(Subject(LayerSpec(**values.pop("spec")), **values), *options)))
