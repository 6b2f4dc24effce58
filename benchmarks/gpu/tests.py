"""The tests that are marked for a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from benchmarks.gpu import ROOT
from benchmarks.harness import Row

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
    """Test results in the output of pytest, which is also printed."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if result := RESULT.match(line):
            yield result
