"""The study of a layer: mixtures at its parameters beside it, their cost, time, memory and quality.

`run` does all of it and leaves a folder: the table of measurements, the page, the pictures, and the setting
that runs it again. `prepare`, `plan`, `measure` and `write` are its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mumoe_tensor.files import whole_file
from mumoe_tensor.study.layers import LAYERS, Layer, get_layer
from mumoe_tensor.study.report import to_json, write
from mumoe_tensor.study.results import Measurement, Results
from mumoe_tensor.study.settings import Setting, prepare
from mumoe_tensor.study.subjects import UNITS, Subject, fitted
from mumoe_tensor.study.sweep import Plan, measure, plan
from mumoe_tensor.study.table import tables
from mumoe_tensor.study.words import notes, paragraph

__all__ = [
    "LAYERS",
    "UNITS",
    "Layer",
    "Measurement",
    "Plan",
    "Results",
    "Setting",
    "Subject",
    "fitted",
    "get_layer",
    "measure",
    "notes",
    "open_folder",
    "paragraph",
    "plan",
    "prepare",
    "run",
    "tables",
    "to_json",
    "write",
]


def run(
    layer: str | Layer = "gpt2-mlp",
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Callable[[float, float, str], None] | None = None,
    **options: Any,
) -> Results:
    """Make a study of a layer.

    Parameters
    ----------
    layer : str or Layer, default "gpt2-mlp"
        A name in `LAYERS`, or sizes of one's own.
    out : str or Path, optional
        Folder for what it finds; nothing is written if it is left out. A study that was begun there goes on.
    fresh : bool, default False
        Measure everything again.
    progress : callable, optional
        Called as ``progress(seconds done, seconds in all, text)``; seconds are an estimate.
    **options
        See `prepare`.

    Returns
    -------
    Results

    Raises
    ------
    ValueError, TypeError
        As `prepare`; or if the folder holds another study.
    ImportError
        If `out` is given and matplotlib or plotly is not installed. That is said before anything is measured.
    OSError
        If the folder cannot be made.

    Examples
    --------
    >>> import mumoe_tensor.study as study
    >>> planned = study.plan(study.prepare("clip-head", experts=16, formats=["cp", "tr"], data="none"))
    >>> [(subject.title, subject.rank) for subject in planned.subjects]
    [('Linear layer', ()), ('CP', (424,)), ('Tensor Ring', (4, 4, 107)), ('Sparse mixture, top 2', ())]
    """
    planned = plan(prepare(layer, **options))
    results = Results() if out is None else open_folder(planned.setting, out, fresh=fresh)
    measure(planned, results, progress)
    if out is not None:
        write(planned, results, Path(out))
    return results


def open_folder(setting: Setting, out: str | Path, *, fresh: bool = False) -> Results:
    """Make the folder of a study, or go on with the one that is there.

    Parameters
    ----------
    setting : Setting
    out : str or Path
    fresh : bool, default False
        Forget what was measured.

    Returns
    -------
    Results
        What was measured already; what is added to it is kept in ``results.csv``.

    Raises
    ------
    ValueError
        If the folder holds a study with another setting.
    ImportError
        If matplotlib or plotly is not installed.
    OSError
        If the folder cannot be made.
    """
    for package in ("matplotlib", "plotly"):
        if find_spec(package) is None:
            raise ImportError(f"the study draws with {package}; pip install 'mumoe_tensor[study]'.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    table, told = folder / "results.csv", folder / "study.json"
    if fresh:
        table.unlink(missing_ok=True)
    elif told.exists() and table.exists() and Setting.from_json(told) != setting:
        raise ValueError(
            f"{folder} holds a study with another setting (study.json); choose another folder, or measure "
            "afresh to replace it."
        )
    with whole_file(told) as file:
        file.write(setting.to_json().encode())
    return Results(table)
