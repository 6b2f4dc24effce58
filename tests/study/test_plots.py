"""The same study gives the same pictures, in which subjects can be told apart."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from mumoe_tensor import study as studies
from mumoe_tensor.study import plots
from mumoe_tensor.study.charts import charts

Made = tuple[studies.Plan, studies.Results]


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
