"""Two studies side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mumoe_tensor import study as studies

Made = tuple[studies.Plan, studies.Results]


def written(made: Made, folder: Path, factor: float) -> Path:
    """The study with times that are multiples, and one format less."""
    planned, results = made
    other = studies.Results(folder / "results.csv")
    rows = [row for row in results if row.subject != "tr"]
    names = ("ratio", "ratio_low", "ratio_high")
    other.add(
        [
            row if row.ratio is None else replace(row, **{n: factor * getattr(row, n) for n in names})
            for row in rows
        ],
        {},
    )
    (folder / "study.json").write_text(planned.setting.to_json())
    return folder


@pytest.mark.parametrize(("factor", "mark"), [(1.1, "tie"), (2.0, "here"), (0.5, "there")])
def test_figures_of_both_and_which_is_better(made_up: Made, tmp_path: Path, factor: float, mark: str) -> None:
    planned, results = made_up
    other = studies.read_study(written(made_up, tmp_path, factor))
    title, headings, rows = studies.beside((planned.setting, results), other, "older")
    assert title == "Here | older" and "Tensor Ring" not in {row[0] for row in rows}
    assert {subject.title for subject in planned.subjects} == {row[0] for row in rows} | {"Tensor Ring"}
    (cp,) = [dict(zip(headings, row, strict=True)) for row in rows if row[:2] == ["CP", "4"]]
    assert cp["fastest step, cpu"] == f"0.90 × dense | {0.9 * factor:.2f} × dense, {mark}"
    assert cp["fewest FLOPs"].endswith(", tie") and cp["budget"] == "100 %"
    assert studies.cells(planned, results, tmp_path)[1][0] == f"Here | {tmp_path}"


def test_a_folder_without_a_study_is_refused(tmp_path: Path, made_up: Made) -> None:
    with pytest.raises(FileNotFoundError):
        studies.read_study(tmp_path)
    written(made_up, tmp_path, 1.0)
    (tmp_path / "results.csv").unlink()
    with pytest.raises(FileNotFoundError, match="must have results"):
        studies.read_study(tmp_path)
