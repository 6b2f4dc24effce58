"""Figures of fairness against their definitions, one input after the other."""

from __future__ import annotations

import sys
from math import sqrt
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("fairlearn")

from mumoe_tensor.analysis import fairness  # noqa: E402

ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=30)


@given(ROWS)
def test_fairness_by_its_definitions(rows: Any) -> None:
    predicted, labels, groups = (torch.tensor(x, dtype=torch.long) for x in zip(*rows, strict=True))
    found_of = {g: [p for p, y, h in rows if h == g and y] for g in {g for _, _, g in rows}}
    assume(all(found_of.values()))
    right: dict[Any, list[bool]] = {}
    for p, y, g in rows:
        right.setdefault((int(y), g), []).append(p == y)
    accuracies = {pair: sum(actual) / len(actual) for pair, actual in right.items()}
    rates = [sum(actual) / len(actual) for actual in found_of.values()]
    mean = sum(accuracies.values()) / len(accuracies)
    target = next(iter(right))
    result = fairness(predicted, labels, groups, target)
    assert result.accuracy == pytest.approx(sum(p == y for p, y, _ in rows) / len(rows))
    assert result.subpopulations == pytest.approx(accuracies)
    assert result.target == pytest.approx(accuracies[target])
    assert result.worst == pytest.approx(min(accuracies.values()))
    variance = sum((a - mean) ** 2 for a in accuracies.values()) / len(accuracies)
    assert result.deviation == pytest.approx(sqrt(variance), abs=1e-9)
    assert result.equal_opportunity == pytest.approx(max(rates) - min(rates))


ONES = torch.tensor([1, 1])


@pytest.mark.parametrize(
    ("predictions", "labels", "groups", "target", "message"),
    [
        (ONES[:1], ONES, ONES, (1, 1), "for every input, got"),
        (ONES[:0], ONES[:0], ONES[:0], (1, 1), "for every input, got"),
        (torch.tensor([1, 2]), ONES, ONES, (1, 1), r"predictions must be 0 or 1, got \[1, 2\]"),
        (ONES, -ONES, ONES, (1, 1), r"labels must be 0 or 1, got \[-1\]"),
        (ONES, torch.tensor([0, 1]), torch.tensor([4, 5]), (1, 5), r"the groups \[4\] have none"),
        (ONES, ONES, ONES, (0, 1), r"none with label and group \(0, 1\)"),
    ],
)
def test_fairness_that_cannot_be_told(
    predictions: Any, labels: Any, groups: Any, target: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fairness(predictions, labels, groups, target)


def test_without_fairlearn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install .*\[experiments\]"):
        fairness(ONES, ONES, ONES, (1, 1))
