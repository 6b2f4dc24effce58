"""One small trainer of classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import cos, isfinite, pi
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.training.data import Dataset

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, a linear warm-up, then a cosine down to zero.

    Attributes
    ----------
    epochs : int
    batch_size : int
    learning_rate : float
        At the end of the warm-up.
    weight_decay : float
    warmup : float
        Share of the steps in which the learning rate rises.
    clip : float or None
        Largest norm of all gradients together.
    patience : int or None
        Stop once the validation loss has not fallen for so many epochs.
    seed : int
        Of the order of the rows and of dropout. The model is drawn before, by whoever makes it.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float | None = 1.0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "clip", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.weight_decay < 0 or not 0 <= self.warmup <= 1:
            raise ValueError(
                f"weight_decay must not be negative and warmup lie from 0 to 1, got {self.weight_decay} and "
                f"{self.warmup}."
            )

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a factor of the largest.

        Parameters
        ----------
        step : int
            Counted from 0.
        steps : int
            How many there are.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + cos(pi * (step - rising) / max(steps - rising, 1)))


@dataclass(frozen=True)
class Epoch:
    """Figures of an epoch.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    loss : float
        Mean loss of the training rows while they were trained on.
    validation_loss, accuracy : float
        Of the validation rows, after the epoch.
    seconds : float
        Time the epoch took.
    is_best : bool
        Whether every earlier epoch had a higher validation loss: the model ends with the last such state.
    """

    epoch: int
    loss: float
    validation_loss: float
    accuracy: float
    seconds: float
    is_best: bool


def train(
    model: nn.Module,
    data: Dataset,
    validation: Dataset,
    config: TrainConfig | None = None,
    *,
    loss: Loss = nn.functional.cross_entropy,
    progress: bool = False,
) -> list[Epoch]:
    """Train a classifier; it ends with the parameters of its best epoch.

    The last rows of an epoch that do not fill a batch are left out. Neither the state of torch's random
    numbers nor the data change.

    Parameters
    ----------
    model : Module
        Maps inputs of shape (rows, ...) to logits of shape (rows, classes). Is left in evaluation mode.
    data, validation : Dataset
    config : TrainConfig, optional
    loss : callable, default cross entropy
        Of logits and labels, to a mean.
    progress : bool, default False
        Show a bar with the time left (needs rich).

    Returns
    -------
    list of Epoch

    Raises
    ------
    ValueError
        If there are fewer rows than a batch has.
    FloatingPointError
        If the loss of a batch or of the validation rows is no finite number; says in which epoch.
    """
    config = config or TrainConfig()
    batches = len(data) // config.batch_size
    if not batches:
        raise ValueError(f"a batch of {config.batch_size} needs as many rows, got {len(data)}.")
    device = next(model.parameters()).device
    steps = batches * config.epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.factor(step, steps))
    order = torch.Generator().manual_seed(config.seed)
    history: list[Epoch] = []
    best, best_state, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(config.seed)
        advance = stack.enter_context(Bar(steps)) if progress else lambda text: None
        for epoch in range(1, config.epochs + 1):
            start, total = perf_counter(), 0.0
            model.train()
            for rows in torch.randperm(len(data), generator=order)[: batches * config.batch_size].split(
                config.batch_size
            ):
                optimizer.zero_grad()
                value = loss(model(data.x[rows].to(device)), data.y[rows].to(device))
                total += value.item()
                if not isfinite(total):
                    raise FloatingPointError(
                        f"the loss must be a finite number; it is {value.item()} in epoch {epoch}, at a "
                        f"learning rate of {optimizer.param_groups[0]['lr']:.3g}."
                    )
                value.backward()
                if config.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimizer.step()
                schedule.step()
                advance(f"epoch {epoch}")
            validation_loss, accuracy = evaluate(model, validation, loss=loss)
            if not isfinite(validation_loss):
                raise FloatingPointError(
                    f"the loss must be a finite number; on the validation rows it is {validation_loss} after "
                    f"epoch {epoch}."
                )
            is_best = validation_loss < best
            if is_best:
                best, best_state, waited = validation_loss, copy.deepcopy(model.state_dict()), 0
            else:
                waited += 1
            history.append(
                Epoch(epoch, total / batches, validation_loss, accuracy, perf_counter() - start, is_best)
            )
            if config.patience is not None and waited >= config.patience:
                break
    model.load_state_dict(best_state)
    model.eval()
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    batch_size: int = 1024,
    loss: Loss = nn.functional.cross_entropy,
) -> tuple[float, float]:
    """Loss and accuracy on some data; leaves the model in evaluation mode.

    Parameters
    ----------
    model : Module
    data : Dataset
    batch_size : int, default 1024
    loss : callable, default cross entropy

    Returns
    -------
    float, float
    """
    device = next(model.parameters()).device
    model.eval()
    total = right = 0.0
    for x, y in zip(data.x.split(batch_size), data.y.split(batch_size), strict=True):
        logits, labels = model(x.to(device)), y.to(device)
        total += float(loss(logits, labels)) * len(y)
        right += int((logits.argmax(-1) == labels).sum())
    return total / len(data), right / len(data)


class Bar:
    """A progress bar with the time left; calling it advances it."""

    def __init__(self, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.__enter__()
        return lambda text: self._progress.update(self._task, advance=1, description=text)

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
