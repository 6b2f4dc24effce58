"""Files and folders of results: written whole or not at all, by one process at a time.

A command that replaces results writes the new ones into a hidden folder beside the old, and they change
places once the new ones are whole. The change is a rename of that folder, which says that it is whole, and
then one rename a result; if a process is killed in between, the next one in the folder finishes the change.
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

#: The end of the name of a file that is being written.
PART = ".part"
#: The lock of a folder; the folder in it for results that are not whole yet, and its name once they are; the
#: list in it of older results that have no successor.
LOCK, NEW, WHOLE, OBSOLETE = ".lock", ".new", ".whole", ".obsolete"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only once it is complete, in place of what was there.

    Parameters
    ----------
    path : Path
        Its folder is made if need be. If the block raises, nothing is left behind.

    Raises
    ------
    OSError
        If it cannot be written, such as on a full disk; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is its owner's alone
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
        Of a file for the lock alone; it is there while the lock is held.
    timeout : float, default -1
        Seconds to wait for another process; −1 for no limit.

    Raises
    ------
    filelock.Timeout
        If another process holds the lock.
    OSError
        If the file cannot be made.
    """
    from filelock import FileLock

    lock = FileLock(path, timeout=timeout)
    lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # some systems remove no file that is open
            os.unlink(path)
        lock.release()


@contextmanager
def alone_in(folder: Path, *subfolders: str) -> Iterator[None]:
    """Write into a folder as its only process, after what a killed one left there is tidied up.

    Parameters
    ----------
    folder : Path
        Is made if need be, and removed again if the block writes nothing into it.
    *subfolders : str
        Folders in it that are written into as well.

    Raises
    ------
    OSError
        If another process writes into it, or the folder cannot be made or written into.
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
                    f"one process at a time writes into a folder; another one is at work in {folder}."
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
    folder: Path, results: Iterable[str], goes_on: Callable[[Path], bool] = lambda new: False
) -> Iterator[Path]:
    """Write results beside the old ones; if the block ends well, they take the place of those.

    Parameters
    ----------
    folder : Path
        See `alone_in`, within which this is to be called.
    results : iterable of str
        Names of all files and folders that may be among the old results; those that are not written now are
        removed in the end. Other files stay.
    goes_on : callable, optional
        Of the folder of new results, whether the block can go on with what it has. If so that is kept where
        the block fails, for the next call; by default it never is.

    Yields
    ------
    Path
        The folder for the new results.
    """
    new = folder / NEW
    if not goes_on(new):
        remove(new)
    new.mkdir(exist_ok=True)
    try:
        yield new
        obsolete = [name for name in results if not (new / name).exists()]
        (new / OBSOLETE).write_text("\n".join(obsolete), encoding="utf-8")
    except BaseException:
        if not goes_on(new):
            remove(new)
        raise
    new.rename(folder / WHOLE)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Put whole new results into the place of the old ones; may be called again after it was cut off."""
    whole = folder / WHOLE
    if (whole / OBSOLETE).exists():
        for name in (whole / OBSOLETE).read_text(encoding="utf-8").splitlines():
            remove(folder / name)
        for path in whole.iterdir():
            if path.name != OBSOLETE:
                if path.is_dir():  # which takes no other's place
                    remove(folder / path.name)
                path.replace(folder / path.name)
        (whole / OBSOLETE).unlink()
    whole.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there.

    Parameters
    ----------
    path : Path
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file, whole or not at all.

    Parameters
    ----------
    path : Path
    columns : sequence of str
    rows : iterable of mapping
        With these columns and no other.

    Raises
    ------
    ValueError
        If a row has another column.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
