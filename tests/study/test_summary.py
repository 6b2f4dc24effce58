"""Sentences say what was measured."""

from __future__ import annotations

from dataclasses import replace

from mumoe_tensor import study as studies

Made = tuple[studies.Plan, studies.Results]


def test_paragraph_says_what_was_measured(made_up: Made) -> None:
    text = " ".join(studies.paragraph(*made_up))
    assert "the fastest step on cpu is that of CP, 0.90 times the dense layer's (0.81–1.08)" in text
    assert "the slowest that of Tucker, 3.00 times the dense layer's" in text
    assert "the best on validation is CP" in text and ": 95.5 % ± 6.4, the dense head 90.5 %" in text
    assert "These intervals overlap" in text
    assert "With batch 4 on cpu a square layer is within 10% of nn.Linear from size 16 on (CP)." in text


def test_crossover_needs_all_larger_sizes(made_up: Made) -> None:
    planned, results = made_up
    changed = studies.Results()
    changed.add(
        [
            replace(row, ratio=1.5 if row.sizes == "24x24" else 1.0)
            if row.sizes in ("16x16", "24x24") and row.ratio is not None
            else row
            for row in results
        ],
        {},
    )
    text = " ".join(studies.paragraph(planned, changed))
    assert "With batch 4 on cpu no square layer looked at comes within 10% of nn.Linear" in text
