"""The charts of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import isfinite
from statistics import mean
from typing import Any

from mumoe_tensor.formats.text import read_format
from mumoe_tensor.interval import interval
from mumoe_tensor.study.chart import Chart, Panel, Point, Series, front
from mumoe_tensor.study.layers import dense
from mumoe_tensor.study.results import Measurement, Results, joined, sizes_of, total
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import HEAD_BATCH, Plan

#: Formats this near to the best of a column share it; more than two are only counted.
TIE = 0.01
ALIKE = "alike"

#: Names of all charts.
NAMES = (
    "pareto", "beside-dense", "which-format", "over-experts", "over-batches", "crossover", "specialisation",
)  # fmt: skip


def charts(planned: Plan, results: Results) -> list[Chart]:
    """All charts of a study that have something to show.

    Returns
    -------
    list of Chart
    """
    drawn = [beside_dense(planned, results), best_formats(planned, results)]
    if len(planned.setting.experts) > 1:
        drawn.append(over_experts(planned, results))
    drawn += [over_batches(planned, results), crossover(planned, results)]
    if planned.heads:
        drawn = [pareto(planned, results), *drawn, specialisation(planned, results)]
    return drawn


def beside_dense(planned: Plan, results: Results) -> Chart:
    """Every subject beside the dense layer, at the first number of experts."""
    setting = planned.setting
    sizes, experts = sizes_of(setting.layer.spec), joined(setting.experts[0])
    titles = {s.name: s.title for s in planned.subjects if joined(s.spec.experts) in ("", experts)}
    computed = {"Parameters": "parameters", "FLOPs": "FLOPs", "Saved for backward": "saved"}
    computed |= {"Expert rank": "expert rank"}
    measured = {
        "Forward": "forward",
        "Step": "step",
        "Forward peak": "forward peak",
        "Step peak": "step peak",
    }
    wanted = [(title, quantity, "") for title, quantity in computed.items()]
    wanted += [
        (f"{title}, {device}", quantity, device)
        for device in setting.devices
        for title, quantity in measured.items()
    ]
    panels = []
    for title, quantity, device in wanted:
        of_quantity = results.of(quantity, sizes=sizes, device=device, batch=setting.batch)
        rows = {
            row.subject: row for row in of_quantity if row.experts in ("", experts) and row.value is not None
        }
        if BASELINE in rows:
            series = [
                Series(name, titles[name], [_beside(rows[name], rows[BASELINE])], line=False)
                for name in titles
                if name in rows
            ]
            look: dict[str, Any] = {"errors": "x", "reference": ("x", 1.0), "shown": True}
            panels.append(
                Panel(title, f"× {setting.layer.kind}", "", series, ys=tuple(titles.values()), **look)
            )
    return Chart(
        "beside-dense",
        f"Beside the {setting.layer.kind}, {count_text(experts)} experts",
        "Everything relative to the dense layer. Times: median of the turns with quartiles; what was not run "
        "is left out of them.",
        panels,
    )


def best_formats(planned: Plan, results: Results) -> Chart:
    """Which format is best at which number of experts, by several measures."""
    setting, sizes = planned.setting, sizes_of(planned.setting.layer.spec)
    measures: list[tuple[str, list[Measurement], Callable[..., float]]] = [
        ("fewest FLOPs", results.of("FLOPs", sizes=sizes), min),
        ("least saved", results.of("saved", sizes=sizes), min),
        ("highest rank", results.of("expert rank", sizes=sizes), max),
    ]
    for device in setting.devices:
        of_setting: dict[str, Any] = {"sizes": sizes, "device": device, "batch": setting.batch}
        measures += [
            (f"fastest forward, {device}", results.of("forward", **of_setting), min),
            (f"fastest step, {device}", results.of("step", **of_setting), min),
            (f"least peak, {device}", results.of("step peak", **of_setting), min),
        ]
    if planned.heads:
        accuracies = results.of("accuracy", sizes=sizes_of(planned.heads[0].spec))
        measures.append(("best accuracy*", _at_budget(planned, accuracies), max))
    points: dict[str, list[Point]] = {}
    titles = {ALIKE: "several alike"}
    for title, rows, best_of in measures:
        for experts, of_experts in _grouped(rows, lambda row: row.experts).items():
            # A format without a rank is not at the budget.
            fitted = [row for row in of_experts if row.budget and is_figure(row.value)]
            means = {
                name: mean(row.value or 0.0 for row in of_format)
                for name, of_format in _grouped(fitted, lambda row: row.subject).items()
            }
            if means:
                best = best_of(means.values())
                names = [name for name, value in means.items() if abs(value - best) <= TIE * abs(best)]
                titles |= {row.subject: row.title for row in fitted}
                short = [read_format(name).name for name in names]
                text = ", ".join(short) if len(names) < 3 else f"{len(names)} alike"
                name = names[0] if len(names) < 3 else ALIKE
                points.setdefault(name, []).append(Point(experts, title, text=text))
    columns = {str(point.x) for cells in points.values() for point in cells}
    seen = {str(point.y) for cells in points.values() for point in cells}
    series = [
        Series(
            name, titles[name], [point._replace(x=count_text(str(point.x))) for point in cells], line=False
        )
        for name, cells in points.items()
    ]
    panel = Panel(
        "",
        "experts",
        "",
        series,
        xs=tuple(count_text(experts) for experts in sorted(columns, key=lambda text: (total(text), text))),
        ys=tuple(title for title, *_ in measures if title in seen),
    )
    return Chart(
        "which-format",
        "Which format at which number of experts",
        f"The best format at the budget by each measure; within {TIE:.0%} of it counts as equal. Times and "
        "peaks where they were measured. *Of the heads on real data, by their mean.",
        [panel],
    )


def over_experts(planned: Plan, results: Results) -> Chart:
    """Time, rank and saved activations over the number of experts."""
    setting, sizes = planned.setting, sizes_of(planned.setting.layer.spec)
    panels = []
    for device in setting.devices:
        for quantity in ("forward", "step"):
            of_quantity = results.of(quantity, sizes=sizes, device=device, batch=setting.batch)
            series = _lines(
                (row for row in of_quantity if row.experts), _ratio_over(lambda row: total(row.experts))
            )
            title = f"{quantity.capitalize()}, {device}"
            panels.append(
                Panel(title, "experts", "time × dense", series, reference=("y", 1.0), measured=True)
            )
    for title, quantity, label, scale in (
        ("Expert rank", "expert rank", "largest rank of an expert", 1.0),
        ("Saved", "saved", "KiB an input, for backward", 1 / 1024),
    ):
        rows = [row for row in results.of(quantity, sizes=sizes) if row.budget and "x" not in row.experts]
        points = partial(_over_experts, scale=scale)
        panels.append(Panel(title, "experts", label, _lines(rows, points), measured=True))
    return Chart(
        "over-experts",
        "Over the number of experts",
        "At the same budget of parameters. Ranks and saved activations by formula.",
        panels,
    )


def over_batches(planned: Plan, results: Results) -> Chart:
    """Throughput and relative time over the batch size."""
    setting = planned.setting
    sizes, experts = sizes_of(setting.layer.spec), joined(setting.experts[0])

    def throughput(row: Measurement) -> Point:
        batch = row.batch or 0
        middle, low, high = (batch / (seconds or 1.0) for seconds in (row.value, row.high, row.low))
        return Point(batch, middle, low, high, _details(row))

    panels = []
    for device in setting.devices:
        forwards = results.of("forward", sizes=sizes, device=device)
        rows = [row for row in forwards if row.experts in ("", experts)]
        series = _lines(rows, throughput)
        panels.append(
            Panel(f"Throughput, {device}", "batch", "inputs per second", series, ylog=True, measured=True)
        )
        mixtures = [row for row in rows if row.subject != BASELINE]
        series = _lines(mixtures, _ratio_over(lambda row: row.batch or 0))
        look: dict[str, Any] = {"ylog": True, "reference": ("y", 1.0), "measured": True}
        panels.append(Panel(f"Forward time, {device}", "batch", "time × dense", series, **look))
    return Chart(
        "over-batches",
        f"Over the batch size, {count_text(experts)} experts",
        "Forward passes in evaluation, without gradients.",
        panels,
    )


def crossover(planned: Plan, results: Results) -> Chart:
    """Where a square layer is as fast as `torch.nn.Linear`."""
    setting = planned.setting
    look: dict[str, Any] = {"ylog": True, "reference": ("y", 1.0), "measured": True}
    squares = {sizes_of(dense(size, size)) for size in setting.squares}
    panels = []
    for device in setting.devices:
        for batch in setting.square_batches:
            rows = [
                row
                for row in results.of("forward", device=device, batch=batch)
                if row.sizes in squares and row.subject != BASELINE
            ]
            series = _lines(rows, _ratio_over(lambda row: int(row.sizes.split("x")[0])))
            title = f"Batch {batch:,}, {device}"
            panels.append(Panel(title, "inputs = outputs", "time × nn.Linear", series, **look))
    return Chart(
        "crossover",
        "Crossover against nn.Linear",
        f"Forward time of square layers of {setting.square_experts} experts with as many parameters. Below "
        "the line the mixture is faster.",
        panels,
    )


def pareto(planned: Plan, results: Results) -> Chart:
    """Accuracy of heads over what they cost."""
    sizes, device = sizes_of(planned.heads[0].spec), planned.setting.devices[0]
    accuracy = _grouped(results.of("accuracy", sizes=sizes), _head)
    latency = results.of("forward", sizes=sizes, device=device, batch=HEAD_BATCH)
    panels = []
    for title, label, rows, scale in (
        ("Parameters", "parameters", results.of("parameters", sizes=sizes), 1.0),
        ("FLOPs", "FLOPs of an input", results.of("FLOPs", sizes=sizes), 1.0),
        ("Latency", f"µs for {HEAD_BATCH} inputs, {device}", latency, 1e6),
    ):
        costs = {_head(row): scale * row.value for row in rows if row.value is not None}
        points: dict[str, list[Point]] = {}
        for head, runs in accuracy.items():
            if head in costs:
                points.setdefault(runs[0].subject, []).append(_mean_of(runs, costs[head], 100.0))
        titles = {runs[0].subject: runs[0].title for runs in accuracy.values()}
        series = [
            Series(name, titles[name], sorted(of_subject), line=False) for name, of_subject in points.items()
        ]
        everything = front(point for of_subject in points.values() for point in of_subject)
        panels.append(Panel(title, label, "accuracy, %", series, front=everything))
    return Chart(
        "pareto",
        "Accuracy over what it costs",
        f"Heads {sizes.replace('x', ' → ')} trained on {planned.setting.data_name}, validation rows; mean "
        "and 95 % interval over the runs. Up and to the left is better; the line joins what nothing beats.",
        panels,
    )


def specialisation(planned: Plan, results: Results) -> Chart:
    """What became of the experts of the heads."""
    sizes = sizes_of(planned.heads[0].spec)
    panels = []
    for title, label, quantities, scale in (
        ("Polysemanticity", "0 = one class", ("polysemanticity", "polysemanticity, random gate"), 1.0),
        ("Active experts", "% of experts an input uses", ("active experts",), 100.0),
        ("Dead experts", "% no input uses", ("dead experts",), 100.0),
    ):
        series = []
        for quantity in quantities:
            rows = _at_budget(planned, results.of(quantity, sizes=sizes))
            measured_rows = [row for row in rows if is_figure(row.value)]
            for name, of_subject in _grouped(measured_rows, lambda row: row.subject).items():
                points = [
                    _mean_of(runs, total(runs[0].experts), scale)
                    for runs in _grouped(of_subject, _head).values()
                ]
                series.append(Series(name, of_subject[0].title, sorted(points), hollow="random" in quantity))
        panels.append(Panel(title, "experts", label, series, measured=True))
    return Chart(
        "specialisation",
        "What became of the experts",
        "Heads at the dense head's parameters. Hollow: the same experts under a gate that deals its "
        "coefficients out at random; specialised experts lie below it.",
        panels,
    )


def count_text(experts: str) -> str:
    """Numbers of experts for a reader: "64x64" as "64 × 64"."""
    return " × ".join(f"{int(n):,}" for n in experts.split("x")) if experts else "no"


def _lines(rows: Iterable[Measurement], point: Callable[[Measurement], Point]) -> list[Series]:
    """One line a subject, from left to right, of what was run."""
    run = [row for row in rows if row.value is not None]
    return [
        Series(name, of_subject[0].title, sorted(point(row) for row in of_subject))
        for name, of_subject in _grouped(run, lambda row: row.subject).items()
    ]


def _ratio_over(x: Callable[[Measurement], float]) -> Callable[[Measurement], Point]:
    """Time over the dense layer's, with quartiles."""
    return lambda row: Point(x(row), row.ratio or 0.0, row.ratio_low, row.ratio_high, _details(row))


def _over_experts(row: Measurement, scale: float) -> Point:
    return Point(total(row.experts), scale * (row.value or 0.0), text=_details(row))


def _beside(row: Measurement, reference: Measurement) -> Point:
    if row.ratio is None:
        ratio, low, high = (row.value or 0.0) / (reference.value or 1.0), None, None
    else:
        ratio, low, high = row.ratio, row.ratio_low, row.ratio_high
    return Point(ratio, row.title, low, high, f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:,.0f}")


def _mean_of(runs: list[Measurement], x: float, scale: float) -> Point:
    centre, half = interval(scale * (row.value or 0.0) for row in runs)
    low, high = centre - (half or 0.0), centre + (half or 0.0)
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return Point(x, centre, low, high, ", ".join(part for part in (_details(runs[0]), count) if part))


def is_figure(value: float | None) -> bool:
    """Whether a value was measured, and is a finite number."""
    return value is not None and isfinite(value)


def _grouped(rows: Iterable[Measurement], key: Callable[[Measurement], Any]) -> dict[Any, list[Measurement]]:
    groups: dict[Any, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _head(row: Measurement) -> tuple[str, str, str]:
    """What tells a head from the others."""
    return row.subject, row.experts, row.rank


def _at_budget(planned: Plan, rows: Iterable[Measurement]) -> list[Measurement]:
    """Rows of the factorized heads at the budget nearest to the dense head's parameters."""
    budgets = {subject.budget for subject in planned.heads if subject.budget}
    dense = planned.heads[0].figures(2)["parameters"]
    nearest = min(budgets, key=lambda budget: abs(budget - dense), default=None)
    return [row for row in rows if row.budget == nearest]


def _details(row: Measurement) -> str:
    parts = [
        f"{count_text(row.experts)} experts" if row.experts else "",
        f"rank {row.rank}" if row.rank else "",
        f"batch {row.batch:,}" if row.batch else "",
        f"{1e3 * row.value:.3g} ms" if row.unit == "s" and row.value is not None else "",
    ]
    return ", ".join(part for part in parts if part)
