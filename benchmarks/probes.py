"""Bytes that a forward pass saves, without imports from the library.

The asv suites use it and also run with the library of older commits.
"""

from __future__ import annotations

import torch


def kept_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes a forward pass saves besides parameters and buffers, each storage counted once."""
    excluded = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = module(x)
    assert y.requires_grad
    return sum(storages.values())
