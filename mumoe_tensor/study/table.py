"""The tables of a study: costs and times of its subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mumoe_tensor.study.charts import count_text
from mumoe_tensor.study.results import Measurement, Results, joined, sizes_of
from mumoe_tensor.study.subjects import BASELINE
from mumoe_tensor.study.sweep import Plan

if TYPE_CHECKING:
    from rich.table import Table


#: A title, headings, and rows below them.
Cells = tuple[str, list[str], list[list[str]]]


def cells(planned: Plan, results: Results) -> list[Cells]:
    """The tables of costs and of times, for the screen and the page.

    Returns
    -------
    list of (str, list of str, list of list of str)
    """
    setting = planned.setting
    costs: Cells = (
        "Costs", ["", "experts", "rank", "parameters", "MFLOPs", "FLOP/byte", "saved KiB", "expert rank"], []
    )  # fmt: skip
    times: Cells = (
        "Times and peaks",
        ["", "experts", *(x for d in setting.devices for x in _measured(d))],
        [],
    )
    for subject in planned.subjects:
        figures = subject.figures(setting.batch)
        experts = joined(subject.spec.experts)
        head = [subject.title, count_text(experts) if experts else ""]
        costs[2].append(
            [
                *head,
                ", ".join(map(str, subject.spec.full_rank)),
                f"{figures['parameters']:,.0f}",
                f"{figures['FLOPs'] / 1e6:,.2f}",
                f"{figures['intensity']:,.1f}",
                f"{figures['saved'] / 1024:,.1f}",
                f"{figures['expert rank']:,.0f}",
            ]
        )
        of_times = list(head)
        for device in setting.devices:
            of_subject: dict[str, Any] = {
                "sizes": sizes_of(subject.spec), "subject": subject.name, "experts": experts,
                "device": device, "batch": setting.batch,
            }  # fmt: skip
            for quantity in ("forward", "step"):
                of_times += _time(results.of(quantity, **of_subject))
                if quantity == "forward":
                    of_times.append(f"{1e3 * subject.predicted(setting.batch, device):,.2f} ms")
            of_times += [_mebibytes(results.of(q, **of_subject)) for q in ("forward peak", "step peak")]
        times[2].append(of_times)
    return [costs, times]


def tables(planned: Plan, results: Results) -> list[Table]:
    """The tables for the screen."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = []
    for k, (title, headings, rows) in enumerate(cells(planned, results)):
        # A title may have brackets: Text is no markup.
        table = Table(
            title=Text(planned.setting.title if k == 0 else title, "bold"), title_justify="left",
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for heading in headings:
            table.add_column(heading, justify="left" if heading in ("", "rank") else "right", no_wrap=True)
        for n, row in enumerate(rows):
            table.add_row(*map(Text, row), end_section=n == 0)
        made.append(table)
    return made


def _measured(device: str) -> list[str]:
    return [f"forward {device}", "× dense", "predicted", f"step {device}", "× dense", "peak MiB", "of step"]


def _time(rows: list[Measurement]) -> list[str]:
    if not rows or rows[0].value is None or rows[0].ratio is None:
        return ["not run", ""]
    row = rows[0]
    is_baseline = row.subject == BASELINE
    quartiles = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
    return [f"{1e3 * rows[0].value:,.2f} ms", "" if is_baseline else quartiles]


def _mebibytes(rows: list[Measurement]) -> str:
    return f"{rows[0].value / 2**20:,.0f}" if rows and rows[0].value is not None else "–"
