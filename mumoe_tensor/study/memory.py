"""Peak memory of a forward pass and of a training step, in a new process."""

from __future__ import annotations

import torch

from mumoe_tensor.measure.memory import METERS, in_fresh_process
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.study.subjects import Subject

#: A step of a small module first loads libraries and allocates their buffers.
SMALL = LayerSpec("tr", experts=2, in_features=8, hidden=8, out_features=8, rank=(1, 1, 1), bias=True)


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
    Subject(SMALL).build(device)(torch.randn(4, 8, device=device)).sum().backward()
    meter = METERS[device]
    before = meter.now()
    module = subject.build(device)
    x = torch.randn(batch, subject.spec.in_features, device=device)
    meter.reset()
    module.eval()
    with torch.no_grad():
        module(x)
    forward = meter.peak() - before
    module.train()
    module(x.requires_grad_()).sum().backward()
    return forward, meter.peak() - before
