"""Behaviour of all commands: help, version, numbers, errors in one line."""

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

#: What typer raises for a line it cannot parse. It exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
#: What to do first, shown where no command is named.
START = """Three commands to start with:

  mumoe-tensor formats
  mumoe-tensor fit cp --experts 64 --in-features 768 --out-features 768
  mumoe-tensor study --quick

The first lists the tensor formats, the second finds the rank at which a layer has the parameters of the
dense one, the third measures layers on this machine and writes a report.
"""
#: What seeds and sizes must stay below: torch and NumPy count in 64 bits.
LIMIT = 2**63
#: Options of which a second one is no correction of the first, but another tensor.
ONCE = ("--weight", "--inputs")


class Command(TyperCommand):
    """A command whose numbers are finite and fit into 64 bits, and that names a tensor once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in ONCE:
            if sum(arg.partition("=")[0] == option for arg in args) > 1:
                rule = f"{option} must be given once; several tensors are a pattern, as FILE:layers.*.weight"
                raise typer.BadParameter(rule, ctx=ctx)
        left: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            if isinstance(value, int | float) and not (isfinite(value) and abs(value) < LIMIT):
                rule = f"must be a finite number below 2**63, got {value}"
                raise typer.BadParameter(rule, ctx=ctx, param=param)  # type: ignore[arg-type]
        return left


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line."""

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
    """Print the version, or where to start; before a command, register the formats of other packages."""
    # Read when torch is loaded, which commands do: threads that wait for each other then leave the core to
    # other processes, those of GNU's OpenMP after some microseconds. What the environment has stays.
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
