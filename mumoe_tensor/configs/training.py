"""Settings of a training run: everything it depends on besides the model and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import cos, isfinite, pi
from typing import Any, Literal, get_args

from mumoe_tensor.checks import as_python, check_choice

Schedule = Literal["cosine", "linear"]
Keep = Literal["best", "last"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run: AdamW, with linear warm-up and then decay of the learning rate.

    Attributes
    ----------
    epochs : int
        Passes over the rows.
    batch_size : int
        Rows per step, over all processes and accumulation parts.
    learning_rate : float
        Peak learning rate, at the end of the warm-up.
    weight_decay : float
        Weight decay of AdamW, for all parameters.
    warmup : float or int
        Steps of the warm-up; a float is a fraction of all steps.
    clip : float or None
        Maximum norm of the gradients of all parameters together.
    patience : int or None
        Stop after this many evaluations without a lower validation loss; by default never.
    seed : int
        Seed of the order of the rows, of mixup and of dropout; in a run also of the initial weights.
    steps : int or None
        Number of steps, instead of `epochs`.
    accumulation : int
        Parts into which the rows of a step are divided; their gradients are accumulated.
    final_learning_rate : float
        Learning rate at the last step.
    schedule : {"cosine", "linear"}
        Shape of the decay of the learning rate.
    betas : tuple of two float
        Betas of AdamW.
    keep : {"best", "last"}
        Whether the model ends with the parameters of the lowest validation loss, or with the last.
    mixup : float
        Both parameters of the Beta distribution of the mixing weights (Zhang et al., 2018); 0 for no mixup.
    precision : {"no", "bf16", "fp16"}
        Precision of products in forward passes (autocast); parameters keep their dtype.
    compile : bool
        Compile the model (`torch.compile`).
    evaluate_every : int or None
        Steps between evaluations; None to evaluate after each epoch.
    evaluation_batch_size : int
        Validation rows per forward pass of a process.
    checkpoint_every : int or None
        Steps between checkpoints; None to write one at each evaluation.
    workers : int
        Processes that prefetch rows; 0 to load them on demand.
    structured_rates : bool
        Scale the learning rate of each factor of the experts by its position in the tensor network, see
        `.parameter_groups`.

    Raises
    ------
    ValueError
        If a number is out of range, or a choice is unknown.
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
    keep: Keep = "best"
    mixup: float = 0.0
    precision: Precision = "no"
    compile: bool = False
    evaluate_every: int | None = None
    evaluation_batch_size: int = 1024
    checkpoint_every: int | None = None
    workers: int = 0
    structured_rates: bool = False

    def __post_init__(self) -> None:
        # Convert numbers from other libraries, such as NumPy, to Python's: they are written as JSON.
        for field in fields(self):
            value = as_python(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            is_wrong = isinstance(value, float) and not isfinite(value)
            if is_wrong or (isinstance(value, int) and abs(value) >= 2**63):
                raise ValueError(f"{field.name} must be finite and fit into 64 bits, got {value}.")
        object.__setattr__(self, "betas", tuple(map(as_python, self.betas)))
        for name in (
            "epochs", "batch_size", "learning_rate", "clip", "patience", "steps", "accumulation",
            "evaluate_every", "evaluation_batch_size", "checkpoint_every",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("weight_decay", "final_learning_rate", "mixup", "workers", "warmup", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if isinstance(self.warmup, float) and self.warmup > 1:
            raise ValueError(f"warmup must be a number of steps or a fraction up to 1.0, got {self.warmup}.")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must not be above learning_rate, got {self.final_learning_rate} and "
                f"{self.learning_rate}."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {self.betas}.")
        for name, choices in (("schedule", Schedule), ("keep", Keep), ("precision", Precision)):
            check_choice(getattr(self, name), get_args(choices), name)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}."
            )

    def for_rows(self, rows: int) -> TrainConfig:
        """A copy whose batch is all rows, if there are fewer rows than in the default batch.

        Another batch size is kept: an explicit batch size that is too large is an error later.

        Parameters
        ----------
        rows : int
            Number of training rows.
        """
        default = type(self).batch_size
        return replace(self, batch_size=rows) if rows < self.batch_size == default else self

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a multiple of the peak.

        Parameters
        ----------
        step : int
            Counted from 0.
        steps : int
            Number of steps.
        """
        rising = round(self.warmup * steps) if isinstance(self.warmup, float) else self.warmup
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(steps - rising, 1)
        left = 0.5 * (1 + cos(pi * done)) if self.schedule == "cosine" else 1 - done
        last = self.final_learning_rate / self.learning_rate
        return last + (1 - last) * left


def completed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the entries of a `TrainConfig` read from JSON; earlier versions wrote fewer of them."""
    settings: dict[str, Any] = json.loads(json.dumps({**asdict(TrainConfig()), **entries}))
    return settings
