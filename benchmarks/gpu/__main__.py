"""Run the check.

    python -m benchmarks.gpu --out DIR [NAME ...] [--budget SECONDS] [--fake]

Every stage writes its rows to ``DIR/NAME.jsonl`` as they are measured. After each stage, the tables of all
are written to ``DIR/gpu.txt``; ``DIR/gpu.log`` has the output. The exit status is 1 if a stage failed or,
with ``--fake``, did not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.stages import STAGES
from benchmarks.harness import Report, about_text
from mumoe_tensor.files import whole_file
from mumoe_tensor.measure.environment import environment

BUDGET = 480.0


def command(name: str, device: str, sizes: str, rows: Path) -> list[str]:
    """The command that runs a stage."""
    return [sys.executable, "-m", "benchmarks.gpu.stages", name, device, sizes, str(rows)]


def run(order: Sequence[str], limit: float, log: Path) -> str:
    """Run a process for at most `limit` seconds; return the outcome as text."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            order, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"cut after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # its children, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return "done"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"failed with exit status {status}: {last[:100]}"


def check(folder: Path, names: Sequence[str], device: str, sizes: str, budget: float) -> bool:
    """Run stages one after another; return whether none failed, and whether all toy sizes were finished."""
    start, about = monotonic(), environment() | {"cuda": torch.version.cuda, "sizes": sizes}
    outcomes = Report("stages", "Stages", {"stage": "", "outcome": "", "seconds": ".0f", "rows": "d"}, [])
    reports = [outcomes]
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        stage, begun, path = STAGES[name], monotonic(), folder / f"{name}.jsonl"
        path.write_text("")
        limit, outcome = min(stage.seconds, budget - (begun - start)), f"not run: the {budget:.0f} s are over"
        if limit > 0:
            outcome = run(command(name, device, sizes, path), limit, folder / "gpu.log")
        lines = path.read_text().splitlines(keepends=True)
        # The last line is incomplete if the process was killed while it wrote it.
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        seconds = monotonic() - begun
        outcomes.rows.append({"stage": name, "outcome": outcome, "seconds": seconds, "rows": len(rows)})
        reports.append(Report(name, stage.title, stage.columns, rows, stage.notes))
        text = "\n\n".join([about_text(about), *(str(report) for report in reports if report.rows)])
        with whole_file(folder / "gpu.txt") as file:
            file.write(f"{text}\n".encode())
    print((folder / "gpu.txt").read_text())
    bad = ("failed",) if sizes == "full" else ("failed", "cut", "not run")
    return not any(row["outcome"].startswith(bad) for row in outcomes.rows)


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
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.log").unlink(missing_ok=True)
    device, sizes = ("cpu", "toy") if options.fake else ("cuda", "full")
    return int(not check(folder, options.names or list(STAGES), device, sizes, options.budget))


if __name__ == "__main__":
    # Treat termination as an interrupt: the running stage must not outlive the check.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
