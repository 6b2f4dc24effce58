"""Processes of tests: forked from a server that has imported torch, which takes longer than most tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

FORKED = multiprocessing.get_context("forkserver")
# Nothing of ours: `planted` has the server, too.
FORKED.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.tensor.parallel", "accelerate", "tensorboardX", "tensorly", "pytest"]
)


def start(worker: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call ``worker(rank, *arguments)`` in so many processes, and wait for all."""
    torch.multiprocessing.start_processes(worker, arguments, count, start_method="forkserver")


def leave() -> None:
    """End this process once all of its group have come here.

    Threads of a group may outlive it, and abort a process that ends as usual.
    """
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)
