"""The study of a layer: compare it with mixtures of equal parameters by cost, time, memory and quality.

`run` makes a whole study and writes a folder: the table of measurements, the page, the plots, and the
setting to repeat it. `prepare`, `plan`, `measure` and `write` are its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mumoe_tensor.extras import require
from mumoe_tensor.files import alone_in, replacing, whole_file
from mumoe_tensor.study.beside import beside, read_study
from mumoe_tensor.study.layers import LAYERS, Layer, dense, get_layer
from mumoe_tensor.study.report import RESULTS, to_json, write
from mumoe_tensor.study.results import Measurement, Results
from mumoe_tensor.study.settings import Setting, prepare
from mumoe_tensor.study.subjects import UNITS, Subject, fitted
from mumoe_tensor.study.sweep import Plan, measure, plan
from mumoe_tensor.study.table import cells, notes
from mumoe_tensor.study.weights import read_covariance, read_weight

__all__ = [
    "LAYERS",
    "UNITS",
    "Layer",
    "Measurement",
    "Plan",
    "Results",
    "Setting",
    "Subject",
    "beside",
    "cells",
    "dense",
    "fitted",
    "get_layer",
    "measure",
    "notes",
    "open_folder",
    "plan",
    "prepare",
    "read_covariance",
    "read_study",
    "read_weight",
    "resumed",
    "run",
    "to_json",
    "write",
]


def run(
    layer: str | Layer | None = None,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    jobs: int | str = 1,
    progress: Callable[[float, float, str], None] | None = None,
    **options: Any,
) -> Results:
    """Make a study of a layer.

    Parameters
    ----------
    layer : str or Layer, optional
        A name in `LAYERS`, or another layer; by default the layer of `weight`, or else ``"gpt2-mlp"``.
    out : str or Path, optional
        Folder for the results; by default nothing is written. An unfinished study in it is resumed.
    fresh : bool, default False
        Measure everything again.
    jobs : int or str, default 1
        Processes for tasks that are not timed.
    progress : callable, optional
        Called as ``progress(done, total, text)``, with estimated seconds.
    **options
        See `prepare`.

    Returns
    -------
    Results

    Raises
    ------
    ValueError, TypeError
        As in `prepare`; or if the folder holds another study.
    ImportError
        If `out` is given and a package of the extra study is not installed. This is checked
        before anything is measured.
    OSError
        If the folder cannot be made.

    Examples
    --------
    >>> import mumoe_tensor.study as study
    >>> options = dict(experts=16, formats=["cp", "tr"], parameters="match", data="none")
    >>> planned = study.plan(study.prepare("clip-head", **options))
    >>> [(subject.title, subject.spec.rank) for subject in planned.subjects]
    [('Linear layer', ()), ('CP', (424,)), ('Tensor Ring', (4, 4, 107)), ('Sparse mixture, top 2', ())]
    """
    setting = prepare(layer, **options)
    planned = plan(setting if out is None or fresh else resumed(setting, out))
    if out is None:
        results = Results()
        measure(planned, results, progress, jobs)
        return results
    with open_folder(planned.setting, out, fresh=fresh) as (folder, results):
        measure(planned, results, progress, jobs)
        write(planned, results, folder)
    return results


def resumed(setting: Setting, out: str | Path) -> Setting:
    """The setting with which to resume the study in a folder: its formats, experts and so on are kept.

    Raises
    ------
    ValueError
        If the folder holds a study with another setting.
    """
    path = Path(out, "study.json")
    if not (path.exists() and path.with_name("results.csv").exists()):
        return setting
    there = Setting.from_json(path)
    try:
        return setting.with_all_of(there)
    except ValueError as error:
        raise ValueError(
            f"{out} holds a study with another setting (study.json); choose another folder, or measure "
            f"afresh to replace it: {error}"
        ) from error


@contextmanager
def open_folder(setting: Setting, out: str | Path, *, fresh: bool = False) -> Iterator[tuple[Path, Results]]:
    """Make the folder of a study, or resume the study in it.

    A fresh study is written to a hidden folder, ``.new``, and replaces the old one when it is finished. After
    an interruption, the same call resumes it.

    Parameters
    ----------
    fresh : bool, default False
        Measure everything again, even if the folder holds a study with another setting.

    Yields
    ------
    Path
        The folder to write into.
    Results
        Measurements so far; new ones are appended to ``results.csv``.

    Raises
    ------
    ValueError
        If the folder holds a study with another setting, or with more values than this one; see `resumed`.
    ImportError
        If a package of the extra study is not installed.
    OSError
        If the folder cannot be made, or another process is writing to it.
    """
    require("study")
    folder = Path(out)

    def is_begun(folder: Path) -> bool:
        setting_file, table = folder / "study.json", folder / "results.csv"
        return setting_file.exists() and table.exists() and Setting.from_json(setting_file) == setting

    def begin(folder: Path) -> tuple[Path, Results]:
        results = Results(folder / "results.csv")
        with whole_file(folder / "study.json") as file:
            file.write(setting.to_json().encode())
        return folder, results

    with alone_in(folder):
        if not (folder / "results.csv").exists():
            yield begin(folder)
        elif fresh:
            with replacing(folder, RESULTS, is_begun) as new:
                yield begin(new)
        elif resumed(setting, folder) != setting:
            raise ValueError(f"{folder} holds a study with more than this setting; see resumed.")
        else:
            yield begin(folder)
