"""Store the results of the check and print its table for the docs: ``python -m benchmarks.gpu.table DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, read_json, write_json
from mumoe_tensor.files import whole_file

MEASURED = Path(__file__).parents[1] / "measured"
RUNS = ("eager", "graph", "compiled")


def as_text(reports: Sequence[Report], about: Mapping[str, Any]) -> str:
    """All tables that have rows."""
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n\n".join([head, *(str(report) for report in reports if report.rows)]) + "\n"


def markdown(reports: Sequence[Report]) -> str:
    """Times of layers relative to dense layers, and those of GPT-2, as Markdown."""
    ratios: dict[tuple[Any, ...], dict[tuple[Any, ...], Any]] = {}
    models = []
    for report in reports:
        for row in report.rows:
            if report.name in ("layers", "compiled"):
                key = tuple(row[name] for name in ("shape", "format", "experts", "tokens", "precision"))
                ratios.setdefault(key, {})[row["run"], row.get("pass")] = row.get("to dense")
            if report.name == "gpt2":
                models.append(row)
    lines = [f"| layer | tokens | precision | {' | '.join(f'{run}: forward, step' for run in RUNS)} |"]
    lines += ["|---|---|---|" + "---|" * len(RUNS)]
    for (shape, format, experts, tokens, precision), timings in ratios.items():
        cells = []
        for run in RUNS:
            pair = [timings.get((run, kind)) for kind in ("forward", "step")]
            cells.append(", ".join("–" if value is None else f"{value:.2f}" for value in pair))
        place = f"{shape}, {format}, {experts} experts | {tokens:,} | {precision}"
        lines.append(f"| {place} | {' | '.join(cells)} |")
    lines += [
        "",
        "| GPT-2 124M | run | tokens per second | time over dense | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for row in models:
        values = f"{row['tokens/s']:,.0f} | {row['to dense']:.2f} | {row['peak MiB']:,.0f}"
        lines.append(f"| {row['model']} | {row['run']} | {values} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``benchmarks/measured/gpu.json`` and ``gpu.txt``; print the Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder that the check wrote")
    options = parser.parse_args(arguments)
    reports, about = read_json(options.folder / "gpu.json")
    if about["fake"]:
        parser.error(f"{options.folder} has results of toy sizes on a CPU, not of a GPU")
    write_json(MEASURED / "gpu.json", reports, about)
    with whole_file(MEASURED / "gpu.txt") as file:
        file.write(as_text(reports, about).encode())
    print(markdown(reports))


if __name__ == "__main__":
    main()
