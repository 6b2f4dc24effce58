"""The processes of a run: one, or as many as ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

from typing import Any

import torch


def processes() -> Any:
    """Accelerate's `PartialState` of this process: its number, of how many, and its device.

    The first call joins the processes; call it before anything else of accelerate.
    """
    from accelerate import PartialState

    # Not told that there is nothing but CPUs, accelerate would join the processes and count only one.
    return PartialState(cpu=not torch.accelerator.is_available())
