"""The tables of a study: the best formats, a comparison with another study, costs, times, and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mumoe_tensor.interval import interval
from mumoe_tensor.study.charts import accuracy_of, count_text, pareto
from mumoe_tensor.study.results import Measurement, Results, is_figure, sizes_of
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.subjects import BASELINE, Subject
from mumoe_tensor.study.sweep import Plan

#: A title, headings and rows.
Cells = tuple[str, list[str], list[list[str]]]
#: Half-width of the interval of figures without a spread: figures that differ by less than 1 % tie.
SPREAD = 0.005
#: Maximum number of tied formats that are listed.
MOST_NAMES = 3


def cells(planned: Plan, results: Results, compare: str | Path | None = None) -> list[Cells]:
    """All tables for the terminal and the page, starting with the best formats.

    Parameters
    ----------
    compare : str or Path, optional
        The folder of another study, to compare with this one.

    Returns
    -------
    list of (str, list of str, list of list of str)
    """
    setting = planned.setting
    made = [best_formats("Best format", measures(setting), results, sizes_of(setting.layer.spec))]
    if compare is not None:
        made.append(beside((setting, results), read_study(compare), str(compare)))
    made += [_costs(planned, results), _times(planned, results)]
    if planned.heads:
        by_accuracy = [Measure("best accuracy", "accuracy", _accuracy, _percent, highest=True)]
        made.append(best_formats("Best head", by_accuracy, results, sizes_of(planned.heads[0].spec)))
        made.append(_heads(planned, results))
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


def read_study(folder: str | Path) -> tuple[Setting, Results]:
    """Read the setting and the results of a study; the data files it used are not needed.

    Raises
    ------
    ValueError, OSError
        If a file of the study is corrupt or missing.
    """
    setting, table = Setting.from_json(Path(folder, "study.json")), Path(folder, "results.csv")
    if not table.exists():
        raise FileNotFoundError(f"a study must have results; there is no {table}.")
    return setting, Results(table)


# ---- the best ---------------------------------------------------------------------------------------------


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
    values: Mapping[str, Any] = {}
    highest: bool = False

    def of(self, rows: list[Measurement]) -> Figure | None:
        """The figure of a subject, if it was measured."""
        wanted = {"quantity": self.quantity, **self.values}.items()
        of_measure = [row for row in rows if wanted <= vars(row).items() and is_figure(row.value)]
        figure = self.figure(of_measure) if of_measure else None
        return figure if figure and is_figure(figure.value) else None


def measures(setting: Setting) -> list[Measure]:
    """The measures for the subjects of the layer."""
    made = [
        Measure("least error of the weight", "weight error", _exact, _percent),
        Measure("least error of outputs", "output error", _exact, _percent),
        Measure("highest rank", "expert rank", _exact, "{:,.0f}".format, highest=True),
        Measure("fewest FLOPs", "FLOPs", _exact, "{:,.0f}".format),
    ]
    for device in setting.devices:
        at: dict[str, Any] = {"device": device, "batch": setting.batch}
        for quantity in ("forward", "step"):
            made.append(Measure(f"fastest {quantity}, {device}", quantity, _ratio, _times_dense, at))
        made.append(Measure(f"least memory of a step, {device}", "step peak", _exact, _mebibytes, at))
    return made


def best(figures: dict[str, Figure], highest: bool = False) -> list[str]:
    """The names of the best figure and of those that tie with it, best first."""
    ordered = sorted(figures, key=lambda name: figures[name].value, reverse=highest)
    first = figures[ordered[0]]
    return [n for n in ordered if not (figures[n].low > first.high or figures[n].high < first.low)]


def best_formats(title: str, by: list[Measure], results: Results, sizes: str) -> Cells:
    """The best format for each number of experts and budget, by each measure."""
    groups: dict[str, dict[str, list[Measurement]]] = {}
    for row in results:
        if row.sizes == sizes and row.budget:
            counts = f"{count_text(row.experts.split('x'))} experts, " if row.experts else ""
            group = groups.setdefault(f"{counts}{row.budget:,} parameters", {})
            group.setdefault(row.title, []).append(row)
    lines = [[measure.title, *(_best(group, measure) for group in groups.values())] for measure in by]
    return title, ["", *groups], [line for line in lines if any(line[1:])]


def _best(group: dict[str, list[Measurement]], measure: Measure) -> str:
    figures = {title: figure for title, rows in group.items() if (figure := measure.of(rows))}
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


def beside(one: tuple[Setting, Results], other: tuple[Setting, Results], name: str) -> Cells:
    """Compare two studies where they have the same format, number of experts and fraction of the parameters.

    A cell has the figures of both studies, and shows which is better; figures whose intervals overlap tie.
    """
    here, there = _shared(*one), _shared(*other)
    keys, by = [key for key in here if key in there], measures(one[0])

    def cell(key: tuple[str, str, int], measure: Measure) -> str:
        figures = {side: measure.of(of[key]) for side, of in (("here", here), ("there", there))}
        sides = {side: figure for side, figure in figures.items() if figure}
        if len(sides) < 2:
            return ""
        winners = best(sides, measure.highest)
        values = " | ".join(measure.text(figure.value) for figure in sides.values())
        return f"{values}, {winners[0] if len(winners) == 1 else 'tie'}"

    rows = [
        [
            here[key][0].title,
            count_text(key[1].split("x")) if key[1] else "",
            f"{key[2] / 10:g} %" if key[2] else "",
            *(cell(key, measure) for measure in by),
        ]
        for key in keys
    ]
    return f"Here | {name}", ["", "experts", "budget", *(measure.title for measure in by)], rows


def _shared(setting: Setting, results: Results) -> dict[tuple[str, str, int], list[Measurement]]:
    """Measurements of the layer by format, experts, and budget in tenths of a percent of the dense layer."""
    rows: dict[tuple[str, str, int], list[Measurement]] = {}
    for row in results:
        if row.sizes == sizes_of(setting.layer.spec):
            key = row.subject, row.experts, round(1000 * row.budget / setting.whole.parameters)
            rows.setdefault(key, []).append(row)
    return rows


def _exact(rows: list[Measurement]) -> Figure:
    value = rows[0].value or 0.0
    return Figure(value, (1 - SPREAD) * value, (1 + SPREAD) * value)


def _ratio(rows: list[Measurement]) -> Figure:
    """Time relative to the dense layer, with quartiles."""
    return Figure(*(float(x or 0.0) for x in (rows[0].ratio, rows[0].ratio_low, rows[0].ratio_high)))


def _accuracy(rows: list[Measurement]) -> Figure:
    return Figure(*accuracy_of(rows))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times_dense(value: float) -> str:
    return f"{value:.2f} × dense"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


# ---- every subject ----------------------------------------------------------------------------------------


def _costs(planned: Plan, results: Results) -> Cells:
    panels = pareto(planned, results).panels
    headed = {
        "weight error": "error %",
        "output error": "of outputs %",
        "output error, plain fit": "plain fit %",
    }
    headings = ["rank", "parameters", "FLOPs", "FLOP/byte", "saved KiB", "expert rank", *headed.values()]
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
        for quantity in headed:
            measured = results.of_subject(subject, quantity)
            row.append(f"{100 * (measured[0].value or 0.0):.2f}" if measured else "")
        fronts = [panel.title for panel in panels if subject.key in {point.key for point in panel.front}]
        rows.append([*row, ", ".join(fronts)])
    return "Costs", ["", "experts", *headings, "on the front of"], rows


def _times(planned: Plan, results: Results) -> Cells:
    setting = planned.setting
    headings = ["", "experts", "parameters"]
    for device in setting.devices:
        headings += [f"forward {device}", "× dense", "predicted"]
        headings += [f"step {device}", "× dense", "peak MiB", "of step"]
    headings += [f"predicted {machine}" for machine in setting.machines]
    rows = []
    for subject in planned.subjects:
        row = [*_head(subject), f"{subject.figures(setting.batch)['parameters']:,.0f}"]
        for device in setting.devices:
            at: dict[str, Any] = {"device": device, "batch": setting.batch}
            row += _time(results.of_subject(subject, "forward", **at))
            row.append(_prediction(subject, setting.batch, device))
            row += _time(results.of_subject(subject, "step", **at))
            row += [_peak(results.of_subject(subject, q, **at)) for q in ("forward peak", "step peak")]
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


def _without_empty(title: str, headings: list[str], rows: list[list[str]]) -> Cells:
    """The table without empty columns."""
    used = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    return title, [headings[n] for n in used], [[row[n] for n in used] for row in rows]


def _head(subject: Subject) -> list[str]:
    return [subject.title, count_text(subject.spec.experts) if subject.spec.experts else ""]


def _mean(rows: list[Measurement], scale: float = 1.0) -> str:
    return f"{scale * sum(row.value or 0.0 for row in rows) / len(rows):.3g}" if rows else ""


def _prediction(subject: Subject, batch: int, machine: str) -> str:
    return f"{1e3 * subject.predicted(batch, machine):,.2f} ms"


def _time(rows: list[Measurement]) -> list[str]:
    if not rows or rows[0].ratio is None:
        return ["–", ""]
    row = rows[0]
    about = "≈ " if row.note else ""
    quartiles = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
    return [f"{about}{1e3 * (row.value or 0.0):,.2f} ms", "" if row.subject == BASELINE else quartiles]


def _peak(rows: list[Measurement]) -> str:
    return f"{'≈ ' if rows[0].note else ''}{rows[0].value / 2**20:,.0f}" if rows and rows[0].value else "–"
