"""Time and memory of the analysis of a full-size layer.

    python -m benchmarks.analysis [--inputs 1000000] [--experts 10000]

Inputs are mapped in batches; the coefficients of each batch are counted and then freed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, threads
from mumoe_tensor.analysis import Labels, TopInputs, Usage, watch_coefficients
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.memory import growth
from mumoe_tensor.nn import MuMoE

INPUTS, EXPERTS, BATCH = 1_000_000, 10_000, 1_000
#: A layer that is cheap compared with its gate, and the number of top inputs of each expert.
FEATURES, CLASSES, RANK, KEPT = 32, 10, 8, 8
MIB = 2**20


class Analysis:
    """The statistics of every expert in a layer with random weights."""

    def __init__(self, experts: int):
        torch.manual_seed(0)
        self.layer = MuMoE(FEATURES, CLASSES, experts=experts, rank=RANK, gate_norm="layer").eval()
        torch.nn.init.normal_(self.layer.gate.weight)
        self.centres = 2 * torch.randn(CLASSES, FEATURES)
        self.usage, self.top = Usage(experts), TopInputs(experts, KEPT)
        self.by_label = Labels(experts, CLASSES)
        self.seconds: Counter[str] = Counter()

    @torch.no_grad()
    def run(self, inputs: int) -> None:
        """Stream inputs that are drawn around the centres of their classes."""
        draw = torch.Generator().manual_seed(0)
        start = process_time()
        for done in range(0, inputs, BATCH):
            labels = torch.randint(CLASSES, (min(BATCH, inputs - done),), generator=draw)
            x = self.centres[labels] + torch.randn(len(labels), FEATURES, generator=draw)

            def count(name: str, coefficients: tuple[Tensor, ...], labels: Tensor = labels) -> None:
                (a,) = coefficients
                self._timed("usage", self.usage.update, a)
                self._timed("top inputs", self.top.update, a)
                self._timed("labels", self.by_label.update, a, labels)

            with watch_coefficients(self.layer, count):
                self.layer(x)
        others = sum(self.seconds.values())
        self.seconds["layer and inputs"] += process_time() - start - others

    def _timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        start = process_time()
        call(*arguments)
        self.seconds[name] += process_time() - start


def measure(inputs: int, experts: int) -> Report:
    """Peak memory and CPU time of an analysis, and its results."""
    # First run a small analysis, so that libraries allocate their buffers.
    Analysis(16).run(2 * BATCH)
    made: list[Analysis] = []

    def stream() -> None:
        made.append(Analysis(experts))
        made[0].run(inputs)

    peak = growth(stream)
    (analysis,) = made
    usage, labels = analysis.usage.statistics(), analysis.by_label.statistics()
    seconds = sum(analysis.seconds.values())
    parts = ", ".join(f"{name} {share / seconds:.0%}" for name, share in analysis.seconds.items())
    row = {
        "inputs": usage.rows,
        "experts": experts,
        "peak MiB": peak / MIB,
        "at once MiB": 4 * usage.rows * experts / MIB,
        "seconds": seconds,
        "inputs a second": usage.rows / seconds,
        "over the layer": seconds / analysis.seconds["layer and inputs"],
        "active an input": usage.active * experts,
        "dead": usage.dead,
        "label ratio": labels.ratio,
        "clarity": labels.clarity,
    }
    columns = {
        "inputs": ",d", "experts": ",d", "peak MiB": ",.0f", "at once MiB": ",.0f", "seconds": ",.0f",
        "inputs a second": ",.0f", "over the layer": ".2f", "active an input": ".1f", "dead": ",d",
        "label ratio": ".2f", "clarity": ".2f",
    }  # fmt: skip
    notes = [
        f"Usage, {KEPT} top inputs and labels of every expert, batches of {BATCH:,}; a layer",
        f"{FEATURES} -> {CLASSES}, CP of rank {RANK}, entmax15. Peak: growth of the process.",
        f"At once: all coefficients in float32. Seconds of CPU time: {parts}.",
    ]
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
        about = environment() | {"threads": used}
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"\n{measure(options.inputs, options.experts)}")


if __name__ == "__main__":
    main()
