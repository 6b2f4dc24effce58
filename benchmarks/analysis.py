"""Time and memory of the analysis of a full-size layer.

    python -m benchmarks.analysis [--inputs 1000000] [--experts 10000]

Inputs are mapped in batches; the coefficients of each batch are counted and then freed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from time import process_time

import torch
from torch import Tensor

from benchmarks.harness import MIB, Report, about_text, threads
from mumoe_tensor.analysis import Labels, TopInputs, Usage, watch_coefficients
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.memory import growth
from mumoe_tensor.nn import MuMoE

INPUTS, EXPERTS, BATCH = 1_000_000, 10_000, 1_000
#: A layer that is cheap compared with its gate, and the number of top inputs of each expert.
FEATURES, CLASSES, RANK, KEPT = 32, 10, 8, 8


class Analysis:
    """The statistics of every expert in a layer with random weights."""

    def __init__(self, experts: int):
        torch.manual_seed(0)
        self.layer = MuMoE(FEATURES, CLASSES, experts=experts, rank=RANK, gate_norm="layer").eval()
        torch.nn.init.normal_(self.layer.gate.weight)
        self.centres = 2 * torch.randn(CLASSES, FEATURES)
        self.usage, self.top = Usage(experts), TopInputs(experts, KEPT)
        self.by_label = Labels(experts, CLASSES)

    @torch.no_grad()
    def run(self, inputs: int, counted: bool = True) -> None:
        """Stream inputs that are drawn around the centres of their classes, and count their coefficients."""
        draw = torch.Generator().manual_seed(0)
        for done in range(0, inputs, BATCH):
            labels = torch.randint(CLASSES, (min(BATCH, inputs - done),), generator=draw)
            x = self.centres[labels] + torch.randn(len(labels), FEATURES, generator=draw)

            def count(name: str, coefficients: tuple[Tensor, ...], labels: Tensor = labels) -> None:
                (a,) = coefficients
                self.usage.update(a)
                self.top.update(a)
                self.by_label.update(a, labels)

            with watch_coefficients(self.layer, count) if counted else nullcontext():
                self.layer(x)


def measure(inputs: int, experts: int) -> Report:
    """Peak memory and CPU time of an analysis, and its results."""
    # First run a small analysis, so that libraries allocate their buffers.
    Analysis(16).run(2 * BATCH)
    made: list[Analysis] = []

    def stream() -> None:
        made.append(Analysis(experts))
        made[0].run(inputs)

    start = process_time()
    peak = growth(stream)
    between = process_time()
    made[0].run(inputs, counted=False)
    seconds, forward = between - start, process_time() - between
    usage, labels = made[0].usage.statistics(), made[0].by_label.statistics()
    row = {
        "inputs": usage.rows,
        "experts": experts,
        "peak MiB": peak / MIB,
        "at once MiB": 4 * usage.rows * experts / MIB,
        "seconds": seconds,
        "inputs a second": usage.rows / seconds,
        "over forward": seconds / forward,
        "active an input": usage.active * experts,
        "dead": usage.dead,
        "label ratio": labels.ratio,
        "clarity": labels.clarity,
    }
    formats = (",d", ",d", ",.0f", ",.0f", ",.0f", ",.0f", ".2f", ".1f", ",d", ".2f", ".2f")
    notes = [
        f"Usage, {KEPT} top inputs and labels of every expert, batches of {BATCH:,}; a layer",
        f"{FEATURES} -> {CLASSES}, CP of rank {RANK}, entmax15. Peak: growth of the process.",
        "At once: all coefficients in float32. Seconds of CPU time;",
        "over forward: relative to the forward passes alone.",
    ]
    columns = dict(zip(row, formats, strict=True))
    return Report("analysis", "Analysis of a stream of inputs", columns, [row], notes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    options = parser.parse_args(arguments)
    if min(options.inputs, options.experts) < 1:
        parser.error(f"inputs and experts must be positive, got {options.inputs} and {options.experts}")
    with threads(1) as used:
        print(about_text(environment() | {"threads": used}))
        print(f"\n{measure(options.inputs, options.experts)}")


if __name__ == "__main__":
    main()
