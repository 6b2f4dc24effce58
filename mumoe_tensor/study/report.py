"""A study as a table on the screen, as CSV and as JSON. Files are written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mumoe_tensor.study.sweep import BASELINE, DTYPE, Row, Study

if TYPE_CHECKING:
    from rich.table import Table

#: How the backends are written.
BACKENDS = {"numpy": "NumPy", "torch": "torch"}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only once it is complete, in place of what was there.

    Parameters
    ----------
    path : Path
        Its folder is made if need be. If the block raises, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_csv(study: Study, path: Path) -> None:
    """Write a tidy table: one line a subject and backend, with the setting and the environment in each."""
    text = io.StringIO(newline="")
    lines = [setting(study) | asdict(row) | study.environment for row in study.rows]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def to_json(study: Study) -> dict[str, Any]:
    """Everything a study found, as plain values."""
    return {
        "setting": setting(study),
        "rows": [asdict(row) for row in study.rows],
        "unfitted": study.sweep.unfitted,
        "skipped": study.skipped,
        "environment": study.environment,
    }


def setting(study: Study) -> dict[str, Any]:
    """What was studied."""
    sweep = study.sweep
    return {
        "layer": sweep.layer.title,
        "in_features": sweep.layer.in_features,
        "hidden": sweep.layer.hidden,
        "out_features": sweep.layer.out_features,
        "experts": "x".join(map(str, sweep.experts)) or "none",
        "budget": sweep.budget,
        "batch": sweep.batch,
        "dtype": DTYPE,
        "seed": sweep.seed,
    }


def tables(study: Study) -> list[Table]:
    """Tables for the screen: what the formats cost, and how long their forward takes."""
    from rich import box
    from rich.table import Table

    sweep = study.sweep
    style: dict[str, Any] = {
        "title_justify": "left",
        "title_style": "bold",
        "box": box.SIMPLE_HEAD,
        "pad_edge": False,
        "padding": (0, 1, 0, 0),
    }
    costs, times = Table(title=sweep.title, **style), Table(title="Forward pass, median (quartiles)", **style)
    for table, headings in (
        (costs, ["rank", "parameters", "MFLOPs\n/input", "peak\nMiB", "saved\nMiB", "expert\nrank"]),
        (times, [x for b in study.backends for x in (f"{BACKENDS[b]} ms", f"× {sweep.layer.kind}")]),
    ):
        table.add_column("", no_wrap=True)
        for heading in headings:
            left = heading == "rank" or heading.startswith("×")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for subject in sweep.subjects:
        rows = study.of(subject.name)
        row = next(iter(rows.values()))
        last = subject.name == BASELINE
        costs.add_row(
            row.title,
            row.rank.replace(" ", ", ") or ("" if last else "none"),
            f"{row.parameters:,}",
            f"{row.flops / sweep.batch / 1e6:,.2f}",
            f"{row.peak_bytes / 2**20:,.1f}",
            f"{row.saved_bytes / 2**20:,.1f}",
            f"{row.max_expert_rank:,}",
            end_section=last,
        )
        cells = [x for backend in study.backends for x in _time_cells(rows.get(backend))]
        times.add_row(row.title, *cells, end_section=last)
    return [costs, times]


def notes(study: Study) -> list[str]:
    """What has to be known to read the tables, and what is not in them."""
    sweep = study.sweep
    free = [s.title for s in sweep.subjects if not s.fitted and s.name != BASELINE]
    found = [
        f"Ranks are fitted to {sweep.budget:,} parameters, gate and biases counted."
        + (f" Without a rank, at their own cost: {', '.join(free)}." if free else ""),
        "Peak is the most that is live at once in a contraction; saved is kept for the backward pass, "
        "without inputs and coefficients.",
        f"The forward counts the gate (product and entmax15). The {sweep.layer.kind} is the backend's own.",
    ]
    found += [f"{s.title} {s.skip}." for s in sweep.subjects if s.skip]
    found += [f"{name}: {why}" for name, why in sweep.unfitted.items()]
    found += [f"{name} is left out: {why}." for name, why in study.skipped.items()]
    load, cores = study.environment["load"], study.environment["cores"]
    if load and load > cores / 2:
        found.append(
            f"Other work ran on the machine when the study began (load {load} on {cores} cores): it slows "
            "some forwards more than others."
        )
    return found


def _time_cells(row: Row | None) -> tuple[str, str]:
    if row is None or row.seconds is None or row.ratios is None:
        return "not run", ""
    q1, median, q3 = row.ratios
    return f"{1e3 * row.seconds:,.2f}", f"{median:.2f} ({q1:.2f}–{q3:.2f})"
