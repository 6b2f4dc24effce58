"""Files appear whole, in the place of what was there, or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mumoe_tensor.files import whole_file, write_table


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file.csv"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists() if before is None else path.read_bytes() == before
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.csv"])
    assert before is None or path.read_bytes() == before
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    rows = [{"name": 'a, "b"\nc', "value": 0.1}, {"name": "", "value": None}]
    write_table(path, ["value", "name"], rows)
    assert b"\r" not in path.read_bytes()
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["value", "name"]
        assert list(reader) == [{"name": 'a, "b"\nc', "value": "0.1"}, {"name": "", "value": ""}]


def test_a_row_with_another_column_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_table(path, ["name"], [{"name": "a"}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other"):
        write_table(path, ["name"], [{"name": "b"}, {"name": "c", "other": 1}])
    assert path.read_bytes() == before
