"""Run the check and store every row as soon as it is measured.

    python -m benchmarks.gpu --out DIR [NAME ...] [--budget SECONDS] [--fake]

Writes ``gpu.json``, ``gpu.txt`` and, with the output of the stages, ``gpu.log``. The exit status is 1 if a
stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer
from time import monotonic
from typing import Any

import torch

from benchmarks.gpu.rows import ROOT, Row
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.table import as_text
from benchmarks.harness import Report, write_json
from mumoe_tensor.files import whole_file
from mumoe_tensor.measure.environment import environment

BUDGET = 480.0


def command(name: str, device: str, sizes: str) -> list[str]:
    """The command that runs a stage."""
    return [sys.executable, "-m", "benchmarks.gpu.stages", name, device, sizes]


def run(order: Sequence[str], limit: float, log: Path, add: Callable[[Row], None]) -> str:
    """Run a process that prints rows, add each row, and return the outcome as text."""
    expired = Event()
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            order, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):

        def kill() -> None:
            """Kill the process and its children."""
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def expire() -> None:
            expired.set()
            kill()

        timer = Timer(limit, expire)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith("\n"):  # else it was killed while printing
                    add(json.loads(line))
            process.wait()
        finally:
            timer.cancel()
            kill()
    if expired.is_set():
        return f"cut after {limit:.0f} s"
    if process.returncode == 0:
        return "done"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"failed with exit status {process.returncode}: {last[:100]}"


def check(
    folder: Path, names: Sequence[str], about: Mapping[str, Any], device: str, sizes: str, budget: float
) -> bool:
    """Run stages one after another; return whether none failed."""
    start = monotonic()
    outcomes = Report("stages", "Stages", {"stage": "", "outcome": "", "seconds": ".0f", "rows": "d"}, [], [])
    reports = [outcomes]

    def save() -> None:
        write_json(folder / "gpu.json", reports, about)
        with whole_file(folder / "gpu.txt") as file:
            file.write(as_text(reports, about).encode())

    for name in names:
        stage = STAGES[name]
        report = Report(name, stage.title, stage.columns, [], list(stage.notes))
        outcome: Row = {"stage": name, "outcome": "cut with the whole check"}
        outcomes.rows.append(outcome)
        reports.append(report)
        save()
        print(f"{name} ...", file=sys.stderr, flush=True)

        def add(row: Row, report: Report = report) -> None:
            report.rows.append(row)
            save()

        begun = monotonic()
        limit = min(stage.seconds, budget - (begun - start))
        if limit > 0:
            outcome["outcome"] = run(command(name, device, sizes), limit, folder / "gpu.log", add)
        else:
            outcome["outcome"] = f"not run: the {budget:.0f} s are over"
        outcome |= {"seconds": monotonic() - begun, "rows": len(report.rows)}
        save()
    print(as_text(reports, about))
    return not any(row["outcome"].startswith("failed") for row in outcomes.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named stages, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(STAGES)}; default: all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="total time limit")
    parser.add_argument("--fake", action="store_true", help="toy sizes on the CPU, to try the stages")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}; the stages are {', '.join(STAGES)}")
    if not (options.fake or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --fake runs toy sizes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.log").unlink(missing_ok=True)
    device, sizes = ("cpu", "toy") if options.fake else ("cuda", "full")
    about = environment() | {"cuda": torch.version.cuda, "fake": options.fake}
    names = options.names or list(STAGES)
    return int(not check(options.out, names, about, device, sizes, options.budget))


if __name__ == "__main__":
    # Treat termination as an interrupt: the running stage must not outlive the check.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
