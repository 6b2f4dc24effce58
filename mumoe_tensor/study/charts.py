"""The charts of a study as data: `plots` draws them with matplotlib, `page` in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

from mumoe_tensor.interval import proportion
from mumoe_tensor.study.results import Measurement, Results, is_figure, sizes_of
from mumoe_tensor.study.subjects import BASELINE, Subject
from mumoe_tensor.study.sweep import HEAD_BATCH, Plan

#: Names of all charts.
NAMES = ("pareto", "beside-dense", "over-experts", "over-batches", "heads")


class Point(NamedTuple):
    """A point, the ends of its error bar, if any, its text, and the key of its subject.

    On a categorical axis, y is a name.
    """

    x: float
    y: float | str
    low: float | None = None
    high: float | None = None
    text: str = ""
    key: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one subject, which determines the colour."""

    subject: str
    title: str
    points: list[Point]


@dataclass(frozen=True)
class Panel:
    """One pair of axes, of which x is logarithmic.

    Attributes
    ----------
    title, xlabel, ylabel : str
    series : list of Series
    ylog : bool
    lines : bool
        Whether the points of a series are joined.
    ys : tuple of str
        Categories of a categorical y axis, from top to bottom. The texts are then written beside the points,
        and x has the measured values and their error bars.
    reference : float, optional
        Position of a reference line on the axis of the measured values.
    front : list of Point
        Points joined by a step line.
    """

    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    ylog: bool = False
    lines: bool = True
    ys: tuple[str, ...] = ()
    reference: float | None = None
    front: Sequence[Point] = ()

    def limits(self, axis: str) -> tuple[float, float, bool]:
        """Limits of a numeric axis, with room for error bars and texts, and whether it is logarithmic."""
        points = [point for series in self.series for point in series.points]
        is_log = axis == "x" or self.ylog
        values = [point.x if axis == "x" else float(point.y) for point in points]
        if axis == ("x" if self.ys else "y"):
            values += [end for point in points for end in (point.low, point.high) if end is not None]
            values += [] if self.reference is None else [self.reference]
        values = [value for value in values if isfinite(value) and (value > 0 or not is_log)] or [1.0]
        low, high = min(values), max(values)
        room = 0.45 if self.ys and axis == "x" else 0.08
        if is_log:
            span = max(high / low, 2.0)
            middle = (low * high) ** 0.5
            return middle / span**0.58, middle * span ** (0.5 + room), True
        span = high - low or abs(high) or 1.0
        return low - 0.08 * span, high + room * span, False


@dataclass(frozen=True)
class Chart:
    """A plot with one or several panels; `name` is the stem of its file names."""

    name: str
    title: str
    caption: str
    panels: list[Panel]

    @property
    def titles(self) -> dict[str, str]:
        """Title of every subject, in the order of appearance."""
        return {series.subject: series.title for panel in self.panels for series in panel.series}


def charts(planned: Plan, results: Results) -> list[Chart]:
    """All charts of a study that have data."""
    drawn = [pareto(planned, results), beside_dense(planned, results)]
    if len(planned.setting.experts) > 1:
        drawn.append(over_experts(planned, results))
    drawn.append(over_batches(planned, results))
    if planned.heads:
        drawn.append(heads(planned, results))
    return drawn


def pareto(planned: Plan, results: Results) -> Chart:
    """Quality against each cost, for the subjects with the first number of experts."""
    setting = planned.setting
    if setting.weight:
        quality, of = ("output error", "outputs") if setting.inputs else ("weight error", "the weight")
        label, scale = f"error of {of}, %", 100.0
    else:
        quality, label, scale = "expert rank", "largest rank of an expert", 1.0
    axes = _computed()
    for device in setting.devices:
        at = {"device": device, "batch": setting.batch}
        where = f", {device}" if len(setting.devices) > 1 else ""
        axes += [
            (f"Forward{where}", "ms", "forward", at, 1e3),
            (f"Step{where}", "ms", "step", at, 1e3),
            (f"Memory{where}", "MiB of a step", "step peak", at, 2**-20),
        ]
    subjects = [s for s in planned.subjects if s.spec.experts in ((), setting.experts[0])]

    def judged(subject: Subject) -> Point | None:
        rows = results.of_subject(subject, quality)
        return Point(0.0, scale * (rows[0].value or 0.0), text=_details(rows[0])) if rows else None

    title = f"{label.partition(',')[0].capitalize()} against cost, {count_text(setting.experts[0])} experts"
    caption = "A point is a format at a budget. The dashed line is the Pareto front."
    panels = [_trade_off(axis, label, subjects, judged, results, setting.weight is not None) for axis in axes]
    return Chart("pareto", title, caption, [panel for panel in panels if panel.series])


def heads(planned: Plan, results: Results) -> Chart:
    """Accuracy of heads against their cost."""
    setting = planned.setting
    at, label = {"device": setting.devices[0], "batch": HEAD_BATCH}, f"µs for {HEAD_BATCH} inputs"
    axes = [*_computed(), ("Latency", f"{label}, {setting.devices[0]}", "forward", at, 1e6)]

    def judged(head: Subject) -> Point | None:
        runs = results.of_subject(head, "accuracy")
        if not runs:
            return None
        middle, low, high = (100 * share for share in accuracy_of(runs))
        text = f"{_details(runs[0])}, {len(runs)} run{'s' if len(runs) > 1 else ''}"
        return Point(0.0, middle, low, high, text)

    return Chart(
        "heads",
        f"Heads trained on {setting.data_name}",
        f"{sizes_of(planned.heads[0].spec).replace('x', ' → ')}, validation rows; mean over the runs and its "
        "95 % interval. The dashed line is the Pareto front.",
        [_trade_off(axis, "accuracy, %", planned.heads, judged, results, lines=False) for axis in axes],
    )


#: Title, label, quantity, attributes of its measurements, and scale of an axis of costs.
Axis = tuple[str, str, str, dict[str, Any], float]


def _computed() -> list[Axis]:
    return [
        ("Parameters", "parameters", "parameters", {}, 1.0),
        ("FLOPs", "FLOPs of an input", "FLOPs", {}, 1.0),
    ]


def _trade_off(
    axis: Axis,
    label: str,
    subjects: Sequence[Subject],
    judged: Callable[[Subject], Point | None],
    results: Results,
    lowest: bool = False,
    lines: bool = True,
) -> Panel:
    """Quality, the y of the points that `judged` returns, against one cost."""
    title, xlabel, quantity, values, scale = axis
    points: dict[str, list[Point]] = {}
    for subject in subjects:
        costs, point = results.of_subject(subject, quantity, **values), judged(subject)
        if costs and point:
            x = scale * (costs[0].value or 0.0)
            points.setdefault(subject.name, []).append(point._replace(x=x, key=subject.key))
    titles = {subject.name: subject.title for subject in subjects}
    series = [Series(name, titles[name], sorted(points[name])) for name in titles if name in points]
    best = front((point for each in series for point in each.points), lowest)
    return Panel(title, xlabel, label, series, ylog=not lowest and lines, lines=lines, front=best)


def front(points: Iterable[Point], lowest: bool = False) -> list[Point]:
    """The Pareto front of small x and large y, or small y with `lowest`, from left to right."""
    sign = -1 if lowest else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * float(point.y))):
        if not best or sign * float(point.y) > sign * float(best[-1].y):
            best.append(point)
    return best


def beside_dense(planned: Plan, results: Results) -> Chart:
    """Every subject relative to the dense layer, at the first number of experts and the first budget."""
    setting = planned.setting
    wanted = [("FLOPs", "FLOPs", ""), ("Saved for backward", "saved", "")]
    for device in setting.devices:
        measured = {"Forward": "forward", "Step": "step", "Step peak": "step peak"}
        wanted += [(f"{title}, {device}", quantity, device) for title, quantity in measured.items()]
    titles = {subject.name: subject.title for subject in planned.main}
    panels = []
    for title, quantity, device in wanted:
        rows = {
            subject.name: row
            for subject in planned.main
            for row in results.of_subject(subject, quantity, device=device, batch=setting.batch)
        }
        if BASELINE in rows:
            series = [
                Series(name, titles[name], [_beside(row, rows[BASELINE])]) for name, row in rows.items()
            ]
            look: dict[str, Any] = {"lines": False, "ys": tuple(titles.values()), "reference": 1.0}
            panels.append(Panel(title, f"× {setting.layer.kind}", "", series, **look))
    return Chart(
        "beside-dense",
        f"Relative to the {setting.layer.kind}, {_at(planned)}",
        "All figures are relative to the dense layer. Times: median over the rounds, with quartiles.",
        panels,
    )


def over_experts(planned: Plan, results: Results) -> Chart:
    """Time, rank and saved activations against the number of experts, at the first budget."""
    setting, sizes = planned.setting, sizes_of(planned.setting.layer.spec)
    panels = []
    for device in setting.devices:
        for quantity in ("forward", "step"):
            rows = results.of(quantity, sizes=sizes, device=device, batch=setting.batch)
            of_budget = [row for row in rows if row.experts and row.budget in (0, setting.budgets[0])]
            series = _lines(of_budget, lambda row: _ratio(row, row.total))
            title = f"{quantity.capitalize()}, {device}"
            panels.append(Panel(title, "experts", "time × dense", series, reference=1.0))
    for title, quantity, label, scale in (
        ("Expert rank", "expert rank", "largest rank of an expert", 1.0),
        ("Saved", "saved", "KiB an input, for backward", 1 / 1024),
    ):
        rows = results.of(quantity, sizes=sizes, budget=setting.budgets[0])

        def point(row: Measurement, scale: float = scale) -> Point:
            return Point(row.total, scale * (row.value or 0.0), text=_details(row))

        panels.append(Panel(title, "experts", label, _lines(rows, point)))
    return Chart(
        "over-experts",
        "Over the number of experts",
        f"With {setting.budgets[0]:,} parameters. Ranks and saved activations are computed by formula.",
        panels,
    )


def over_batches(planned: Plan, results: Results) -> Chart:
    """Throughput and relative time against the batch size."""

    def throughput(row: Measurement) -> Point:
        batch = row.batch or 0
        middle, low, high = (batch / (seconds or 1.0) for seconds in (row.value, row.high, row.low))
        return Point(batch, middle, low, high, _details(row))

    panels = []
    for device in planned.setting.devices:
        rows = [row for s in planned.main for row in results.of_subject(s, "forward", device=device)]
        title, series = f"Throughput, {device}", _lines(rows, throughput)
        panels.append(Panel(title, "batch", "inputs per second", series, ylog=True))
        mixtures = [row for row in rows if row.subject != BASELINE]
        title, series = f"Forward time, {device}", _lines(mixtures, lambda row: _ratio(row, row.batch or 0))
        panels.append(Panel(title, "batch", "time × dense", series, ylog=True, reference=1.0))
    return Chart(
        "over-batches",
        f"Over the batch size, {_at(planned)}",
        "Forward passes in evaluation mode, without gradients.",
        panels,
    )


def accuracy_of(runs: list[Measurement]) -> tuple[float, float, float]:
    """Mean accuracy of the runs of a head, and the ends of its interval."""
    return proportion((row.value or 0.0 for row in runs), runs[0].repetitions)


def count_text(experts: Iterable[int | str]) -> str:
    """Numbers of experts for display, such as "64 × 64"."""
    return " × ".join(f"{int(n):,}" for n in experts) or "no"


def _at(planned: Plan) -> str:
    setting = planned.setting
    return f"{count_text(setting.experts[0])} experts, {setting.budgets[0]:,} parameters"


def _lines(rows: Iterable[Measurement], point: Callable[[Measurement], Point]) -> list[Series]:
    """One line per subject, from left to right, for the figures that were measured."""
    lines: dict[str, Series] = {}
    for row in rows:
        if is_figure(row.value):
            lines.setdefault(row.subject, Series(row.subject, row.title, [])).points.append(point(row))
    for line in lines.values():
        line.points.sort()
    return list(lines.values())


def _ratio(row: Measurement, x: float) -> Point:
    """Time relative to the dense layer, with quartiles."""
    return Point(x, row.ratio or 0.0, row.ratio_low, row.ratio_high, _details(row))


def _beside(row: Measurement, reference: Measurement) -> Point:
    ratio = row.ratio if row.ratio is not None else (row.value or 0.0) / (reference.value or 1.0)
    text = f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:,.0f}"
    return Point(ratio, row.title, row.ratio_low, row.ratio_high, text)


def _details(row: Measurement) -> str:
    parts = [
        f"{count_text(row.experts.split('x'))} experts" if row.experts else "",
        f"rank {row.rank}" if row.rank else "",
        f"batch {row.batch:,}" if row.batch else "",
        f"{1e3 * row.value:.3g} ms" if row.unit == "s" and row.value is not None else "",
    ]
    return ", ".join(part for part in parts if part)
