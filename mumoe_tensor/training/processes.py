"""The processes of a run: one, or those started by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

from typing import Any

import torch


def processes() -> Any:
    """Accelerate's `PartialState` of this process: its index, the number of processes, and its device.

    The first call sets up the process group, so it must precede all other calls to accelerate.
    """
    from accelerate import PartialState

    # Without cpu=True, on a machine with only CPUs, accelerate would set up the group but count one process.
    return PartialState(cpu=not torch.accelerator.is_available())
