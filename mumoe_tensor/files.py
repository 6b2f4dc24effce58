"""Atomic writing of files and result folders, by one process at a time.

A command that replaces results writes the new ones into a hidden folder next to the old ones. Once they are
complete, this folder is renamed to mark it as complete, and then each result is moved into place. If a
process is killed in between, the next process that uses the folder finishes the replacement.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

#: Suffix of a file that is being written.
PART = ".part"
#: The lock file of a folder; its subfolder for incomplete results, and the name of this subfolder once they
#: are complete; in that subfolder, the list of older results to be removed.
LOCK, NEW, WHOLE, OBSOLETE = ".lock", ".new", ".whole", ".obsolete"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only once it is complete, and then replaces an existing file.

    Parameters
    ----------
    path : Path
        Its folder is created if necessary. If the block raises, the new file is deleted.

    Raises
    ------
    OSError
        If the file cannot be written, for example on a full disk; the error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # only its owner can read a temporary file
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and error.filename in (None, name):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock against other processes.

    Parameters
    ----------
    path : Path
        The lock file, which exists while the lock is held.
    timeout : float, default -1
        Seconds to wait for another process; −1 waits without limit.

    Raises
    ------
    filelock.Timeout
        If another process holds the lock.
    OSError
        If the lock file cannot be created.
    """
    from filelock import FileLock

    lock = FileLock(path, timeout=timeout)
    lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # some systems cannot remove an open file
            os.unlink(path)
        lock.release()


@contextmanager
def alone_in(folder: Path, *subfolders: str) -> Iterator[None]:
    """Lock a folder for writing, and clean up after processes that were killed.

    Parameters
    ----------
    folder : Path
        Created if necessary, and removed again if the block writes nothing into it.
    *subfolders : str
        Subfolders that are written as well.

    Raises
    ------
    OSError
        If another process holds the lock, or the folder cannot be created or written.
    """
    from filelock import Timeout

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(folder / LOCK, timeout=0))
            except Timeout:
                raise BlockingIOError(
                    f"only one process at a time can write into a folder; another is writing into {folder}."
                ) from None
            if (folder / WHOLE).exists():
                _change_places(folder)
            for part in (folder, *(folder / name for name in subfolders)):
                for left in part.glob(f".*{PART}"):
                    left.unlink()
            yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def replacing(
    folder: Path, results: Iterable[str], resumes: Callable[[Path], bool] = lambda new: False
) -> Iterator[Path]:
    """Write new results into a separate folder; if the block succeeds, they replace the old ones.

    Parameters
    ----------
    folder : Path
        A folder locked by `alone_in`.
    results : iterable of str
        Names of all files and folders that may be among the old results. Those without a new version are
        removed at the end. Other files are kept.
    resumes : callable, optional
        Takes the folder for the new results and returns whether a later call can resume from it. If so, the
        folder is kept when the block fails. By default it is deleted.

    Yields
    ------
    Path
        The folder for the new results.
    """
    new = folder / NEW
    if not resumes(new):
        remove(new)
    new.mkdir(exist_ok=True)
    try:
        yield new
        obsolete = [name for name in results if not (new / name).exists()]
        (new / OBSOLETE).write_text("\n".join(obsolete), encoding="utf-8")
    except BaseException:
        if not resumes(new):
            remove(new)
        raise
    new.rename(folder / WHOLE)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Replace old results by complete new ones; can be called again after an interruption."""
    whole = folder / WHOLE
    if (whole / OBSOLETE).exists():
        for name in (whole / OBSOLETE).read_text(encoding="utf-8").splitlines():
            remove(folder / name)
        for path in whole.iterdir():
            if path.name != OBSOLETE:
                if path.is_dir():  # a folder cannot replace another one
                    remove(folder / path.name)
                path.replace(folder / path.name)
        (whole / OBSOLETE).unlink()
    whole.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file, atomically.

    Parameters
    ----------
    rows : iterable of mapping
        The rows, each with exactly these columns.

    Raises
    ------
    ValueError
        If a row does not have these columns.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
