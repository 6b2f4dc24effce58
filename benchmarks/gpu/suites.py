"""Stages that run other suites: the tests marked for a GPU, and the asv suites."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from statistics import median

from benchmarks.gpu.rows import ROOT, Row

RESULT = re.compile(r"\S+::(?P<test>\w+).* (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")


def marked_tests(device: str, toy: bool) -> Iterator[Row]:
    """Outcomes of the tests, one row per function; raises at the end if a test failed."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "-o", "addopts=", "-W", "default"]
    command += ["-p", "no:cacheprovider", "tests/test_cuda.py", *(["-k", "launches or few"] if toy else [])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for test, results in groupby(results_of(process), lambda result: result["test"]):
            yield {"test": test, **Counter(result["outcome"].lower() for result in results)}
    if process.returncode:
        raise SystemExit(f"pytest ended with exit status {process.returncode}")


def results_of(process: subprocess.Popen[str]) -> Iterator[re.Match[str]]:
    """Test results in the output of pytest, which goes to the log."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if result := RESULT.match(line):
            yield result


def asv_suites(device: str, toy: bool) -> Iterator[Row]:
    """Times of the cases that run on the device."""
    os.environ["MUMOE_BENCHMARK_PROFILE"] = "quick" if toy else "cuda"  # read when the suites are imported
    from benchmarks.guard import prepared

    for name, benchmark in prepared("time", lambda name: f"'{device}'" in name):
        benchmark.repeat = (3, 20, 0.2)
        yield {"case": name, "ms": 1e3 * median(benchmark.do_run()["samples"])}
        if toy:
            return
