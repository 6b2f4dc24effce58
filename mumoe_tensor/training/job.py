"""What a run trains: a model that fits into memory, its rows, and the training settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.training.data import Rows

M = TypeVar("M", bound=nn.Module)


class Job(NamedTuple):
    """An untrained model, its training and validation rows, and the training settings."""

    model: nn.Module
    training: Rows
    validation: Rows
    train: TrainConfig


def parameters_of(make: Callable[[], nn.Module]) -> int:
    """The number of parameters of a model, which is made on ``meta``."""
    try:
        with torch.device("meta"):
            return num_parameters(make())
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that torch cannot count
        raise ValueError(f"a model must fit into memory: {str(error).splitlines()[0]}.") from None


def made(make: Callable[[], M], seed: int, parameters: int) -> M:
    """Make a model with a seed; a ValueError if its parameters, in float32, do not fit into memory."""
    import psutil  # a dependency of accelerate

    needed, there = 4 * parameters, psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"a model must fit into memory; its parameters need {needed / 2**30:,.1f} GiB of "
            f"{there / 2**30:,.1f} GiB."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()
