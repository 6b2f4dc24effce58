"""Files appear whole, in the place of what was there, or not at all."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mumoe_tensor.files import alone_in, replacing, whole_file, write_table

pytest.importorskip("filelock")


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


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


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


# ---- folders of results -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with two results, one of them a folder, and a file of somebody else."""
    folder = tmp_path / "out"
    write(folder, **{"table": "old", "steps/1": "old", "only old": "old", "note": "mine"})
    return folder


RESULTS = ("table", "steps", "only old")


def test_new_results_take_the_place_of_all_old_ones(old: Path) -> None:
    before = contents(old)
    with alone_in(old), replacing(old, RESULTS) as new:
        write(new, **{"table": "new", "steps/2": "new"})
        assert {name: text for name, text in contents(old).items() if name[0] != "."} == before
    assert contents(old) == {"table": b"new", "steps/2": b"new", "note": b"mine"}


def test_a_failure_changes_nothing(old: Path) -> None:
    before = contents(old)
    with pytest.raises(OSError, match="full"), alone_in(old), replacing(old, RESULTS) as new:
        write(new, table="new")
        raise OSError("full")
    assert contents(old) == before


def test_a_link_in_the_place_of_a_result_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", **{"1": "old"})
    out = tmp_path / "out"
    out.mkdir()
    (out / "steps").symlink_to(tmp_path / "elsewhere")
    with alone_in(out), replacing(out, ["steps"]) as new:
        write(new, table="new")
    assert [path.name for path in out.iterdir()] == ["table"]
    assert contents(tmp_path / "elsewhere") == {"1": b"old"}


def test_what_can_resume_is_kept(old: Path) -> None:
    def has_steps(new: Path) -> bool:
        return (new / "steps").exists()

    for _ in range(2):
        with pytest.raises(OSError, match="full"), alone_in(old), replacing(old, RESULTS, has_steps) as new:
            write(new, **{"steps/2": "new"})
            raise OSError("full")
    with alone_in(old), replacing(old, RESULTS, has_steps) as new:
        assert contents(new) == {"steps/2": b"new"}
    assert contents(old) == {"steps/2": b"new", "note": b"mine"}


@pytest.mark.parametrize("call", range(12))
def test_a_change_that_is_cut_off_is_finished_by_the_next(
    call: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every call of the system that the change makes; before the first rename the old results stay."""
    before, after = contents(old), {"table": b"new", "steps/2": b"new", "note": b"mine"}
    calls = 0
    with monkeypatch.context() as patched:

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **options: object) -> object:
                nonlocal calls
                calls += is_counted
                if is_counted and calls > call:
                    raise SystemExit  # from here on nothing happens, as in a process that was killed
                return real(*args, **options)

            return counting

        is_counted = False
        for name in ("rename", "replace", "unlink", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            with alone_in(old), replacing(old, RESULTS) as new:
                write(new, **{"table": "new", "steps/2": "new"})
                is_counted = True
            assert calls <= call
        except SystemExit:
            pass
    with alone_in(old):
        pass
    left = {name: text for name, text in contents(old).items() if not name.startswith(".new")}
    assert left == (before if call == 0 else after)
    with alone_in(old), replacing(old, RESULTS) as new:
        write(new, table="newer")
    assert contents(old) == {"table": b"newer", "note": b"mine"}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with alone_in(folder):
        with (
            pytest.raises(BlockingIOError, match="only one process at a time can write into a f"),
            alone_in(folder),
        ):
            pass
        write(folder, table="mine")
    assert contents(folder) == {"table": b"mine"}
    with alone_in(folder):
        pass


def test_the_lock_of_a_process_that_was_killed_is_none(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from mumoe_tensor.files import alone_in, replacing, whole_file\n"
        "folder = Path(sys.argv[1])\n"
        "with alone_in(folder), replacing(folder, ['table']) as new, whole_file(folder / 'table') as file:\n"
        "    (new / 'table').write_text('new')\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    write(tmp_path, **{".hidden": "mine", "a.part": "mine"})
    with alone_in(tmp_path), replacing(tmp_path, ["table"]) as new:
        write(new, table="newer")
    assert contents(tmp_path) == {"table": b"newer", ".hidden": b"mine", "a.part": b"mine"}


def test_halves_in_a_folder_of_results_are_removed(tmp_path: Path) -> None:
    write(tmp_path, **{"steps/.step.part": "half", "steps/step": "whole"})
    with alone_in(tmp_path, "steps"):
        pass
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["step"]


def test_where_nothing_is_written_no_folder_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError), alone_in(tmp_path / "a" / "b"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError), alone_in(tmp_path / "file" / "b"):
        pass
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, whole_file(tmp_path / "table") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "table") and list(tmp_path.iterdir()) == []
