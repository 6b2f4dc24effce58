"""The charts of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, NamedTuple

from mumoe_tensor.interval import proportion
from mumoe_tensor.study.chart import Chart, Panel, Point, Series, front
from mumoe_tensor.study.results import Measurement, Results, joined, sizes_of, total
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import HEAD_BATCH, Plan

#: Names of all charts.
NAMES = ("pareto", "beside-dense", "over-experts", "over-batches", "heads")


def charts(planned: Plan, results: Results) -> list[Chart]:
    """All charts of a study that have data.

    Returns
    -------
    list of Chart
    """
    drawn = [pareto(planned, results), beside_dense(planned, results)]
    if len(planned.setting.experts) > 1:
        drawn.append(over_experts(planned, results))
    drawn.append(over_batches(planned, results))
    if planned.heads:
        drawn.append(heads(planned, results))
    return drawn


class TradeOff(NamedTuple):
    """Quality against one cost: a point for each subject, and the Pareto front."""

    title: str
    label: str
    points: dict[str, Point]
    front: list[Point]


def quality_of(planned: Plan) -> tuple[str, str, bool]:
    """The quantity that measures quality in a study, its label, and whether lower is better."""
    if planned.setting.inputs:
        return "output error", "error of outputs, %", True
    if planned.setting.weight:
        return "weight error", "error of the weight, %", True
    return "expert rank", "largest rank of an expert", False


def trade_offs(planned: Plan, results: Results) -> list[TradeOff]:
    """Quality over each cost, for the subjects with the first number of experts."""
    setting = planned.setting
    quality, _, lowest = quality_of(planned)
    experts = setting.experts[0]
    axes: list[tuple[str, str, str, dict[str, Any], float]] = [
        ("Parameters", "parameters", "parameters", {}, 1.0),
        ("FLOPs", "FLOPs of an input", "FLOPs", {}, 1.0),
    ]
    for device in setting.devices:
        at = {"device": device, "batch": setting.batch}
        where = f", {device}" if len(setting.devices) > 1 else ""
        axes += [
            (f"Forward{where}", "ms", "forward", at, 1e3),
            (f"Step{where}", "ms", "step", at, 1e3),
            (f"Memory{where}", "MiB of a step", "step peak", at, 2**-20),
        ]
    made = []
    for title, label, quantity, values, scale in axes:
        points = {}
        for subject in planned.subjects:
            costs = results.of_subject(subject, quantity, **values)
            measured = results.of_subject(subject, quality)
            if costs and measured and subject.spec.experts in ((), experts):
                y = (100.0 if lowest else 1.0) * (measured[0].value or 0.0)
                points[subject.key] = Point(scale * (costs[0].value or 0.0), y, text=_details(costs[0]))
        made.append(TradeOff(title, label, points, front(points.values(), lowest)))
    return [each for each in made if each.points]


def pareto(planned: Plan, results: Results) -> Chart:
    """Quality against cost."""
    _, label, lowest = quality_of(planned)
    panels = []
    for title, cost, points, best in trade_offs(planned, results):
        of_name: dict[str, list[Point]] = {}
        for subject in planned.subjects:
            if subject.key in points:
                of_name.setdefault(subject.name, []).append(points[subject.key])
        titles = {subject.name: subject.title for subject in planned.subjects}
        series = [Series(name, titles[name], sorted(of_name[name])) for name in titles if name in of_name]
        panels.append(Panel(title, cost, label, series, ylog=not lowest, front=best))
    counts = count_text(joined(planned.setting.experts[0]))
    return Chart(
        "pareto",
        f"{label.partition(',')[0].capitalize()} against cost, {counts} experts",
        "A point is a format at a budget. The dashed line is the Pareto front.",
        panels,
    )


def beside_dense(planned: Plan, results: Results) -> Chart:
    """Every subject relative to the dense layer, at the first number of experts and the first budget."""
    setting = planned.setting
    computed = {"FLOPs": "FLOPs", "Saved for backward": "saved"}
    measured = {"Forward": "forward", "Step": "step", "Step peak": "step peak"}
    wanted = [(title, quantity, "") for title, quantity in computed.items()]
    wanted += [
        (f"{title}, {device}", quantity, device)
        for device in setting.devices
        for title, quantity in measured.items()
    ]
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
                Series(name, titles[name], [_beside(row, rows[BASELINE])], line=False)
                for name, row in rows.items()
            ]
            look: dict[str, Any] = {"ys": tuple(titles.values()), "reference": 1.0}
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
    budgets = (0, setting.budgets[0])
    panels = []
    for device in setting.devices:
        for quantity in ("forward", "step"):
            of_quantity = results.of(quantity, sizes=sizes, device=device, batch=setting.batch)
            rows = [row for row in of_quantity if row.experts and row.budget in budgets]
            series = _lines(rows, _ratio_over(lambda row: total(row.experts)))
            title = f"{quantity.capitalize()}, {device}"
            panels.append(Panel(title, "experts", "time × dense", series, reference=1.0, measured=True))
    for title, quantity, label, scale in (
        ("Expert rank", "expert rank", "largest rank of an expert", 1.0),
        ("Saved", "saved", "KiB an input, for backward", 1 / 1024),
    ):
        rows = [row for row in results.of(quantity, sizes=sizes) if row.budget == setting.budgets[0]]

        def point(row: Measurement, scale: float = scale) -> Point:
            return Point(total(row.experts), scale * (row.value or 0.0), text=_details(row))

        panels.append(Panel(title, "experts", label, _lines(rows, point), measured=True))
    return Chart(
        "over-experts",
        "Over the number of experts",
        f"With {setting.budgets[0]:,} parameters. Ranks and saved activations are computed by formula.",
        panels,
    )


def over_batches(planned: Plan, results: Results) -> Chart:
    """Throughput and relative time against the batch size."""
    setting = planned.setting
    keys = {(subject.name, joined(subject.spec.full_rank)) for subject in planned.main}
    sizes, experts = sizes_of(setting.layer.spec), ("", joined(setting.experts[0]))

    def throughput(row: Measurement) -> Point:
        batch = row.batch or 0
        middle, low, high = (batch / (seconds or 1.0) for seconds in (row.value, row.high, row.low))
        return Point(batch, middle, low, high, _details(row))

    panels = []
    for device in setting.devices:
        forwards = results.of("forward", sizes=sizes, device=device)
        rows = [row for row in forwards if row.experts in experts and (row.subject, row.rank) in keys]
        series = _lines(rows, throughput)
        panels.append(
            Panel(f"Throughput, {device}", "batch", "inputs per second", series, ylog=True, measured=True)
        )
        mixtures = [row for row in rows if row.subject != BASELINE]
        series = _lines(mixtures, _ratio_over(lambda row: row.batch or 0))
        look: dict[str, Any] = {"ylog": True, "reference": 1.0, "measured": True}
        panels.append(Panel(f"Forward time, {device}", "batch", "time × dense", series, **look))
    return Chart(
        "over-batches",
        f"Over the batch size, {_at(planned)}",
        "Forward passes in evaluation mode, without gradients.",
        panels,
    )


def heads(planned: Plan, results: Results) -> Chart:
    """Accuracy of heads against their cost."""
    device = planned.setting.devices[0]
    at = {"device": device, "batch": HEAD_BATCH}
    panels = []
    for title, label, quantity, values, scale in (
        ("Parameters", "parameters", "parameters", {}, 1.0),
        ("FLOPs", "FLOPs of an input", "FLOPs", {}, 1.0),
        ("Latency", f"µs for {HEAD_BATCH} inputs, {device}", "forward", at, 1e6),
    ):
        points: dict[str, list[Point]] = {}
        for head in planned.heads:
            costs, runs = results.of_subject(head, quantity, **values), results.of_subject(head, "accuracy")
            if costs and runs:
                middle, low, high = (100 * share for share in accuracy_of(runs))
                text = f"{_details(runs[0])}, {len(runs)} run{'s' if len(runs) > 1 else ''}"
                point = Point(scale * (costs[0].value or 0.0), middle, low, high, text)
                points.setdefault(head.name, []).append(point)
        titles = {head.name: head.title for head in planned.heads}
        series = [
            Series(name, titles[name], sorted(of_subject), line=False) for name, of_subject in points.items()
        ]
        everything = front(point for of_subject in points.values() for point in of_subject)
        panels.append(Panel(title, label, "accuracy, %", series, front=everything))
    sizes = sizes_of(planned.heads[0].spec)
    return Chart(
        "heads",
        f"Heads trained on {planned.setting.data_name}",
        f"{sizes.replace('x', ' → ')}, validation rows; mean over the runs and its 95 % interval. The dashed "
        "line is the Pareto front.",
        panels,
    )


def accuracy_of(runs: list[Measurement]) -> tuple[float, float, float]:
    """Mean accuracy of the runs of a head, and the ends of its interval."""
    return proportion((row.value or 0.0 for row in runs), runs[0].repetitions)


def count_text(experts: str) -> str:
    """Numbers of experts for display: "64x64" as "64 × 64"."""
    return " × ".join(f"{int(n):,}" for n in experts.split("x")) if experts else "no"


def _at(planned: Plan) -> str:
    experts = count_text(joined(planned.setting.experts[0]))
    return f"{experts} experts, {planned.setting.budgets[0]:,} parameters"


def _lines(rows: Iterable[Measurement], point: Callable[[Measurement], Point]) -> list[Series]:
    """One line per subject, from left to right, for the figures that were measured."""
    of_name: dict[str, list[Measurement]] = {}
    for row in rows:
        if is_figure(row.value):
            of_name.setdefault(row.subject, []).append(row)
    return [
        Series(name, of_subject[0].title, sorted(point(row) for row in of_subject))
        for name, of_subject in of_name.items()
    ]


def _ratio_over(x: Callable[[Measurement], float]) -> Callable[[Measurement], Point]:
    """Time relative to the dense layer, with quartiles."""
    return lambda row: Point(x(row), row.ratio or 0.0, row.ratio_low, row.ratio_high, _details(row))


def _beside(row: Measurement, reference: Measurement) -> Point:
    if row.ratio is None:
        ratio, low, high = (row.value or 0.0) / (reference.value or 1.0), None, None
    else:
        ratio, low, high = row.ratio, row.ratio_low, row.ratio_high
    return Point(ratio, row.title, low, high, f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:,.0f}")


def is_figure(value: float | None) -> bool:
    """Whether a value was measured and is finite."""
    return value is not None and isfinite(value)


def _details(row: Measurement) -> str:
    parts = [
        f"{count_text(row.experts)} experts" if row.experts else "",
        f"rank {row.rank}" if row.rank else "",
        f"batch {row.batch:,}" if row.batch else "",
        f"{1e3 * row.value:.3g} ms" if row.unit == "s" and row.value is not None else "",
    ]
    return ", ".join(part for part in parts if part)
