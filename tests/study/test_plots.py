"""Pictures are legible, and the same for the same study."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from mumoe_tensor import study as studies
from mumoe_tensor.study import plots
from mumoe_tensor.study.charts import NAMES, charts

Made = tuple[studies.Plan, studies.Results]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_legible(made_up: Made, name: str) -> None:
    (chart,) = (chart for chart in charts(*made_up) if chart.name == name)
    figure = plots.draw(chart)
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
    for ax in figure.axes:
        if not ax.axison:
            continue
        low, high = sorted(ax.get_xlim())
        labels = [t.label1 for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        assert labels, ax.get_title()
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda b: b.x0)
        assert all(one.x1 <= other.x0 for one, other in pairwise(boxes)), ax.get_title()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    titles += [ax._left_title.get_window_extent() for ax in figure.axes]
    wide = [b for b in titles if b.width > 1]
    assert not any(one.overlaps(other) for one, other in pairwise(wide))


def test_the_same_study_gives_the_same_files(made_up: Made, tmp_path: Path) -> None:
    drawn = charts(*made_up)[:1]
    one, other = (plots.write_plots(drawn, tmp_path / name) for name in "ab")
    assert [p.name for p in one] == ["pareto.png", "pareto.svg"]
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert ElementTree.parse(one[1]).getroot().tag.endswith("svg")


def test_colours_and_markers_tell_subjects_apart(made_up: Made) -> None:
    for chart in charts(*made_up):
        for of_subjects in zip(*map(plots.look, chart.titles), strict=True):
            assert len(set(of_subjects)) == len(chart.titles)
