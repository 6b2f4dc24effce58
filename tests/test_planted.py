"""What tells that a fault was noticed, on a repository of one module."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest
from planted import Fault, caught_by

TESTS_OF_IT = """
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import halving

def test_halves():
    assert halving.half(6) == 3

def test_halves_in_another_process():
    code = "import halving; print(halving.half(6))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed == "3.0\\n"

def test_is_of_the_copy():
    assert Path(halving.__file__).parent == Path.cwd() == Path(sys.path[1]) == Path(os.environ["PYTHONPATH"])
    assert not {"mumoe_tensor", "conftest", "vision", "faults"} & sys.modules.keys()

def test_waits():
    time.sleep(0 if halving.half(6) == 3 else 60)

def test_ends_python():
    if halving.half(6) != 3:
        os._exit(3)

def test_warns_of_nothing():
    halving.half(1)
"""
SOURCE = "def half(n):\n    return n / 2\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "repository"
    (place / "tests").mkdir(parents=True)
    (place / "halving.py").write_text(SOURCE)
    (place / "tests" / "test_halving.py").write_text(TESTS_OF_IT)
    monkeypatch.setattr(planted, "REPOSITORY", place)
    return place


def planted_for(test: str, new: str = "n / 3") -> Fault:
    return Fault("halves: wrong", "halving.py", "n / 2", new, f"halving::{test}".removesuffix("::"))


@pytest.mark.parametrize("test", ["test_halves", "test_halves_in_another_process", ""])
def test_the_first_test_that_fails_is_named(repository: Path, tmp_path: Path, test: str) -> None:
    name = f"tests/test_halving.py::{test or 'test_halves'}"
    assert caught_by(planted_for(test), tmp_path) == name
    assert (repository / "halving.py").read_text() == SOURCE
    assert not (tmp_path / "halves-wrong").exists()


def test_a_file_that_cannot_be_imported_is_a_fault_noticed(repository: Path, tmp_path: Path) -> None:
    assert caught_by(planted_for("", "n /"), tmp_path) == "tests/test_halving.py"


@pytest.mark.parametrize("test", ["test_is_of_the_copy", "test_warns_of_nothing"])
def test_a_fault_that_no_test_notices_survives(repository: Path, tmp_path: Path, test: str) -> None:
    assert caught_by(planted_for(test), tmp_path) is None


@pytest.mark.parametrize("test", ["test_that_there_is_not", "test_ends_python"])
def test_tests_that_cannot_run_are_an_error(repository: Path, tmp_path: Path, test: str) -> None:
    with pytest.raises(RuntimeError, match=r"'halves: wrong': pytest could not run"):
        caught_by(planted_for(test), tmp_path)


def test_a_test_without_end_is_stopped(repository: Path, tmp_path: Path) -> None:
    assert caught_by(planted_for("test_waits"), tmp_path, timeout=3) == "no end after 3 s"
    assert not (tmp_path / "halves-wrong").exists()
