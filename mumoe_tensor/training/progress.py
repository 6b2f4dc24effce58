"""A progress bar with the time left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Bar:
    """A progress bar with the time left; calling it advances it.

    Parameters
    ----------
    steps : int
    done : int, default 0
        Steps that were done before.
    """

    def __init__(self, steps: int, done: int = 0):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("", total=steps, completed=done)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.__enter__()
        return lambda text: self._progress.update(self._task, advance=1, description=text)

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
