"""Common behaviour of all commands: help, version, checks of numbers, one-line errors."""

from __future__ import annotations

import os
import sys
from functools import partial
from math import isfinite
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import mumoe_tensor as mt
from mumoe_tensor.cli.console import fail, failures, take_any_encoding, warn
from mumoe_tensor.formats.elsewhere import load_entry_points

#: The base class of typer's parse errors, of which typer exports only this subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
#: Shown if no command is given.
START = """Three commands to start with:

  mumoe-tensor formats
  mumoe-tensor fit cp --experts 64 --in-features 768 --out-features 768
  mumoe-tensor study --quick

The first lists the tensor formats. The second finds the rank at which a layer has as many parameters as
the dense layer. The third measures layers on this machine and writes a report.
"""
#: Upper limit for seeds and sizes, as torch and NumPy use 64 bits.
LIMIT = 2**63
#: Options that must be given once: a second value would be another tensor, not a correction of the first.
ONCE = ("--weight", "--inputs")


class Command(TyperCommand):
    """A command that checks that numbers are finite and fit into 64 bits, and a tensor is named once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in ONCE:
            if sum(arg.partition("=")[0] == option for arg in args) > 1:
                rule = f"{option} must be given once; use a pattern for several, such as FILE:layers.*.weight"
                raise typer.BadParameter(rule, ctx=ctx)
        left: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            if isinstance(value, int | float) and not (isfinite(value) and abs(value) < LIMIT):
                rule = f"must be a finite number below 2**63, got {value}"
                raise typer.BadParameter(rule, ctx=ctx, param=param)  # type: ignore[arg-type]
        return left


class OneLineErrors(TyperGroup):
    """A group of commands with one-line errors."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = partial(super().main, *args, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        take_any_encoding()
        try:
            code = run(standalone_mode=False)
        except typer.Abort:
            code = fail("interrupted.", 130)
        except _UsageError as error:
            usage: Any = error
            command = usage.ctx.command_path if usage.ctx else "mumoe-tensor"
            code = fail(f"{usage.format_message().rstrip('.')}; see '{command} --help'.", 2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        with failures():
            return super().invoke(ctx)


def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version or first steps; before a command, register the formats of other packages."""
    # Read when a command loads torch: waiting threads then yield their core to other processes, with GNU
    # OpenMP after some microseconds. Existing variables are not changed.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if version:
        print(mt.__version__)
    elif context.invoked_subcommand is None:
        print(START)
        print(context.get_help())
    else:
        for problem in load_entry_points():
            warn(problem)
