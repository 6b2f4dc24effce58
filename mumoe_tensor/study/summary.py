"""Notes on how to read the figures of a study, and on what is not in them."""

from __future__ import annotations

from mumoe_tensor.study.results import Results
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import Plan


def notes(planned: Plan, results: Results) -> list[str]:
    """Notes on how to read the figures, and on what is not in them."""
    setting = planned.setting
    free = list(dict.fromkeys(s.title for s in planned.subjects if not s.budget and s.name != BASELINE))
    sentences = [
        f"Ranks come nearest to {', '.join(f'{b:,}' for b in setting.budgets)} parameters, gate included."
        + (f" Without a rank, at their own cost: {', '.join(free)}." if free else ""),
        "A mixture's forward counts its gate. A step is zero_grad, forward and backward, the input has a "
        "gradient too. All run eagerly.",
        f"Times are medians of {setting.rounds} turns at most, beside the dense layer in the same process.",
    ]
    if setting.weight:
        sentences.append(
            "The weight error is that of the matrix, the output error that of its outputs for the inputs, "
            "each relative, of a fit to it."
        )
    sentences += dict.fromkeys(
        f"{row.title}, {row.experts} experts: {row.note}." for row in results if row.note
    )
    if len(results.environments) > 1:
        sentences.append("The figures come from more than one machine, version or commit; see results.csv.")
    return sentences
