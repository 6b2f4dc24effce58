"""The tables of a study have every subject, and what was measured of it."""

from __future__ import annotations

from dataclasses import replace

from samples import RATIOS

from mumoe_tensor import study as studies

Made = tuple[studies.Plan, studies.Results]


def columns(made: Made, number: int) -> list[dict[str, str]]:
    _, headings, rows = studies.cells(*made)[number]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def test_costs_are_those_of_the_subjects(made_up: Made) -> None:
    planned, _ = made_up
    rows = columns(made_up, 1)
    assert [row[""] for row in rows] == [subject.title for subject in planned.subjects]
    for subject, row in zip(planned.subjects, rows, strict=True):
        figures = subject.figures(8)
        assert row["parameters"] == f"{figures['parameters']:,}"
        assert row["FLOPs"] == f"{figures['FLOPs']:,.0f}"
        assert row["expert rank"] == f"{figures['expert rank']:,}"
        assert row["rank"] == ", ".join(map(str, subject.spec.full_rank))
    assert any("Parameters" in row["on the front of"] for row in rows)


def test_times_are_beside_the_dense_layer(made_up: Made) -> None:
    planned, _ = made_up
    for subject, row in zip(planned.subjects, columns(made_up, 2), strict=True):
        ratio = RATIOS.get(subject.name, 1.0)
        assert row["forward cpu"] == f"{ratio:,.2f} ms" and row["of step"] == f"{ratio:,.0f}"
        quartiles = f"{ratio:.2f} ({0.9 * ratio:.2f}–{1.2 * ratio:.2f})"
        assert row["× dense"] == ("" if subject.role == "baseline" else quartiles)


def test_times_are_predicted_for_other_machines(made_up: Made) -> None:
    planned, results = made_up
    planned = replace(planned, setting=replace(planned.setting, machines=("h200",)))
    for subject, row in zip(planned.subjects, columns((planned, results), 2), strict=True):
        assert row["predicted h200"] == f"{1e3 * subject.predicted(8, 'h200'):,.2f} ms"


def test_heads_stand_beside_their_nulls(made_up: Made) -> None:
    planned, _ = made_up
    rows = columns(made_up, 4)
    assert [row[""] for row in rows] == [head.title for head in planned.heads]
    for row in rows[1:]:
        assert (row["polysemanticity"], row["random gate"], row["specialised"]) == ("0.3", "0.6", "yes")
        low, high = (float(end) for end in row["95 % interval"].split("–"))
        assert 0 <= low < float(row["accuracy %"]) < high <= 100
    assert rows[0]["polysemanticity"] == rows[0]["specialised"] == ""


def test_figures_that_are_estimated_say_so(made_up: Made) -> None:
    planned, results = made_up
    estimated = studies.Results()
    note = {"note": "extrapolated from 2 experts"}
    rows = [replace(row, **note) if row.subject == "sparse" and row.device else row for row in results]
    estimated.add(rows, {})
    (row, *_) = [row for row in columns((planned, estimated), 2) if "Sparse" in row[""]]
    assert row["forward cpu"].startswith("≈ ") and row["peak MiB"].startswith("≈ ")
    assert any("Extrapolated from 2 experts: Sparse" in text for text in studies.notes(planned, estimated))
