"""The interface between a run and the kinds of model it can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.training.data import Rows


class Job(NamedTuple):
    """An untrained model, its training and validation rows, and the training settings."""

    model: nn.Module
    training: Rows
    validation: Rows
    train: TrainConfig


class Runnable(Protocol):
    """A dataclass of settings from which `.run.run` trains a model.

    Attributes
    ----------
    kind : str
        Kind of the model in ``config.json``.
    result : str
        File name of the trained model, which is written last.
    """

    kind: ClassVar[str]
    result: ClassVar[str]

    @property
    def train(self) -> TrainConfig:
        """The training settings."""

    def job(self, *, progress: bool = False) -> Job:
        """Read the data and make the model, initialized with the seed in the training settings."""

    def about(self, model: nn.Module) -> dict[str, Any]:
        """The model's entries in ``config.json``: its parameter count and solved ranks."""

    def save(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained model; `state` is its state, gathered from all processes."""

    def load(self, folder: Path) -> nn.Module:
        """Read a model written by `save`; raises a ValueError if it does not match the settings."""
