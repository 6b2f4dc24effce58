"""Whether torch only records a call, to run it later on other values and other batches.

Nothing may then depend on values, and the sizes of a batch are no constants. (This imports torch, so what is
for all backends imports it late.)
"""

from __future__ import annotations

import torch

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_recorded() -> bool:
    """Whether ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or ``make_fx`` records this call."""
    return torch.compiler.is_compiling() or _is_traced()


def is_exported() -> bool:
    """Whether it is any of them but ``torch.compile``: the record must do without this package."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else _is_traced()


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None or torch._C._get_dispatch_mode(_PROXY) is not None
