"""Every figure prints its numbers, writes them, and draws what they say."""

from __future__ import annotations

import csv
import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import mumoe_tensor as mt
from paper_figures.__main__ import FIGURES
from paper_figures.common import MATCHED_AT, PRINT_STYLE, SIZES, matched_ranks, run, write


def module_of(name: str) -> Any:
    return importlib.import_module(f"paper_figures.{name}")


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = module_of(name)
    paths = write(module, tmp_path, quick=True)
    assert [p.suffix for p in paths] == [".csv", ".png", ".pdf"] and all(p.stat().st_size for p in paths)
    printed = capsys.readouterr().out
    assert name in printed
    with open(paths[0], newline="") as file:
        read = list(csv.DictReader(file))
    rows = module.rows(True)
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == read
    assert "Settings:" in module.__doc__


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_legible_and_axes_are_full(name: str) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    module = module_of(name)
    with matplotlib.rc_context(PRINT_STYLE):
        figure = module.draw(module.rows(False))
        FigureCanvasAgg(figure).draw()
    assert figure.axes
    for ax in figure.axes:
        assert ax.lines or ax.patches
        assert ax.get_xlabel() or ax.get_title()
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert drawn.x0 >= -0.01 and drawn.y0 >= -0.01 and drawn.x1 <= width + 0.01 and drawn.y1 <= height + 0.01
    assert all(t.get_fontsize() >= 8 for t in figure.findobj(Text) if t.get_text())
    for ax in figure.axes:
        low, high = sorted(ax.get_xlim())
        labels = [t.label1 for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes)), [t.get_text() for t in labels]


def by_name(name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in module_of(name).rows(True):
        found.setdefault(row["name"], []).append(row)
    return found


def test_parameters_are_matched_where_they_should_be() -> None:
    linear = mt.dense_parameters(768, 768)
    for name, rank in matched_ranks().items():
        if rank:
            cost = mt.cost(name, experts=MATCHED_AT, rank=rank, gate=True, **SIZES)
            assert linear <= cost.parameters < 1.02 * linear
    rows = by_name("parameters_over_experts")
    assert rows["dense moe"][-1]["experts"] == 2**17
    assert rows["dense moe"][-1]["parameters"] == 2**17 * (769 * 768 + 768)


def test_flops_of_the_forward_pass() -> None:
    rows = by_name("flops_over_experts")
    assert rows["linear"][0]["flops"] == 2 * 768 * 768
    for name in ("cp", "tr"):
        assert rows[name][0]["flops"] < 2 * rows["linear"][0]["flops"] < rows["dense moe"][-1]["flops"]
    for row in by_name("naive_and_planned").values():
        assert row[0]["ratio"] == row[0]["naive"] / row[0]["planned"] > 10


def test_numerical_ranks_are_the_bounds() -> None:
    for rows in by_name("expert_rank").values():
        assert all(row["numerical_rank"] == row["max_expert_rank"] for row in rows)
    rank = {n: rows[-1]["max_expert_rank"] for n, rows in by_name("expert_rank").items()}
    assert rank["tr"] > rank["cp"]


def test_levels_have_equal_numbers_of_experts() -> None:
    for row in module_of("levels").rows(False):
        modes = [int(n) for n in row["modes"].split("x")]
        assert np.prod(modes) == row["experts"] and len(modes) == row["levels"]
        assert row["gate_parameters"] == 768 * sum(modes)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"levels": lambda: module_of("levels"), "gate_share": lambda: module_of("gate_share")}
    run(known, ["levels", "--quick", "--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["levels.csv", "levels.pdf", "levels.png"]
    with pytest.raises(SystemExit):
        run(known, ["nothing"])
    assert "the figures are levels, gate_share" in capsys.readouterr().err
