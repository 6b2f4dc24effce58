"""The logs of a training run: a table of its evaluations, and TensorBoard curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import time
from typing import Any

from mumoe_tensor.files import write_table
from mumoe_tensor.readers import finite, read_table, reading


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation during a run.

    Attributes
    ----------
    epoch : int
        Epoch of the last step, counted from 1.
    loss : float
        Mean training loss since the previous evaluation.
    validation_loss : float
    accuracy : float or None
        Accuracy on the validation rows; None if the targets are floats.
    seconds : float
        Time since the previous evaluation.
    is_best : bool
        Whether the validation loss is lower than in all earlier evaluations.
    step : int
        Steps done.
    """

    epoch: int
    loss: float
    validation_loss: float
    accuracy: float | None
    seconds: float
    is_best: bool
    step: int = 0


def write_evaluations(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write evaluations to a CSV file, atomically."""
    columns = [field.name for field in fields(Evaluation)]
    write_table(path, columns, (asdict(e) | {"is_best": int(e.is_best)} for e in evaluations))


def read_evaluations(path: Path) -> list[Evaluation]:
    """Read a file written by `write_evaluations`; for errors see `read_table`."""
    columns: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("epoch", "step"), int),
        **dict.fromkeys(("loss", "validation_loss", "seconds"), finite),
        "accuracy": lambda text: finite(text) if text else None,
        "is_best": lambda text: bool(int(text)),
    }
    evaluations = [Evaluation(**row) for row in read_table(path, columns)]
    with reading(path):
        if not evaluations or not evaluations[0].is_best:
            raise ValueError("a run must have evaluations, and is_best must be true for the first.")
    return evaluations


def tensorboard(folder: Path, step: int) -> Any:
    """A writer of TensorBoard curves; points after `step` are removed when a run resumes.

    (The `SummaryWriter` of tensorboardX writes in a thread, and hangs if the disk is full.)
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(folder / "events"))
    if step:
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time(), step=step + 1, session_log=start))
    return writer


def add_curves(writer: Any, step: int, figures: Mapping[str, float | None]) -> None:
    """Add the figures of a step to their TensorBoard curves."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    for name, value in figures.items():
        if value is not None:
            writer.write_event(Event(wall_time=time(), step=step, summary=scalar(name, value)))
