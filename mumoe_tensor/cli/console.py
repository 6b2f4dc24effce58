"""Output of commands: JSON, tables, and one-line failures."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_tensor.extras import missing


def fail(message: str, code: int) -> int:
    """Print a failure as one line on stderr and return its exit code."""
    warn(message)
    return code


def warn(message: str) -> None:
    """Print one line on stderr."""
    print("mumoe-tensor: " + " ".join(message.split()), file=sys.stderr)


@contextmanager
def failures() -> Iterator[None]:
    """Turn errors that any command may raise into one line and an exit code.

    The code is 2 for system errors, such as a full disk or a lack of memory, and for a missing package; 1 for
    numbers that are not finite; 130 for an interruption.
    """
    try:
        yield
        sys.stdout.flush()  # so that a full disk raises here, not when Python exits
    except BrokenPipeError:
        raise  # typer exits silently
    except ImportError as error:
        raise typer.Exit(fail(missing(error.name or "") or str(error), 2)) from error
    except OSError as error:
        _drop_output()
        raise typer.Exit(fail(_message(error), 2)) from error
    except FloatingPointError as error:
        raise typer.Exit(fail(str(error), 1)) from error
    except MemoryError as error:
        raise typer.Exit(fail(f"there is not enough memory: {error}", 2)) from error
    except KeyboardInterrupt as stop:
        raise typer.Exit(fail("interrupted.", 130)) from stop


def _drop_output() -> None:
    """Prevent Python from flushing stdout to a closed pipe at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: OSError) -> str:
    """The system's error message, and the file."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the library's errors about arguments and files into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.Exit(fail(str(error), 2)) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Turn the interruption of a resumable command, also by SIGTERM, into one line and exit code 130."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as stop:
        message = "interrupted; the same command resumes."
        raise typer.Exit(fail(message, 130)) from stop
    finally:
        signal.signal(signal.SIGTERM, before)


def take_any_encoding() -> None:
    """Write a question mark for characters that the output encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def print_json(value: Any) -> None:
    """Print a value as ASCII JSON, which is the same in every encoding."""
    print(json.dumps(value, indent=2))


def new_table(*headings: str, title: str | None = None) -> Table:
    """An empty table in the common style."""
    return Table(*headings, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def show(table: Table, labels: int = 1) -> None:
    """Print a table without cutting columns.

    Columns that do not fit are printed below the others, with the row labels repeated. In a pipe or a file
    the width is unlimited, unless ``COLUMNS`` sets it.
    """
    console = Console(markup=False, emoji=False)
    natural = console.measure(table, options=console.options.update(max_width=10**6)).maximum
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, natural)
    for columns in _side_by_side(table, labels, console):
        console.print(_part(table, columns))


def _side_by_side(table: Table, labels: int, console: Console) -> list[list[int]]:
    """Groups of columns that fit side by side, each with the labels."""
    parts = [list(range(labels))]
    for column in range(labels, len(table.columns)):
        together = _part(table, [*parts[-1], column])
        width = console.measure(together, options=console.options.update(max_width=10**6)).maximum
        if width > console.width and len(parts[-1]) > labels:
            parts.append(list(range(labels)))
        parts[-1].append(column)
    return parts


def _part(table: Table, columns: list[int]) -> Table:
    """A table with selected columns. A cell that is wider than the console is wrapped."""
    part = copy(table)
    part.columns = [
        replace(table.columns[column], _index=place, no_wrap=False, overflow="fold")
        for place, column in enumerate(columns)
    ]
    return part
