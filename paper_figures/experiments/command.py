"""The command line of an experiment, with its steps as subcommands."""

from __future__ import annotations

from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from mumoe_tensor.cli.values import read_jobs
from paper_figures.common import table

#: Steps by name; an entry may be the steps of a kind. The arguments of a step are those of its function.
Steps = Mapping[str, "Callable[..., Any] | Steps"]


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run one of the `STEPS` of an experiment, and print the rows that it returns.

    Bad input and missing files end the process with one line and exit code 2.

    The module is imported by name, because worker processes cannot import functions of `__main__`.

    Parameters
    ----------
    name : str
        Name of a module in this folder.
    arguments : sequence of str, optional
        Default: those of the command line.
    """
    module = import_module(f"paper_figures.experiments.{name}")
    parser = ArgumentParser(
        f"python -m {module.__name__}", description=module.__doc__, formatter_class=RawTextHelpFormatter
    )
    _add(parser, module.STEPS)
    options = vars(parser.parse_args(arguments))
    try:
        rows = options.pop("step")(**options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if rows:
        print(table(rows))


def _add(parser: ArgumentParser, steps: Any) -> None:
    if isinstance(steps, Mapping):
        parsers = parser.add_subparsers(required=True, metavar="|".join(steps))
        for name, step in steps.items():
            _add(parsers.add_parser(name), step)
        return
    parser.set_defaults(step=steps)
    for parameter in signature(steps).parameters.values():
        if parameter.name == "jobs":
            parser.add_argument("--jobs", type=read_jobs, default=1, help="parallel training runs")
        elif parameter.default is parameter.empty:
            parser.add_argument(parameter.name)
        else:
            parser.add_argument(f"--{parameter.name}", default=parameter.default)
