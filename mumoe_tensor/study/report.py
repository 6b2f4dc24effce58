"""The folder of a finished study."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mumoe_tensor.files import whole_file
from mumoe_tensor.study.charts import NAMES, charts
from mumoe_tensor.study.results import Results
from mumoe_tensor.study.sweep import Plan

#: Files of a study.
RESULTS = (
    "results.csv", "study.json", "report.html",
    *(f"{name}{suffix}" for name in NAMES for suffix in (".png", ".svg")),
)  # fmt: skip


def write(planned: Plan, results: Results, folder: Path, compare: str | Path | None = None) -> list[Path]:
    """Write the page and the plots of a study, each atomically.

    Parameters
    ----------
    compare : str or Path, optional
        The folder of another study, to compare with this one.

    Returns
    -------
    list of Path
        All files of the study.
    """
    # Measuring does not need the plotting packages.
    from mumoe_tensor.study.page import page
    from mumoe_tensor.study.plots import write_plots

    drawn = charts(planned, results)
    paths = [folder / name for name in RESULTS[:3]]
    with whole_file(folder / "report.html") as file:
        file.write(page(planned, results, drawn, compare).encode())
    return paths + write_plots(drawn, folder)


def to_json(planned: Plan, results: Results) -> dict[str, Any]:
    """The setting and results of a study as JSON types."""
    return {
        "setting": json.loads(planned.setting.to_json()),
        "rows": [asdict(row) for row in results],
        "unfitted": planned.unfitted,
        "environments": results.environments,
    }
