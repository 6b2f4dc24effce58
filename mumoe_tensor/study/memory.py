"""Peak memory of a forward pass and of a training step, in a new process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.measure.memory import METERS, in_fresh_process
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.study.subjects import Subject


def peaks(subject: Subject, batch: int, device: str) -> tuple[int, int]:
    """Peak memory of a forward pass and of a training step, in a new process.

    Returns
    -------
    int, int
        Bytes above the memory of the process before the module was made: on a CPU the peak resident set, on
        CUDA the peak allocation. Parameters are included, and in a step their gradients.

    Raises
    ------
    OSError
        If the process fails, or the system has no ``/proc``.
    """
    forward, step = in_fresh_process("mumoe_tensor.study.memory:measure", subject, batch, device)
    return forward, step


def measure(subject: Subject, batch: int, device: str) -> tuple[int, int]:
    """As `peaks`, in this process."""
    # A step of a small module first loads libraries and allocates their buffers.
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
    """A layer of the same kind with 8 features, 2 experts per level and rank one."""
    sizes: dict[str, Any] = {
        "in_features": 8, "hidden": spec.hidden and 8, "out_features": 8, "experts": (2,) * spec.num_levels
    }  # fmt: skip
    try:
        return replace(spec, **sizes, rank=(1,) * len(spec.full_rank))
    except ValueError:  # the format has parts or slices of other sizes
        return replace(spec, **sizes, format=get_format("tr"), rank=(1,) * (spec.num_levels + 2))
