"""The best format at each budget by each measure; formats whose intervals overlap tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mumoe_tensor.interval import interval
from mumoe_tensor.study.charts import accuracy_of, count_text, is_figure
from mumoe_tensor.study.results import Measurement, Results, joined
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.subjects import Subject
from mumoe_tensor.study.sweep import Plan

#: A title, headings and rows.
Cells = tuple[str, list[str], list[list[str]]]
#: Half-width of the interval of figures without a spread: figures that differ by less than 1 % tie.
SPREAD = 0.005
#: Maximum number of tied formats that are listed.
MOST_NAMES = 3


class Figure(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


class Measure(NamedTuple):
    """A measure for comparing formats.

    Attributes
    ----------
    title, quantity : str
    figure : callable
        Maps the measurements of a subject to a `Figure`.
    text : callable
        Formats a value.
    values : mapping
        Attributes that measurements must have.
    highest : bool
        Whether higher is better.
    """

    title: str
    quantity: str
    figure: Callable[[list[Measurement]], Figure]
    text: Callable[[float], str]
    values: Mapping[str, Any] = MappingProxyType({})
    highest: bool = False

    def is_of(self, row: Measurement) -> bool:
        """Whether a measurement belongs to the measure."""
        return row.quantity == self.quantity and self.values.items() <= vars(row).items()


def best(figures: dict[str, Figure], highest: bool = False) -> list[str]:
    """The names of the best figure and of those that tie with it, best first."""
    ordered = sorted(figures, key=lambda name: figures[name].value, reverse=highest)
    first = figures[ordered[0]]
    return [n for n in ordered if not (figures[n].low > first.high or figures[n].high < first.low)]


def measures(setting: Setting) -> list[Measure]:
    """The measures for the subjects of the layer."""
    errors = [("least error of the weight", "weight error"), ("least error of outputs", "output error")]
    made = [Measure(title, quantity, _exact, _percent) for title, quantity in errors]
    made += [
        Measure("highest rank", "expert rank", _exact, lambda value: f"{value:,.0f}", highest=True),
        Measure("fewest FLOPs", "FLOPs", _exact, lambda value: f"{value:,.0f}"),
    ]
    for device in setting.devices:
        at: dict[str, Any] = {"device": device, "batch": setting.batch}
        for quantity in ("forward", "step"):
            made.append(Measure(f"fastest {quantity}, {device}", quantity, _ratio, _times, at))
        made.append(Measure(f"least memory of a step, {device}", "step peak", _exact, _mebibytes, at))
    return made


def verdicts(planned: Plan, results: Results) -> Cells:
    """The best format of the layer for each number of experts and budget, by each measure."""
    return _table("Best format", planned.subjects, measures(planned.setting), results)


def head_verdicts(planned: Plan, results: Results) -> Cells:
    """The best format of the heads for each number of experts and budget."""
    by_accuracy = [
        Measure("best accuracy", "accuracy", lambda runs: Figure(*accuracy_of(runs)), _percent, highest=True)
    ]
    return _table("Best head", planned.heads, by_accuracy, results)


def is_specialised(results: Results, head: Subject) -> str:
    """Whether the experts of a head respond to fewer classes than with a random gate, over its runs."""
    real = {row.seed: row.value for row in results.of_subject(head, "polysemanticity")}
    null = {row.seed: row.value for row in results.of_subject(head, "polysemanticity, random gate")}
    differences = [(null[seed] or 0.0) - (real[seed] or 0.0) for seed in real if seed in null]
    if not differences:
        return ""
    middle, half = interval(differences)
    if half is None or abs(middle) <= half:
        return "tie"
    return "yes" if middle > 0 else "no"


def _table(title: str, subjects: Sequence[Subject], by: Sequence[Measure], results: Results) -> Cells:
    """A row for each measure with figures, and a column for each number of experts and budget."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        if subject.budget:
            experts = joined(subject.spec.experts)
            counts = f"{count_text(experts)} experts, " if experts else ""
            groups.setdefault(f"{counts}{subject.budget:,} parameters", []).append(subject)
    lines = [[each.title, *(_cell(group, each, results) for group in groups.values())] for each in by]
    return title, ["", *groups], [line for line in lines if any(line[1:])]


def _cell(subjects: Sequence[Subject], measure: Measure, results: Results) -> str:
    figures = {}
    for subject in subjects:
        rows = results.of_subject(subject, measure.quantity, **measure.values)
        if rows and is_figure((figure := measure.figure(rows)).value):
            figures[subject.title] = figure
    if not figures:
        return ""
    names = best(figures, measure.highest)
    value = measure.text(figures[names[0]].value)
    if len(names) == 1:
        return f"{names[0]} {value}"
    if len(names) == len(figures):
        return f"all tie, {value}"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"tie: {', '.join(names[:MOST_NAMES])}{more}, {value}"


def _exact(rows: list[Measurement]) -> Figure:
    value = rows[0].value or 0.0
    return Figure(value, (1 - SPREAD) * value, (1 + SPREAD) * value)


def _ratio(rows: list[Measurement]) -> Figure:
    """Time relative to the dense layer, with quartiles."""
    ratio, low, high = (float(x or 0.0) for x in (rows[0].ratio, rows[0].ratio_low, rows[0].ratio_high))
    return Figure(ratio, low, high)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:.2f} × dense"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"
