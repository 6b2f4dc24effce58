"""Formats from outside the package: of a user's file, and of installed packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

BLOCKS = """
import mumoe_tensor as mt

@mt.register
class Blocks(mt.Format):
    name, title, splits = "blocks", "Blocks", {"i": 2, "o": 2}

    def factors(self, modes):
        *experts, i1, i2, o1, o2 = modes
        return [*(mt.Factor(f"{n} r") for n in experts), mt.Factor(f"{i1} {o1} r"), mt.Factor(f"{i2} {o2} r")]
"""
SIZES = ("--experts", "4", "--in-features", "12", "--out-features", "20")


def command(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process that has other packages on its path."""
    search = [] if path is None else [str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*search, *sys.path])}
    line = [sys.executable, "-m", "mumoe_tensor", *words]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def install(folder: Path, *entries: str, source: str = BLOCKS) -> None:
    """What an installer leaves: a module, and the metadata with its entry points."""
    about = folder / "blocks_of_mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: blocks-of-mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[mumoe_tensor.formats]", *entries]) + "\n")
    (folder / "blocks_of_mine.py").write_text(source)


def test_formats_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "blocks_of_mine.py"
    file.write_text(BLOCKS)
    done = command("cost", "blocks", *SIZES, "--rank", "5", "--import", str(file), "--json")
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout)["parameters"] == 5 * (4 + 3 * 4 + 4 * 5)
    listed = json.loads(command("formats", "--import", str(file), "--json").stdout)
    assert [entry["factors"] for entry in listed if entry["name"] == "blocks"] == [
        ["N r", "I1 O1 r", "I2 O2 r"]
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "must be the path of a Python file, got"),
        ("1 / 0", "must run without an error, got ZeroDivisionError: division by zero"),
        ("def", "must run without an error, got SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(source: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad_formats.py"
    if source is not None:
        file.write_text(source)
    done = command("formats", "--import", str(file))
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_must_not_have_the_name_of_another_module(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text(BLOCKS)
    done = command("formats", "--import", str(file))
    assert done.returncode == 2 and "must not have the name of another module" in done.stderr


def test_formats_of_installed_packages(tmp_path: Path) -> None:
    install(tmp_path, "blocks = blocks_of_mine:Blocks")
    done = command("plan", "blocks", *SIZES, "--rank", "5", "--json", path=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert "blocks" in command("formats", path=tmp_path).stdout
    # The library looks for a name that it lacks, so that a config is read without an import.
    source = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mumoe_tensor as mt; "
    source += "assert 'blocks' not in mt.formats(); print(mt.get_format({'name': 'blocks'}).title)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout == "Blocks\n", done.stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("blocks = blocks_of_mine:Nothing", "'blocks_of_mine:Nothing' cannot be loaded: AttributeError"),
        ("blocks = nowhere:Blocks", "'nowhere:Blocks' cannot be loaded: ModuleNotFoundError"),
        ("other = blocks_of_mine:Blocks", "must have the name of its format, which is 'blocks'"),
        ("blocks = blocks_of_mine", "register must decorate or be called with a class"),
    ],
)
def test_a_broken_entry_point_is_a_warning(entry: str, message: str, tmp_path: Path) -> None:
    install(tmp_path, entry)
    name = entry.split()[0]
    done = command("plan", "cp", *SIZES, "--rank", "5", path=tmp_path)
    assert done.returncode == 0 and "FLOPs" in done.stdout
    assert f"format {name!r} of the entry point" in done.stderr and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_study_of_a_format_of_a_file(tmp_path: Path) -> None:
    """Its memory is measured in another process, which has the format too."""
    pytest.importorskip("plotly")
    pytest.importorskip("torch")
    file = tmp_path / "blocks_of_mine.py"
    file.write_text(BLOCKS)
    summed = '{"name":"sum","formats":[{"name":"shared","format":"dense"},"blocks"]}'
    done = command(
        "study", "--in-features", "12", "--out-features", "20", "--experts", "2", "--parameters", "2x",
        "--formats", f"[{summed}]", "--data", "none", "--quick", "--seconds", "0.001", "--devices",
        "cpu", "--jobs", "1", "--import", str(file), "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    (peak,) = (r for r in rows if r["subject"] == summed and r["quantity"] == "forward peak")
    assert peak["title"] == "sum_of(shared('dense'), 'blocks')" and not peak["note"]
