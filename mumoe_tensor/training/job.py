"""What a run trains, whatever kind of model it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.training.data import Rows


class Job(NamedTuple):
    """A model before its training, its rows, and how it is trained on them."""

    model: nn.Module
    training: Rows
    validation: Rows
    train: TrainConfig


class Runnable(Protocol):
    """Settings, a dataclass, that `.run.run` makes a trained model of.

    Attributes
    ----------
    kind : str
        Of the model, as ``config.json`` names it.
    result : str
        Name of the file of the trained model, which is written last.
    """

    kind: ClassVar[str]
    result: ClassVar[str]

    @property
    def train(self) -> TrainConfig:
        """How the model is trained."""

    def job(self, *, progress: bool = False) -> Job:
        """Read the data and make the model, its weights drawn with the seed of the training."""

    def about(self, model: nn.Module) -> dict[str, Any]:
        """What ``config.json`` says of a model: its parameters and solved ranks."""

    def save(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained model, whose state is gathered from all processes."""

    def load(self, folder: Path) -> nn.Module:
        """Read what `save` wrote; raises a ValueError if the model is not that of the settings."""
