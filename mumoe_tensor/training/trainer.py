"""One trainer for all models, on one process or, with accelerate, on several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, isnan, nan
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.configs.training import TrainConfig, completed
from mumoe_tensor.nn.rates import parameter_groups
from mumoe_tensor.progress import progress_bar
from mumoe_tensor.readers import checked
from mumoe_tensor.training.batches import Batch, Batches, seed_of
from mumoe_tensor.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    State,
    model_state,
    restore,
    restore_model,
    snapshot,
)
from mumoe_tensor.training.data import Rows
from mumoe_tensor.training.finite import first_layer_not_finite
from mumoe_tensor.training.log import Evaluation, add_curves, tensorboard, write_evaluations
from mumoe_tensor.training.processes import processes

Loss = Callable[[Tensor, Tensor], Tensor]

#: Settings that do not affect the result, so that a run may resume with other values.
FREE = ("workers", "evaluation_batch_size", "checkpoint_every")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy of logits.

    Parameters
    ----------
    logits : Tensor of shape (..., classes)
    y : Tensor of int of shape (...), or of float of shape (..., classes)
        Labels, or class probabilities.
    """
    labels = y.flatten(0, -2) if y.is_floating_point() else y.flatten()
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels)


@dataclass
class Progress:
    """The progress of a run: the content of a checkpoint besides the model and the optimizer.

    Attributes
    ----------
    step : int
        Steps done.
    evaluations : list of Evaluation
    total : float
        Sum of this process's losses over the steps since the last evaluation.
    seconds : float
        Time since the last evaluation.
    config : dict
        The training settings.
    scaler : dict or None
        State of the gradient scaler of fp16.
    """

    step: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    total: float = 0.0
    seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None

    @property
    def best(self) -> float:
        """The lowest validation loss so far."""
        return min((e.validation_loss for e in self.evaluations), default=float("inf"))

    @property
    def waited(self) -> int:
        """Evaluations since the one with the lowest validation loss."""
        since = 0
        for e in self.evaluations:
            since = 0 if e.is_best else since + 1
        return since


def train(
    model: nn.Module,
    data: Rows,
    validation: Rows,
    config: TrainConfig | None = None,
    *,
    loss: Loss = cross_entropy,
    folder: Path | None = None,
    from_step: int | None = None,
    progress: bool = False,
) -> list[Evaluation]:
    """Train a model, which ends with the weights of its best evaluation or with the last ones.

    On one process the model stays on its device. Under ``torchrun`` or ``accelerate launch`` every process
    calls this function; the model is moved to the process's device and wrapped (DDP, FSDP2) according to
    accelerate's settings. Each process takes its share of the rows of a step, so the number of processes
    changes only the order of sums and the random numbers of dropout. The state of torch's global random
    numbers and the data are not changed.

    Parameters
    ----------
    model : Module
        Maps inputs of shape (rows, ...) to logits of shape (rows, ..., classes). Ends in evaluation mode.
    data, validation : Rows
        With labels, or with float targets, for which no accuracy is computed.
    config : TrainConfig, optional
    loss : callable, default `cross_entropy`
        Maps logits and labels, or outputs and targets, to a mean loss.
    folder : Path, optional
        Receives ``checkpoints/``, ``metrics.csv`` with a line for each evaluation, and ``tensorboard/``. The
        same call resumes from the last checkpoint; on one process the result is bit-for-bit the same.
    from_step : int, optional
        Resume from the checkpoint of this step instead of the last one.
    progress : bool, default False
        Show a progress bar (needs rich).

    Returns
    -------
    list of Evaluation

    Raises
    ------
    ValueError
        If there are fewer rows than the batch size, the checkpoint has another config, or the precision is
        fp16 on CPUs.
    FloatingPointError
        If a loss or a gradient is not finite; the message names the step, the layer and the last good
        checkpoint.
    DamagedCheckpoint
        If the checkpoint is missing or corrupt; the message names the last good one.
    OSError
        If a file cannot be written; earlier checkpoints are kept.
    """
    run = _Run(model, data, validation, config or TrainConfig(), loss, folder)
    with torch.random.fork_rng():
        run.resume(from_step)
        try:
            run.train(progress and run.accelerator.is_main_process)
        finally:
            # For other precisions, accelerate has replaced the model's forward method.
            run.accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
    model.eval()
    return run.state.evaluations


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    own = processes()
    if config.precision == "fp16" and own.device.type == "cpu":
        # (Accelerate would silently compute in float32.)
        raise ValueError("precision 'fp16' needs an accelerator; on CPUs use 'bf16'.")
    # Accelerate keeps the precision and the state of gradient accumulation in global state, even after an
    # interrupted step; its public reset would also reset the process group.
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(
        device_placement=own.num_processes > 1,
        gradient_accumulation_steps=config.accumulation,
        mixed_precision=config.precision,
        dynamo_backend="inductor" if config.compile else "no",
    )


class _Run:
    """A run of `train`, from its start or from a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        validation: Rows,
        config: TrainConfig,
        loss: Loss,
        folder: Path | None,
    ):
        self.model, self.validation, self.config = model, validation, config
        self.loss, self.folder = loss, folder
        self.accelerator = own = _accelerator(config)
        self.batches = Batches(data, config, own.process_index, own.num_processes)
        self.checkpoints = None if folder is None else Checkpoints(folder / "checkpoints")
        groups = parameter_groups(model, config.learning_rate) if config.structured_rates else None
        optimizer = torch.optim.AdamW(
            groups or model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the parameters; the default on CPUs makes a pass per operation
        )
        # The wrapped model computes; checkpoints and names are those of the model itself.
        self.wrapped, self.optimizer = own.prepare(model, optimizer)
        self.device = next(model.parameters()).device
        self.state = Progress(config=asdict(config))
        self.best_state: State = {}
        self.evaluate_every = config.evaluate_every or self.batches.per_epoch
        self.checkpoint_every = config.checkpoint_every or self.evaluate_every

    def train(self, progress: bool) -> None:
        state = self.state
        with ExitStack() as stack:
            update = stack.enter_context(progress_bar("training", progress))
            board = None
            if self.folder is not None and self.accelerator.is_main_process:
                board = stack.enter_context(closing(tensorboard(self.folder / "tensorboard", state.step)))
            start = perf_counter() - state.seconds
            ahead = self.batches.after(state.step, pin_memory=self.device.type == "cuda")
            while not self._is_over():
                self.wrapped.train()
                figures = self._step(next(ahead))
                if board:
                    add_curves(board, state.step, figures)
                update(state.step, self.batches.steps, f"epoch {self._epoch}, step {state.step:,}")
                state.seconds = perf_counter() - start
                if self._is_due(self.evaluate_every):
                    self._evaluate()
                    last = state.evaluations[-1]
                    if board:
                        validated = {"validation loss": last.validation_loss, "accuracy": last.accuracy}
                        add_curves(board, state.step, validated)
                        board.flush()
                    start = perf_counter()
                if self._is_due(self.checkpoint_every) or self._is_over():
                    self._write()
        if self.config.keep == "best":
            restore_model(self.model, self.best_state)

    @property
    def _epoch(self) -> int:
        return (self.state.step - 1) // self.batches.per_epoch + 1

    @property
    def _last(self) -> str:
        """A phrase for the last good checkpoint, to end an error message."""
        return "" if self.checkpoints is None else f"; {self.checkpoints.last()}"

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.batches.steps

    def _is_over(self) -> bool:
        patience = self.config.patience
        is_done = self.state.step >= self.batches.steps
        return is_done or (patience is not None and self.state.waited >= patience)

    def _step(self, parts: list[Batch]) -> dict[str, float]:
        """Make a step and return its figures."""
        config, accelerator, state = self.config, self.accelerator, self.state
        rate = config.learning_rate * config.factor(state.step, self.batches.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        value = self._gradients(parts)
        accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        length = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        state.step += 1
        # The scaler of fp16 skips steps whose gradient is not finite.
        if not isfinite(value) or not (isfinite(length) or config.precision == "fp16"):
            raise FloatingPointError(self._not_finite(parts, value, rate))
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip, norm)
        self.optimizer.step()
        state.total += value
        return {"loss": value, "learning rate": rate, "gradient norm": length}

    def _gradients(self, parts: list[Batch]) -> float:
        """Compute the gradients of a step, and return its loss on this process."""
        torch.manual_seed(seed_of(self.config.seed, self.state.step, self.accelerator.process_index))
        self.optimizer.zero_grad()
        total = 0.0
        for x, y in parts:
            # Processes synchronize their gradients once, in the last part.
            with self.accelerator.accumulate(self.wrapped):
                value = self.loss(self.wrapped(x.to(self.device)), y.to(self.device))
                self.accelerator.backward(value)
            total += value.item()
        return total / len(parts)

    def _not_finite(self, parts: list[Batch], value: float, rate: float) -> str:
        when = f"in step {self.state.step}, epoch {self._epoch}, at a learning rate of {rate:.3g}"
        last = self._last
        if isfinite(value):
            parameters = self.model.named_parameters()
            names = [n for n, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
            return f"gradients must be finite; those of {', '.join(names)} are not, {when}{last}."
        where = first_layer_not_finite(self.model, torch.cat([x for x, _ in parts]).to(self.device))
        return f"the loss must be finite; it is {value} {when}: {where}{last}."

    def _evaluate(self) -> None:
        state, accelerator = self.state, self.accelerator
        loss, accuracy = _evaluated(
            self.wrapped, self.validation, self.config.evaluation_batch_size, self.loss, accelerator
        )
        if not isfinite(loss):
            raise FloatingPointError(
                f"the loss must be finite; on the validation rows it is {loss} after step "
                f"{state.step}, epoch {self._epoch}{self._last}."
            )
        steps = state.step - (state.evaluations[-1].step if state.evaluations else 0)
        is_best = loss < state.best
        state.evaluations.append(
            Evaluation(
                self._epoch,
                self._mean(state.total) / steps,
                loss,
                None if isnan(accuracy) else accuracy,
                state.seconds,
                is_best,
                state.step,
            )
        )
        state.total = state.seconds = 0.0
        if is_best and self.config.keep == "best":
            self.best_state = model_state(self.model)

    def _mean(self, value: float) -> float:
        """The mean over processes."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, device=self.device, dtype=torch.float64)
        return float(self.accelerator.reduce(tensor, "mean"))

    # ---- files in the folder -----------------------------------------------------------------------------

    def resume(self, from_step: int | None) -> None:
        """Load the last checkpoint, or that of a step, if there is one."""
        if self.folder is None or self.checkpoints is None:
            return
        if self.accelerator.is_main_process:
            self.checkpoints.tidy()
        metrics = self.folder / "metrics.csv"
        if not self.checkpoints.steps and from_step is None:
            if metrics.exists():
                raise DamagedCheckpoint(
                    f"a run with {metrics} must have a checkpoint to resume from; {self.folder} has none."
                )
            return
        step = self.checkpoints.steps[-1] if from_step is None else from_step
        state, self.best_state, entries = self.checkpoints.read(step)
        try:
            kept = checked(Progress, entries)
        except ValueError as error:
            raise self.checkpoints.damaged(step, f"progress, {error}") from None
        config, before = completed(asdict(self.config)), completed(kept.config)
        if others := [name for name in config if name not in FREE and config[name] != before[name]]:
            raise ValueError(
                f"a run must resume with the same config; {', '.join(others)} in {self.folder} was "
                f"{', '.join(str(before[name]) for name in others)}."
            )
        try:
            restore(self.model, self.optimizer.optimizer, state)
        except (ValueError, RuntimeError, KeyError) as error:
            what = shorten(str(error), 300)  # torch lists every tensor
            raise self.checkpoints.damaged(step, f"it must fit the model, {what};") from error
        if kept.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept.scaler)
        self.state = replace(kept, config=asdict(self.config))
        if self.accelerator.is_main_process:
            write_evaluations(self.state.evaluations, metrics)

    def _write(self) -> None:
        if self.folder is None or self.checkpoints is None:
            return
        state, scaler = self.state, self.accelerator.scaler
        entries = asdict(state) | {
            "total": self._mean(state.total),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        whole = snapshot(self.model, self.optimizer.optimizer)
        if self.accelerator.is_main_process:
            self.checkpoints.write(state.step, whole, self.best_state, entries)
            write_evaluations(state.evaluations, self.folder / "metrics.csv")


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Rows, *, batch_size: int = 1024, loss: Loss = cross_entropy
) -> tuple[float, float]:
    """Loss and accuracy on data; leaves the model in evaluation mode.

    Parameters
    ----------
    model : Module
    data : Rows
    batch_size : int, default 1024
    loss : callable, default `cross_entropy`

    Returns
    -------
    float
        Mean loss over labels.
    float
        Fraction of labels with the largest logit; NaN if the targets are floats.
    """
    return _evaluated(model, data, batch_size, loss, None)


@torch.no_grad()
def _evaluated(
    model: nn.Module, data: Rows, batch_size: int, loss: Loss, accelerator: Any
) -> tuple[float, float]:
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    model.eval()
    # Loss, correct labels, labels: summed over the batches, then over the processes.
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(data)).split(batch_size * processes):
        own = rows.tensor_split(processes)[process]
        # Every process must take part in every forward pass; one without rows computes on a dummy row.
        x, y = data.batch(own if len(own) else rows[:1])
        logits, labels = model(x.to(device)), y.to(device)
        right = nan if y.is_floating_point() else float((logits.argmax(-1) == labels).sum())
        if len(own):
            sums += torch.tensor(
                [float(loss(logits, labels)) * y.numel(), right, y.numel()], dtype=torch.float64
            )
    if processes > 1:
        sums = accelerator.reduce(sums.to(device), "sum")
    total, correct, count = sums.tolist()
    return total / count, correct / count
