"""The study: every format at the parameters of a published layer, its cost and its measured forward.

`prepare` fits and counts, `measure` runs, `write` leaves the table and the picture; `run` does all three.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mumoe_tensor.study.layers import LAYERS, Layer, get_layer
from mumoe_tensor.study.report import notes, tables, to_json, write_csv
from mumoe_tensor.study.sweep import Progress, Row, Study, Subject, Sweep, environment, measure, prepare

__all__ = [
    "LAYERS",
    "Layer",
    "Row",
    "Study",
    "Subject",
    "Sweep",
    "check_output",
    "environment",
    "get_layer",
    "measure",
    "notes",
    "prepare",
    "run",
    "tables",
    "to_json",
    "write",
    "write_csv",
]


def run(
    layer: str | Layer = "gpt2-mlp",
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Study:
    """Make a study of a layer.

    Parameters
    ----------
    layer : str or Layer, default "gpt2-mlp"
        A name in `LAYERS`, or sizes of one's own.
    out : str or Path, optional
        Folder for the table and the picture; nothing is written if it is left out.
    progress : callable, optional
        Called as ``progress(done, total, text)``.
    **settings
        `experts`, `formats`, `parameters`, `batch`, `repetitions`, `seconds`, `memory`, `seed` and `quick`;
        see `prepare`.

    Returns
    -------
    Study

    Raises
    ------
    ValueError, TypeError
        As `prepare`.
    ImportError
        If `out` is given and matplotlib is not installed. That is said before anything is measured.
    OSError
        If the folder cannot be made.

    Examples
    --------
    >>> import mumoe_tensor.study as study
    >>> found = study.run("clip-head", experts=16, formats=["cp"], quick=True)
    >>> found.of("cp")["numpy"].parameters
    769128
    """
    sweep = prepare(layer, **settings)
    if out is not None:
        check_output(out)
    study = measure(sweep, progress)
    if out is not None:
        write(study, out)
    return study


def write(study: Study, out: str | Path) -> list[Path]:
    """Write ``results.csv``, ``study.png`` and ``study.svg`` into a folder, each whole or not at all.

    Parameters
    ----------
    study : Study
    out : str or Path
        Made if it does not exist.

    Returns
    -------
    list of Path
    """
    from mumoe_tensor.study.plots import write_plot

    folder = Path(out)
    table = folder / "results.csv"
    write_csv(study, table)
    return [table, *write_plot(study, folder / "study")]


def check_output(out: str | Path) -> None:
    """See to it before anything is measured that the results can be written.

    Parameters
    ----------
    out : str or Path
        The folder; it is made.

    Raises
    ------
    ImportError
        If matplotlib is not installed; it names the extra.
    OSError
        If the folder cannot be made.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("the study's picture needs matplotlib; pip install 'mumoe_tensor[study]'.")
    Path(out).mkdir(parents=True, exist_ok=True)
