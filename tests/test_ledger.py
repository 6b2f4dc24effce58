"""Ledgers: rows that are only added, and a file that is whole at every moment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from math import isnan, nan
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mumoe_tensor.ledger import Ledger, plain

pytest.importorskip("filelock")

TABLES = Path(__file__).parents[1] / "paper_figures" / "tables"
COLUMNS = {"run": str, "seed": int, "loss": float, "ratio": float | None, "batch": int | None}
ROW: dict[str, Any] = {"run": "a", "seed": 0, "loss": 0.5, "ratio": None, "batch": None}
#: Texts of cells: no line ends but the newline, and no NUL.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"))
ROWS = st.tuples(TEXTS, st.integers(), st.floats(), st.none() | st.floats(), st.none() | st.integers()).map(
    lambda values: dict(zip(COLUMNS, values, strict=True))
)


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """A process with a ledger at the path of its first argument."""
    head = "import sys; from pathlib import Path; from mumoe_tensor.ledger import Ledger\n"
    head += "ledger = Ledger(Path(sys.argv[1]), {'run': str, 'part': int})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


# ---- what is read is what was added -----------------------------------------------------------------------


@given(st.lists(ROWS, min_size=1, max_size=5, unique_by=str), st.integers(0, 5))
def test_rows_come_back_as_they_are(rows: list[dict[str, Any]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.csv"
        ledger = Ledger(path, COLUMNS)
        for part in (rows[:cut], rows[cut:]):
            ledger.add(part)
        assert str(list(ledger)) == str(list(Ledger(path, COLUMNS))) == str(rows)
        memory = Ledger(None, COLUMNS)
        memory.add(rows)
        assert str(list(memory)) == str(rows) and len(memory) == len(rows)
        assert os.listdir(folder) == ["ledger.csv"]


def test_none_is_an_empty_cell_and_nan_a_value(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    Ledger(path, COLUMNS).add(
        [ROW | {"run": "a\u2028b", "loss": nan}, ROW | {"run": "ä, β\n“𝒳”", "ratio": nan, "batch": 3}]
    )
    expected = 'run,seed,loss,ratio,batch\na\u2028b,0,nan,,\n"ä, β\n“𝒳”",0,0.5,nan,3\n'
    assert path.read_bytes() == expected.encode()
    first, second = Ledger(path, COLUMNS)
    assert isnan(first["loss"]) and first["ratio"] is None and first["batch"] is None
    assert isnan(second["ratio"]) and second["batch"] == 3 and second["run"] == "ä, β\n“𝒳”"


def test_scalars_of_numpy_become_plain_numbers() -> None:
    ledger = Ledger(None, COLUMNS)
    ledger.add([ROW | {"seed": np.int64(3), "loss": np.float32(0.1), "ratio": 1}])
    (row,) = ledger
    assert (row["seed"], row["loss"], row["ratio"]) == (3, 0.1, 1.0)
    assert [type(row[name]) for name in ("seed", "loss", "ratio")] == [int, float, float]


def test_a_frame_has_the_types_of_the_columns() -> None:
    pandas = pytest.importorskip("pandas")
    ledger = Ledger(None, COLUMNS)
    for count in range(2):
        frame = ledger.frame()
        assert list(frame) == list(COLUMNS) and len(frame) == count
        kinds = [str(frame[name].dtype) for name in ("seed", "loss", "ratio", "batch")]
        assert kinds == ["Int64", "float64", "float64", "Int64"]
        ledger.add([ROW | {"seed": count}])
    frame = ledger.frame()
    assert frame["run"][0] == "a" and isnan(frame["ratio"][0]) and frame["batch"][0] is pandas.NA


# ---- runs that are done -----------------------------------------------------------------------------------


def test_a_run_that_has_rows_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.csv"
    ledger = Ledger(path, COLUMNS)
    assert not ledger.has(run="a") and list(ledger) == [] and not path.parent.exists()
    ledger.add([ROW, ROW | {"seed": 1, "loss": 1}])
    for each in (ledger, Ledger(path, COLUMNS)):
        assert each.has(run="a") and each.has(run="a", seed=1) and not each.has(run="b")
        assert [row["seed"] for row in each.of(run="a")] == [0, 1]
        assert [row["seed"] for row in each.of(ratio=None, loss=1)] == [1]
        with pytest.raises(ValueError, match=r"columns of the ledger, got \['task'\]"):
            each.has(task="a")
        with pytest.raises(ValueError, match="column seed"):
            each.of(seed="first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0.5}, "column seed: "),
        ({"seed": "x"}, "column seed: "),
        ({"seed": None}, "column seed: "),
        ({"seed": True}, "column seed: "),
        ({"loss": "low"}, "column loss: "),
        ({"loss": None}, "column loss: "),
        ({"batch": 1.0}, "column batch: "),
        ({"run": "a\rb"}, "column run: a cell must not contain NUL or carriage return"),
        ({"run": "\0"}, "column run: a cell must not contain NUL or carriage return"),
        ({"other": 1}, r"missing \[\], unknown \['other'\]"),
        ({}, "the rows of a ledger must be unique"),
    ],
)
def test_what_cannot_be_read_back_is_not_added(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv", COLUMNS)
    ledger.add([ROW])
    before = (tmp_path / "ledger.csv").read_bytes()
    with pytest.raises(ValueError, match=message):
        ledger.add([ROW | {"run": "b"}, ROW | change])
    assert (tmp_path / "ledger.csv").read_bytes() == before and list(ledger) == [ROW]
    with pytest.raises(ValueError, match=r"missing \['loss'\]"):
        ledger.add([{name: value for name, value in ROW.items() if name != "loss"}])
    with pytest.raises(ValueError, match="the rows of a ledger must be unique"):
        ledger.add([ROW | {"run": "c"}] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must not be empty"),
        (
            "run,other\na,b\n",
            r"missing \['seed', 'loss', 'ratio', 'batch'\], unknown or repeated \['other'\]",
        ),
        ("run,seed,loss,ratio,batch\na,x,1,,\n", "row 1, column seed: invalid literal"),
        ("run,seed,loss,ratio,batch\na,1,,,\n", "row 1, column loss: could not convert"),
        ("run,seed,loss,ratio,batch\na,1,1,,\na,1,1,,\n", "row 2 is repeated"),
        ("run,seed,loss,ratio,batch\na,1,1,,\nb,1", "the last one is truncated"),
    ],
)
def test_a_file_of_something_else_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Ledger(path, COLUMNS)
    assert str(error.value).startswith(str(path)) and path.read_text() == content


def test_types_of_columns() -> None:
    for kind in (bool, complex, int | str, None):
        with pytest.raises(TypeError, match=r"got .* for flag"):
            Ledger(None, {"flag": kind})


# ---- the file ---------------------------------------------------------------------------------------------


def test_rows_in_the_file_stay_as_they_are_written(tmp_path: Path) -> None:
    """Also with columns in another order, and as other programs write numbers and line ends."""
    path = tmp_path / "ledger.csv"
    before = "\ufeffloss,run,seed,ratio,batch\r\n0.50,a,0,1e-3,\r\n".encode()
    path.write_bytes(before)
    ledger = Ledger(path, COLUMNS)
    ledger.add([ROW | {"run": "b"}])
    assert path.read_bytes() == before + b"0.5,b,0,,\n"
    assert list(Ledger(path, COLUMNS)) == list(ledger) == [ROW | {"ratio": 0.001}, ROW | {"run": "b"}]


def test_a_table_without_rows_gets_its_first(tmp_path: Path) -> None:
    (tmp_path / "ledger.csv").write_text("batch,ratio,loss,seed,run\n")
    Ledger(tmp_path / "ledger.csv", COLUMNS).add([ROW])
    assert list(Ledger(tmp_path / "ledger.csv", COLUMNS)) == [ROW]


def test_columns_that_are_not_declared(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    ledger = Ledger(path, {"run": str}, more=str)
    ledger.add([{"run": "a", "torch": "2.10"}])
    ledger.add([{"run": "b", "torch": "2.11", "jax": 0.7}])
    assert path.read_text() == "run,torch,jax\na,2.10,\nb,2.11,0.7\n"
    expected = [{"run": "a", "torch": "2.10", "jax": ""}, {"run": "b", "torch": "2.11", "jax": "0.7"}]
    assert list(ledger) == list(Ledger(path, {"run": str}, more=str)) == expected
    guessed = Ledger(path, {}, more=plain)
    assert [row["torch"] for row in guessed] == [2.1, 2.11] and guessed.of(jax=None, run="a")
    assert guessed.has(torch="2.1")


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_tables_of_experiments_are_written_the_same(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    rows = list(Ledger(path, {}, more=plain))
    ledger = Ledger(copy, {}, more=plain)
    ledger.add(rows[:-1])
    ledger.add(rows[-1:])
    assert copy.read_bytes() == path.read_bytes()


# ---- processes --------------------------------------------------------------------------------------------

ADD = """
print("began", flush=True)
for k in range(int(sys.argv[3]), 10**6):
    ledger.add({"run": f"{sys.argv[2]} {k}", "part": part} for part in range(2000))
"""


def test_killed_while_it_adds_it_leaves_whole_runs(tmp_path: Path) -> None:
    path, columns = tmp_path / "ledger.csv", {"run": str, "part": int}
    count = 0
    for delay in (0.03, 0.05, 0.07):
        process = start(ADD, path, "x", count)
        assert process.stdout is not None and process.stdout.readline() == "began\n"
        while not path.exists() and process.poll() is None:
            sleep(0.01)
        sleep(delay)
        process.kill()
        process.communicate()
        rows = list(Ledger(path, columns))
        count = len(rows) // 2000
        assert rows == [{"run": f"x {k}", "part": part} for k in range(count) for part in range(2000)]
    assert count > 0


def test_two_processes_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    code = "for k in range(20): ledger.add([{'run': sys.argv[2], 'part': k}])\nprint(len(ledger))"
    processes = [start(code, path, name) for name in "ab"]
    lengths = [int(process.communicate()[0]) for process in processes]
    rows = list(Ledger(path, {"run": str, "part": int}))
    assert len(rows) == max(lengths) == 40
    for name in "ab":
        assert [row["part"] for row in rows if row["run"] == name] == list(range(20))
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.csv"]


def test_what_another_adds_counts_as_done(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    one, other = Ledger(path, COLUMNS), Ledger(path, COLUMNS)
    one.add([ROW])
    other.add([ROW | {"run": "b"}])
    assert other.has(run="a") and [row["run"] for row in other] == ["a", "b"]
    with pytest.raises(ValueError, match="the rows of a ledger must be unique"):
        one.add([ROW | {"run": "b"}])


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.csv"
    ledger = Ledger(path, COLUMNS)
    ledger.add([ROW])
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", full)
        ledger.add([ROW | {"run": "b"}])
    assert path.read_bytes() == before and list(ledger) == [ROW]
    ledger.add([ROW | {"run": "b"}])
    assert [row["run"] for row in Ledger(path, COLUMNS)] == ["a", "b"]
