"""Comparison of two studies."""

from __future__ import annotations

from pathlib import Path

from mumoe_tensor.readers import checked, read_json, reading
from mumoe_tensor.study.charts import count_text, is_figure
from mumoe_tensor.study.results import Measurement, Results, sizes_of
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.verdicts import Cells, best, measures

#: Format, number of experts, and budget in tenths of a percent of the dense layer's parameters.
Key = tuple[str, str, int]


def read_study(folder: str | Path) -> tuple[Setting, Results]:
    """Read the setting and the results of a study; the data files it used are not needed.

    Raises
    ------
    ValueError
        If a file of the study is corrupt.
    OSError
        If a file is missing.
    """
    path = Path(folder, "study.json")
    with reading(path):
        setting = checked(Setting, read_json(path))
    table = path.with_name("results.csv")
    if not table.exists():
        raise FileNotFoundError(f"a study must have results; there is no {table}.")
    return setting, Results(table)


def beside(one: tuple[Setting, Results], other: tuple[Setting, Results], name: str) -> Cells:
    """Compare two studies where they have the same format, number of experts and share of the parameters.

    A cell has the figures of both studies, and shows which is better; figures whose intervals overlap tie.

    Parameters
    ----------
    one, other : tuple of Setting and Results
    name : str
        Name of the other study.
    """
    by = measures(one[0])
    here, there = _rows(*one), _rows(*other)
    columns: dict[str, list[str]] = {}
    keys = [key for key in here if key in there]
    for measure in by:
        cells = []
        for key in keys:
            sides = {
                side: measure.figure(rows)
                for side, of_key in (("here", here[key]), ("there", there[key]))
                if (rows := [row for row in of_key if measure.is_of(row)])
            }
            if len(sides) < 2:
                cells.append("")
                continue
            winners = best(sides, measure.highest)
            values = " | ".join(measure.text(figure.value) for figure in sides.values())
            cells.append(f"{values}, {winners[0] if len(winners) == 1 else 'tie'}")
        if any(cells):
            columns[measure.title] = cells
    labels = [
        [here[key][0].title, count_text(key[1]) if key[1] else "", f"{key[2] / 10:g} %" if key[2] else ""]
        for key in keys
    ]
    lines = [[*label, *(cells[n] for cells in columns.values())] for n, label in enumerate(labels)]
    return f"Here | {name}", ["", "experts", "budget", *columns], lines


def _rows(setting: Setting, results: Results) -> dict[Key, list[Measurement]]:
    """The measurements of the layer's subjects, by the key that matches them with another study."""
    rows: dict[Key, list[Measurement]] = {}
    for row in results:
        if row.sizes == sizes_of(setting.layer.spec) and is_figure(row.value):
            key = row.subject, row.experts, round(1000 * row.budget / setting.whole.parameters)
            rows.setdefault(key, []).append(row)
    return rows
