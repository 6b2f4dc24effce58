"""One fault in a copy of the repository, and the first test that notices it.

Importing torch, pytest and the like takes longer than most tests: one server imports them, and each copy is
tested in a process forked from it, which begins without our modules.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = REPOSITORY / "tests"

SLOW = [
    "torch._dynamo", "torch.distributed.tensor.parallel", "jax", "tltorch", "matplotlib.pyplot",
    "plotly.graph_objects", "sklearn.linear_model", "accelerate", "tensorboardX", "typer", "pytest",
    "hypothesis.extra.numpy",
]  # fmt: skip

_processes = multiprocessing.get_context("forkserver")


def import_once() -> None:
    """Have the server import the slow packages when it starts."""
    _processes.set_forkserver_preload(SLOW)


@dataclass(frozen=True)
class Fault:
    """`old` in `file` becomes `new`; `tests` are the files, or functions of them, that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def path_of(name: str) -> str:
    """The path of tests: ``nn/test_gate::test_x`` or, of a file in the folder itself, ``gates::test_x``."""
    file, *function = name.split("::")
    return "::".join([f"tests/{'' if '/' in file else 'test_'}{file}.py", *function])


def run_pytest(copy: Path, tests: list[str], output: Path) -> None:
    """Run tests of a copy as ``python -m pytest`` in it does; the process ends with pytest's status."""
    gc.freeze()  # no collection of garbage looks at what the server has imported
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ |= {
        "PYTHONPATH": str(copy),
        "MUMOE_HYPOTHESIS_PROFILE": "fault",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(copy / ".hypothesis"),  # else in the folder of the server
    }
    ours = (REPOSITORY, TESTS, *TESTS.iterdir())
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) not in ours)]
    # Plain assertions: the plugins are imported already, and nobody reads why a test fails.
    sys.argv = ["pytest", "-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *tests]
    sys.exit(pytest.main(sys.argv[1:]))


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What no test of a copy reads."""
    others = {"data", "docs", "results", "dist", "build"} if Path(folder) == REPOSITORY else set()
    return others | {name for name in names if name.startswith(".")}


def caught_by(fault: Fault, folder: Path, timeout: float | None = None) -> str | None:
    """Plant a fault in a copy of the repository and name the first test that fails, if one does."""
    copy = folder / re.sub(r"\W+", "-", fault.name)
    shutil.copytree(REPOSITORY, copy, ignore=_left_out)
    source, output = copy / fault.file, copy.with_suffix(".txt")
    source.write_text(source.read_text().replace(fault.old, fault.new, 1))
    for compiled in source.parent.glob(f"__pycache__/{source.stem}.*"):
        compiled.unlink()  # which Python takes for the new source if it was changed in the same second
    tests = [path_of(name) for name in fault.tests.split()]
    process = _processes.Process(target=run_pytest, args=(copy, tests, output))
    process.start()
    process.join(timeout)
    has_ended = process.exitcode is not None
    process.kill()
    process.join()
    shutil.rmtree(copy)
    if not has_ended:
        return f"no end after {timeout:g} s"
    printed = output.read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    if process.exitcode in (1, 2) and failed:  # 2: a test file could not be imported
        return failed.group(1)
    if process.exitcode == 0:
        return None
    raise RuntimeError(f"fault {fault.name!r}: pytest could not run.\n{printed}")
