"""The study of a layer: compare it with mixtures of equal parameters by cost, time, memory and quality.

`run` makes a whole study and writes a folder: the table of measurements, the page, the plots, and the
setting to repeat it. `prepare`, `plan`, `measure` and `write` are its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mumoe_tensor.extras import require
from mumoe_tensor.files import alone_in, replacing, whole_file
from mumoe_tensor.progress import Progress
from mumoe_tensor.study.layers import LAYERS, Layer, dense
from mumoe_tensor.study.report import RESULTS, to_json, write
from mumoe_tensor.study.results import Measurement, Results
from mumoe_tensor.study.settings import Setting, prepare
from mumoe_tensor.study.subjects import UNITS, Subject, fitted
from mumoe_tensor.study.sweep import Plan, measure, plan
from mumoe_tensor.study.tables import beside, cells, notes, read_study
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
    "measure",
    "notes",
    "open_folder",
    "plan",
    "prepare",
    "read_covariance",
    "read_study",
    "read_weight",
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
    progress: Progress | None = None,
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
    ValueError, TypeError, ImportError, OSError
        As in `prepare`, `plan` and `open_folder`, before anything is measured.

    Examples
    --------
    >>> import mumoe_tensor.study as study
    >>> options = dict(experts=16, formats=["cp", "tr"], parameters="match", data="none")
    >>> planned = study.plan(study.prepare("clip-head", **options))
    >>> [(subject.title, subject.spec.rank) for subject in planned.subjects]
    [('Linear layer', ()), ('CP', (424,)), ('Tensor Ring', (4, 4, 107)), ('Sparse mixture, top 2', ())]
    """
    setting = prepare(layer, **options)
    if out is None:
        results = Results()
        measure(plan(setting), results, progress, jobs)
        return results
    with open_folder(setting, out, fresh=fresh) as (planned, results, folder):
        measure(planned, results, progress, jobs)
        write(planned, results, folder)
    return results


@contextmanager
def open_folder(
    setting: Setting, out: str | Path, *, fresh: bool = False
) -> Iterator[tuple[Plan, Results, Path]]:
    """Make the folder of a study, or resume the study in it, whose formats, experts and so on are kept.

    A fresh study is written to a hidden folder, ``.new``, and replaces the old one when it is finished. After
    an interruption, the same call resumes it.

    Parameters
    ----------
    fresh : bool, default False
        Measure everything again, even if the folder contains a study with another setting.

    Yields
    ------
    Plan
    Results
        Measurements so far; new ones are appended to ``results.csv``.
    Path
        The folder to write into.

    Raises
    ------
    ValueError
        As in `plan`, or if the folder contains a study with another setting.
    ImportError
        If a package of the extra study is not installed.
    OSError
        If the folder cannot be made, or another process is writing to it.
    """
    require("study")
    folder = Path(out)

    def holds_study(folder: Path) -> bool:
        return (folder / "study.json").exists() and (folder / "results.csv").exists()

    def resumes(new: Path) -> bool:
        return holds_study(new) and Setting.from_json(new / "study.json") == setting

    with alone_in(folder), ExitStack() as stack:
        fresh = fresh and (folder / "results.csv").exists()
        if not fresh and holds_study(folder):
            there = Setting.from_json(folder / "study.json")
            try:
                setting = setting.with_all_of(there)
            except ValueError as error:
                raise ValueError(
                    f"{folder} contains a study with another setting (study.json); choose another folder, or "
                    f"measure afresh to replace it: {error}"
                ) from error
        planned = plan(setting)
        if fresh:
            folder = stack.enter_context(replacing(folder, RESULTS, resumes))
        results = Results(folder / "results.csv")
        with whole_file(folder / "study.json") as file:
            file.write(setting.to_json().encode())
        yield planned, results, folder
