"""How the command line behaves as a whole: help, version, errors in one line."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mumoe_tensor as mt
from mumoe_tensor.cli.console import fail

#: What typer raises for a line it cannot parse. It exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """A group of commands that tells of bad input in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = partial(super().main, *args, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        try:
            code = run(standalone_mode=False)
        except (typer.Abort, KeyboardInterrupt):
            code = fail("interrupted.", 130)
        except _UsageError as error:
            told: Any = error
            command = told.ctx.command_path if told.ctx else "mumoe-tensor"
            code = fail(f"{told.format_message().rstrip('.')}; see '{command} --help'.", 2)
        sys.exit(code if isinstance(code, int) else 0)


def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version, or help where no command is named."""
    if version:
        print(mt.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
