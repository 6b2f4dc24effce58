"""The results of a study in sentences, and notes on how to read them."""

from __future__ import annotations

from mumoe_tensor.interval import interval
from mumoe_tensor.study.charts import count_text, is_figure
from mumoe_tensor.study.layers import dense
from mumoe_tensor.study.results import Measurement, Results, joined, sizes_of, total
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import Plan

#: A time this near to the dense layer's is called equal to it.
NEAR = 1.1


def paragraph(planned: Plan, results: Results) -> list[str]:
    """The results of a study, a sentence each.

    Returns
    -------
    list of str
    """
    sentences = []
    for device in planned.setting.devices:
        sentences += _times(planned, results, device)
    sentences += _ranks(planned, results)
    sentences += _accuracy(planned, results)
    for device in planned.setting.devices:
        sentences += _crossover(planned, results, device)
    return sentences


def notes(planned: Plan, results: Results) -> list[str]:
    """Notes on how to read the figures, and on what is not in them."""
    setting = planned.setting
    budgets = {s.budget for s in planned.subjects if s.budget}
    free = list(dict.fromkeys(s.title for s in planned.subjects if not s.budget and s.name != BASELINE))
    sentences = [
        f"Ranks are fitted to {', '.join(f'{b:,}' for b in sorted(budgets))} parameters, gate included."
        + (f" Without a rank, at their own cost: {', '.join(free)}." if free else ""),
        "A mixture's forward counts its gate. A step is zero_grad, forward and backward, the input has a "
        "gradient too. All run eagerly.",
        f"Times are medians of {setting.rounds} turns at most, beside the dense layer in the same process.",
    ]
    sentences += dict.fromkeys(
        f"{s.title}, {joined(s.spec.experts)} experts: {s.skip}." for s in planned.subjects if s.skip
    )
    sentences += [f"{name}: {why}" for name, why in planned.unfitted.items()]
    sentences += dict.fromkeys(row.note for row in results if row.note and row.value is None)
    if len(results.environments) > 1:
        sentences.append("The figures come from more than one machine, version or commit; see results.csv.")
    return sentences


def _times(planned: Plan, results: Results, device: str) -> list[str]:
    setting = planned.setting
    sizes, experts = sizes_of(setting.layer.spec), joined(setting.experts[0])
    counts = count_text(experts)
    sentences = []
    for quantity, name in (("forward", "forward pass"), ("step", "step")):
        rows = [
            row
            for row in results.of(quantity, sizes=sizes, experts=experts, device=device, batch=setting.batch)
            if row.budget and is_figure(row.ratio)
        ]
        if rows:
            best, worst = min(rows, key=_ratio), max(rows, key=_ratio)
            sentences.append(
                f"With {counts} experts at the budget, the fastest {name} on {device} is that of "
                f"{best.title}, {_times_dense(best)}; the slowest that of {worst.title}, "
                f"{_times_dense(worst)}."
                if len(rows) > 1
                else f"With {counts} experts the {name} of {best.title} on {device} takes "
                f"{_times_dense(best)}."
            )
    small = [
        row
        for row in results.of("forward", sizes=sizes, experts=experts, device=device)
        if row.budget and is_figure(row.ratio) and row.batch != setting.batch
    ]
    if small:
        batch = min(row.batch or 0 for row in small)
        best = min((row for row in small if row.batch == batch), key=_ratio)
        sentences.append(
            f"On a batch of {batch:,} the best, {best.title}, takes {_times_dense(best)}"
            + (": what is not the products weighs most there." if _ratio(best) > NEAR else ".")
        )
    return sentences


def _ranks(planned: Plan, results: Results) -> list[str]:
    setting = planned.setting
    sizes = sizes_of(setting.layer.spec)
    rows = results.of("expert rank", sizes=sizes)
    rows = [row for row in rows if row.budget and "x" not in row.experts and is_figure(row.value)]
    if not rows:
        return []
    experts = joined(setting.experts[0])
    here = [row for row in rows if row.experts == experts]
    sentences = []
    if len(here) > 1:
        best, worst = max(here, key=_value), min(here, key=_value)
        sentences.append(
            f"An expert's matrix has rank {_value(best):,.0f} at most in {best.title}, {_value(worst):,.0f} "
            f"in {worst.title}."
        )
    most = max(total(row.experts) for row in rows)
    last = [row for row in rows if total(row.experts) == most]
    best = max(last, key=_value)
    sentences.append(
        f"The largest number of experts with room in the budget is {most:,} of those looked at; the highest "
        f"rank there is {_value(best):,.0f} ({best.title})."
    )
    return sentences


def _accuracy(planned: Plan, results: Results) -> list[str]:
    if not planned.heads:
        return []
    sizes = sizes_of(planned.heads[0].spec)
    runs: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in filter(lambda row: is_figure(row.value), results.of("accuracy", sizes=sizes)):
        runs.setdefault((row.subject, row.experts, row.rank), []).append(row)
    dense = runs.pop((BASELINE, "", ""), [])
    fitted = {key: rows for key, rows in runs.items() if rows[0].budget}
    if not dense or not fitted:
        return []

    def with_interval(rows: list[Measurement]) -> str:
        centre, half = interval(_value(row) for row in rows)
        return f"{100 * centre:.1f} %" + ("" if half is None else f" ± {100 * half:.1f}")

    best = max(fitted.values(), key=lambda rows: interval(_value(row) for row in rows)[0])
    counts = count_text(best[0].experts)
    sentences = [
        f"Of the factorized heads the best on validation is {best[0].title} with {counts} experts and "
        f"{best[0].budget:,} parameters: {with_interval(best)}, the dense head {with_interval(dense)} "
        f"({len(dense)} {'runs' if len(dense) > 1 else 'run'} each, 95 % interval)."
    ]
    if len(dense) > 1 and len(best) > 1:
        (one, half), (other, half_of_other) = (
            interval(_value(row) for row in rows) for rows in (best, dense)
        )
        apart = abs(one - other) > (half or 0.0) + (half_of_other or 0.0)
        sentences.append(
            "These intervals do not overlap."
            if apart
            else "These intervals overlap: the runs do not tell them apart."
        )
    return sentences


def _crossover(planned: Plan, results: Results, device: str) -> list[str]:
    setting = planned.setting
    names = {sizes_of(dense(size, size)): size for size in setting.squares}
    rows = [
        row
        for row in results.of("forward", device=device, experts=str(setting.square_experts))
        if row.sizes in names and is_figure(row.ratio) and row.batch in setting.square_batches
    ]
    sentences = []
    for batch in setting.square_batches:
        here = [row for row in rows if row.batch == batch]
        slow = {row.subject: 0 for row in here}
        for row in here:
            if _ratio(row) > NEAR:
                slow[row.subject] = max(slow[row.subject], names[row.sizes])
        near = [row for row in here if names[row.sizes] > slow[row.subject]]
        if near:
            first = min(near, key=lambda row: names[row.sizes])
            sentences.append(
                f"With batch {batch:,} on {device} a square layer is within {NEAR - 1:.0%} of nn.Linear from "
                f"size {names[first.sizes]:,} on ({first.title})."
            )
        elif here:
            best = min(here, key=_ratio)
            sentences.append(
                f"With batch {batch:,} on {device} no square layer looked at comes within {NEAR - 1:.0%} of "
                f"nn.Linear; the nearest is {best.title} at size {names[best.sizes]:,}, {_times_dense(best)}."
            )
    return sentences


def _times_dense(row: Measurement) -> str:
    quartiles = f" ({row.ratio_low:.2f}–{row.ratio_high:.2f})" if row.ratio_low is not None else ""
    return f"{_ratio(row):.2f} times the dense layer's{quartiles}"


def _ratio(row: Measurement) -> float:
    return row.ratio or 0.0


def _value(row: Measurement) -> float:
    return row.value or 0.0
