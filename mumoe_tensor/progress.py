"""A progress bar that shows the remaining time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

#: Seconds between lines of progress.
LINE_SECONDS = 10.0
#: Called as ``progress(done, total, text)``.
Progress = Callable[[float, float, str], None]


@contextmanager
def progress_bar(title: str, is_shown: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr; if that is not a terminal, a line every `LINE_SECONDS`.

    If `is_shown` is False, progress is discarded.
    """
    if not is_shown:
        yield lambda done, total, text: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TimeRemainingColumn())
    console = Console(stderr=True)
    with rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, last = bar.add_task(title, total=None), monotonic()

        def update(done: float, total: float, text: str) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total, description=text)
            if bar.disable and monotonic() - last >= LINE_SECONDS:
                last = monotonic()
                print(f"{100 * done / (total or 1):3.0f} % {text}", file=sys.stderr, flush=True)

        yield update
