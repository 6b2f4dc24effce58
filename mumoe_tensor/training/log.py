"""What a training run tells while it runs: a table of its evaluations, and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import time
from typing import Any

from mumoe_tensor.files import write_table
from mumoe_tensor.readers import finite, read_table, reading


@dataclass(frozen=True)
class Evaluation:
    """Figures of a run up to an evaluation.

    Attributes
    ----------
    epoch : int
        The epoch that the last step was in, counted from 1.
    loss : float
        Mean loss of the training rows since the evaluation before, while they were trained on.
    validation_loss : float
    accuracy : float or None
        Of the validation rows; no accuracy where the targets are floats.
    seconds : float
        Time since the evaluation before.
    is_best : bool
        Whether every earlier evaluation had a higher validation loss.
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
    """Write evaluations as a CSV file, whole or not at all.

    Parameters
    ----------
    evaluations : sequence of Evaluation
    path : Path
    """
    columns = [field.name for field in fields(Evaluation)]
    write_table(path, columns, (asdict(e) | {"is_best": int(e.is_best)} for e in evaluations))


def read_evaluations(path: Path) -> list[Evaluation]:
    """Read what `write_evaluations` wrote.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ValueError
        If the table is not what was written, see `read_table`.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": finite,
        "float | None": lambda text: finite(text) if text else None,
        "bool": lambda text: bool(int(text)),
    }
    columns = {field.name: kinds[str(field.type)] for field in fields(Evaluation)}
    evaluations = [Evaluation(**row) for row in read_table(path, columns)]
    with reading(path):
        if not evaluations or not evaluations[0].is_best:
            raise ValueError("a run must have evaluations, the first of them the best so far.")
    return evaluations


class TensorBoard:
    """Curves for TensorBoard; curves of a run that goes on lose what came after the step it goes on from.

    (The `SummaryWriter` of tensorboardX writes in a thread, and waits forever for it on a full disk.)

    Parameters
    ----------
    folder : Path
    step : int
        Steps that are done already.

    Raises
    ------
    OSError
        Here and later, if the curves cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time(), step=step + 1, session_log=start))

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Add figures of a step to their curves."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in figures.items():
            self._writer.write_event(Event(wall_time=time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Write what was added to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
