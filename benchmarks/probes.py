"""Bytes a forward pass saves, and numbers from fresh processes, without imports from the library.

The asv suites use it and also run with the library of older commits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def in_a_fresh_process(module: str, *arguments: Any) -> int:
    """The number that a module of this repository prints, started with the arguments as JSON."""
    # The repository comes last on the path: an asv environment has the library of another commit installed.
    code = (
        "import runpy, sys; sys.path.append(sys.argv.pop(1));"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-P", "-c", code, root, module, json.dumps(arguments)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
