"""The best format of each budget; what intervals do not tell apart ties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mumoe_tensor import study as studies
from mumoe_tensor.study.tables import Figure, best, is_specialised

Made = tuple[studies.Plan, studies.Results]


def test_the_best_format_of_each_measure(made_up: Made) -> None:
    planned, _ = made_up
    budget = f"{planned.setting.budgets[0]:,} parameters"
    _, headings, rows = studies.cells(*made_up)[0]
    assert headings == ["", f"4 experts, {budget}", f"3 × 2 experts, {budget}"]
    cells = {row[0]: row[1] for row in rows}
    # Of those at the budget: the dense mixture and Hadamard are not. The quartiles of most others overlap.
    assert cells["fastest step, cpu"].startswith("tie: CP, ") and "0.90 × dense" in cells["fastest step, cpu"]
    assert cells["least memory of a step, cpu"] == "CP 1 MiB"
    assert "least error of the weight" not in cells
    # Two runs of each head tell 95 % from 50 %, and not from 80 %.
    _, _, heads = studies.cells(*made_up)[3]
    assert heads == [["best accuracy", *["tie: CP, Tensor Ring, 95.5 %"] * 2]]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=6), st.booleans())
def test_ties_are_those_whose_intervals_overlap(spreads: list[tuple[float, float]], highest: bool) -> None:
    figures = {str(k): Figure(x, x - half, x + half) for k, (x, half) in enumerate(spreads)}
    names = best(figures, highest)
    extreme = (max if highest else min)(figure.value for figure in figures.values())
    first = figures[names[0]]
    assert first.value == extreme
    for name, figure in figures.items():
        apart = figure.low > first.high or figure.high < first.low
        assert (name in names) is not apart


def test_experts_are_specialised_if_all_runs_say_so(made_up: Made) -> None:
    planned, results = made_up
    head = next(head for head in planned.heads if head.name == "cp")
    assert is_specialised(results, head) == "yes"  # 0.3 under 0.6 in both runs
    assert is_specialised(results, planned.heads[0]) == ""
