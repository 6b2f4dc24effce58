"""The tables of a study: verdicts, costs, times, and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mumoe_tensor.study.beside import beside, read_study
from mumoe_tensor.study.charts import accuracy_of, count_text, trade_offs
from mumoe_tensor.study.results import Measurement, Results, joined
from mumoe_tensor.study.subjects import BASELINE, Subject
from mumoe_tensor.study.sweep import Plan
from mumoe_tensor.study.verdicts import Cells, head_verdicts, is_specialised, verdicts


def cells(planned: Plan, results: Results, compare: str | Path | None = None) -> list[Cells]:
    """All tables for the terminal and the page, starting with the verdicts.

    Parameters
    ----------
    compare : str or Path, optional
        The folder of another study, to compare with this one.

    Returns
    -------
    list of (str, list of str, list of list of str)
    """
    made = [verdicts(planned, results)]
    if compare is not None:
        made.append(beside((planned.setting, results), read_study(compare), str(compare)))
    made += [_costs(planned, results), _times(planned, results)]
    if planned.heads:
        made += [head_verdicts(planned, results), _heads(planned, results)]
    if planned.unfitted:
        rows = [[*where.rsplit(", ", 2), why] for where, why in planned.unfitted.items()]
        made.append(("Left out", ["", "experts", "parameters", "why"], rows))
    return [_without_empty(*each) for each in made]


def notes(planned: Plan, results: Results) -> list[str]:
    """Notes on how to read the figures, and on missing figures."""
    setting = planned.setting
    free = list(dict.fromkeys(s.title for s in planned.subjects if not s.budget and s.name != BASELINE))
    sentences = [
        f"Ranks are the closest to {', '.join(f'{b:,}' for b in setting.budgets)} parameters, with the gate."
        + (f" Without a rank, so not at the budget: {', '.join(free)}." if free else ""),
        "A step is zero_grad, forward and backward, with a gradient of the input. Nothing is compiled.",
        f"Times are medians of up to {setting.rounds} rounds, alternating with the dense layer.",
    ]
    if any(subject.spec.experts for subject in planned.subjects):
        sentences.append("The time of a mixture includes its gate.")
    if setting.weight:
        sentences.append("Errors are relative: the norm of the difference over the norm of the weight.")
    if setting.inputs:
        sentences.append("Errors of outputs are relative to the norm of the outputs for the given inputs.")
    noted: dict[str, dict[str, None]] = {}
    for row in results:
        if row.note:
            noted.setdefault(row.note, {})[row.title] = None
    sentences += [f"{note[:1].upper()}{note[1:]}: {', '.join(titles)}." for note, titles in noted.items()]
    if len(results.environments) > 1:
        sentences.append("The figures come from more than one machine, version or commit; see results.csv.")
    return sentences


def _without_empty(title: str, headings: list[str], rows: list[list[str]]) -> Cells:
    """The table without empty columns."""
    used = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    return title, [headings[n] for n in used], [[row[n] for n in used] for row in rows]


def _costs(planned: Plan, results: Results) -> Cells:
    fronts: dict[str, list[str]] = {}
    for title, _, points, front in trade_offs(planned, results):
        for key, point in points.items():
            if point in front:
                fronts.setdefault(key, []).append(title)
    headed = {
        "weight error": "error %",
        "output error": "of outputs %",
        "output error, plain fit": "plain fit %",
    }
    errors = {name: heading for name, heading in headed.items() if results.of(name)}
    headings = ["rank", "parameters", "FLOPs", "FLOP/byte", "saved KiB", "expert rank", *errors.values()]
    rows = []
    for subject in planned.subjects:
        figures = subject.figures(planned.setting.batch)
        row = [
            *_head(subject),
            ", ".join(map(str, subject.spec.full_rank)),
            f"{figures['parameters']:,.0f}",
            f"{figures['FLOPs']:,.0f}",
            f"{figures['intensity']:,.1f}",
            f"{figures['saved'] / 1024:,.1f}",
            f"{figures['expert rank']:,.0f}",
        ]
        for quantity in errors:
            measured = results.of_subject(subject, quantity)
            row.append(f"{100 * (measured[0].value or 0.0):.2f}" if measured else "")
        rows.append([*row, ", ".join(fronts.get(subject.key, []))])
    return "Costs", ["", "experts", *headings, "on the front of"], rows


def _times(planned: Plan, results: Results) -> Cells:
    setting = planned.setting
    headings = ["", "experts", "parameters", *(x for d in setting.devices for x in _measured(d))]
    headings += [f"predicted {machine}" for machine in setting.machines]
    rows = []
    for subject in planned.subjects:
        row = [*_head(subject), f"{subject.figures(setting.batch)['parameters']:,.0f}"]
        for device in setting.devices:
            at: dict[str, Any] = {"device": device, "batch": setting.batch}
            row += _time(results.of_subject(subject, "forward", **at))
            row.append(_prediction(subject, setting.batch, device))
            row += _time(results.of_subject(subject, "step", **at))
            row += [_mebibytes(results.of_subject(subject, q, **at)) for q in ("forward peak", "step peak")]
        row += [_prediction(subject, setting.batch, machine) for machine in setting.machines]
        rows.append(row)
    return "Times and peaks", headings, rows


def _heads(planned: Plan, results: Results) -> Cells:
    headings = ["parameters", "accuracy %", "95 % interval", "loss", "active %", "dead %"]
    headings += ["polysemanticity", "random gate", "specialised"]
    rows = []
    for head in planned.heads:
        runs = results.of_subject(head, "accuracy")
        if not runs:
            continue
        middle, low, high = (100 * share for share in accuracy_of(runs))
        rows.append(
            [
                *_head(head),
                f"{head.figures(2)['parameters']:,.0f}",
                f"{middle:.1f}",
                f"{low:.1f}–{high:.1f}",
                _mean(results.of_subject(head, "loss")),
                _mean(results.of_subject(head, "active experts"), 100),
                _mean(results.of_subject(head, "dead experts"), 100),
                _mean(results.of_subject(head, "polysemanticity")),
                _mean(results.of_subject(head, "polysemanticity, random gate")),
                is_specialised(results, head),
            ]
        )
    return f"Heads on {planned.setting.data_name}", ["", "experts", *headings], rows


def _head(subject: Subject) -> list[str]:
    experts = joined(subject.spec.experts)
    return [subject.title, count_text(experts) if experts else ""]


def _mean(rows: list[Measurement], scale: float = 1.0) -> str:
    return f"{scale * sum(row.value or 0.0 for row in rows) / len(rows):.3g}" if rows else ""


def _prediction(subject: Subject, batch: int, machine: str) -> str:
    return f"{1e3 * subject.predicted(batch, machine):,.2f} ms"


def _measured(device: str) -> list[str]:
    return [f"forward {device}", "× dense", "predicted", f"step {device}", "× dense", "peak MiB", "of step"]


def _time(rows: list[Measurement]) -> list[str]:
    if not rows or rows[0].ratio is None:
        return ["–", ""]
    row = rows[0]
    about = "≈ " if row.note else ""
    quartiles = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
    return [f"{about}{1e3 * (row.value or 0.0):,.2f} ms", "" if row.subject == BASELINE else quartiles]


def _mebibytes(rows: list[Measurement]) -> str:
    return f"{'≈ ' if rows[0].note else ''}{rows[0].value / 2**20:,.0f}" if rows and rows[0].value else "–"
