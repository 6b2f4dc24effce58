"""The command line: parses arguments, calls the library and prints results.

Invalid input ends with exit code 2 and one line on stderr. With ``--json``, stdout contains only JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mumoe_tensor import extras

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    # For command-line users, one line is clearer than a traceback.
    print(f"mumoe-tensor: {extras.missing(error.name or '') or error}", file=sys.stderr)
    raise SystemExit(2) from error

from mumoe_tensor.cli.app import Command, OneLineErrors, main
from mumoe_tensor.cli.bias import bias
from mumoe_tensor.cli.browser import inspect
from mumoe_tensor.cli.data import data
from mumoe_tensor.cli.layers import cost, fit, formats, plan
from mumoe_tensor.cli.replacement import replace
from mumoe_tensor.cli.studies import study
from mumoe_tensor.cli.training import tokenize, train_gpt2, train_head, train_mixer

app = typer.Typer(
    cls=OneLineErrors,
    help="Plan, measure and train layers of experts whose weights are factorized tensors.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(invoke_without_command=True)(main)
commands: list[Callable[..., None]] = [
    formats, plan, cost, fit, study, data, tokenize, inspect, replace, bias,
]  # fmt: skip
for command in commands:
    app.command(cls=Command)(command)

train = typer.Typer(
    cls=OneLineErrors,
    help="Train a head, an MLP-Mixer or a GPT-2 on your own data.",
    rich_markup_mode="markdown",
)
train.command("head", cls=Command)(train_head)
train.command("mixer", cls=Command)(train_mixer)
train.command("gpt2", cls=Command)(train_gpt2)
app.add_typer(train, name="train")

__all__ = ["app"]
