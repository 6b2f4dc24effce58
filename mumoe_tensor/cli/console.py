"""What commands print: JSON, tables, progress, and bad input in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def fail(message: str, code: int) -> int:
    """Tell of a failure in one line on stderr; its exit code."""
    print("mumoe-tensor: " + " ".join(message.split()), file=sys.stderr)
    return code


@contextmanager
def bad_input() -> Iterator[None]:
    """Make the library's complaint, or the operating system's about a path, one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise typer.Exit(fail(str(error), 2)) from error


@contextmanager
def can_go_on() -> Iterator[None]:
    """Make an interruption one line and exit code 130, where the same command goes on afterwards."""
    try:
        yield
    except KeyboardInterrupt as stop:
        message = "interrupted; the same command goes on where it stopped."
        raise typer.Exit(fail(message, 130)) from stop


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def new_table(*headings: str, title: str | None = None) -> Table:
    """An empty table in the style of all."""
    return Table(*headings, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar on stderr, where somebody looks at it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
