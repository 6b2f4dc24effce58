"""What a forward pass keeps, and numbers from fresh processes. Needs nothing of the library.

The asv suites use it, which also run with the library of other commits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def kept_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """What a forward pass keeps besides parameters and buffers, every storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = module(x)
    assert y.requires_grad
    return sum(kept.values())


def in_a_fresh_process(module: str, *arguments: Any) -> int:
    """The number that a module of this repository prints, run with these arguments as JSON."""
    # The repository comes last on the path: an asv environment has the library of another commit installed.
    code = (
        "import runpy, sys; sys.path.append(sys.argv.pop(1));"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-P", "-c", code, root, module, json.dumps(arguments)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
