"""How to train: everything that a training run depends on besides the model and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import cos, isfinite, pi
from typing import Any, Literal

from mumoe_tensor.checks import as_python

Schedule = Literal["cosine", "linear"]
Precision = Literal["no", "bf16", "fp16"]

#: Settings that are chosen from a few.
CHOICES = {"schedule": ("cosine", "linear"), "keep": ("best", "last"), "precision": ("no", "bf16", "fp16")}


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, a linear warm-up, then a fall of the learning rate.

    Attributes
    ----------
    epochs : int
        Passes over the rows.
    batch_size : int
        Rows of a step, those of all processes and of all parts together.
    learning_rate : float
        The highest, at the end of the warm-up.
    weight_decay : float
        Weight decay of AdamW, of all parameters.
    warmup : float or int
        Steps in which the learning rate rises; a float is a share of all steps.
    clip : float or None
        Largest norm of all gradients together.
    patience : int or None
        Stop once the validation loss has not fallen for so many evaluations; by default never.
    seed : int
        Seed of the order of the rows, of mixup and of dropout; of a run also of the initial weights.
    steps : int or None
        Train for so many steps, in the place of `epochs`.
    accumulation : int
        Parts that a step's rows are divided into; their gradients are added up.
    final_learning_rate : float
        At the end.
    schedule : {"cosine", "linear"}
        How the learning rate falls.
    betas : tuple of two float
        Of AdamW.
    keep : {"best", "last"}
        Whether the model ends with the parameters of the lowest validation loss, or with the last.
    mixup : float
        Both parameters of the Beta distribution that shares are drawn from (Zhang et al., 2018); 0 for none.
    precision : {"no", "bf16", "fp16"}
        Of products in forward passes (autocast); parameters stay as they are.
    compile : bool
        Compile the model (`torch.compile`).
    evaluate_every : int or None
        Steps between evaluations; None for one each epoch.
    evaluation_batch_size : int
        Validation rows that a process maps at once.
    checkpoint_every : int or None
        Steps between checkpoints; None for one each evaluation.
    workers : int
        Processes that load rows ahead; 0 to load them when they are needed.
    structured_rates : bool
        Scale the learning rate of each factor of experts by its place in the network, see
        `.parameter_groups`.

    Raises
    ------
    ValueError
        If a number is out of its range, or a choice unknown.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float | int = 0.05
    clip: float | None = 1.0
    patience: int | None = None
    seed: int = 0
    steps: int | None = None
    accumulation: int = 1
    final_learning_rate: float = 0.0
    schedule: Schedule = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    keep: Literal["best", "last"] = "best"
    mixup: float = 0.0
    precision: Precision = "no"
    compile: bool = False
    evaluate_every: int | None = None
    evaluation_batch_size: int = 1024
    checkpoint_every: int | None = None
    workers: int = 0
    structured_rates: bool = False

    def __post_init__(self) -> None:
        # What is written beside a checkpoint are numbers of Python, whatever library they come from.
        for field in fields(self):
            object.__setattr__(self, field.name, as_python(getattr(self, field.name)))
        object.__setattr__(self, "betas", tuple(map(as_python, self.betas)))
        for name in (
            "epochs", "batch_size", "learning_rate", "clip", "patience", "steps", "accumulation",
            "evaluate_every", "evaluation_batch_size", "checkpoint_every",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("weight_decay", "final_learning_rate", "mixup", "workers", "warmup", "seed"):
            if not (getattr(self, name) >= 0 and isfinite(getattr(self, name))):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if isinstance(self.warmup, float) and self.warmup > 1:
            raise ValueError(f"warmup must be a number of steps or a share up to 1.0, got {self.warmup}.")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must not be above learning_rate, got {self.final_learning_rate} and "
                f"{self.learning_rate}."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}."
            )

    def for_rows(self, rows: int) -> TrainConfig:
        """The same with a batch of all rows, where these are fewer than the default batch has.

        A batch of another size stays: one that was asked for and is too large is refused, not replaced.

        Parameters
        ----------
        rows : int
            For training.
        """
        default = type(self).batch_size
        return replace(self, batch_size=rows) if rows < self.batch_size == default else self

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a factor of the largest.

        Parameters
        ----------
        step : int
            Counted from 0.
        steps : int
            How many there are.
        """
        rising = round(self.warmup * steps) if isinstance(self.warmup, float) else self.warmup
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(steps - rising, 1)
        left = 0.5 * (1 + cos(pi * done)) if self.schedule == "cosine" else 1 - done
        last = self.final_learning_rate / self.learning_rate
        return last + (1 - last) * left


def settings_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `TrainConfig` as JSON has them; a version before may have written fewer of them."""
    settings: dict[str, Any] = json.loads(json.dumps({**asdict(TrainConfig()), **entries}))
    return settings
