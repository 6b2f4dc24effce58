"""The stages of the check: ``python -m benchmarks.gpu.stages NAME DEVICE SIZES FILE`` runs one.

A stage is a function that maps a device, and whether to use toy sizes, to rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu.gates import gates
from benchmarks.gpu.layers import layers, memory
from benchmarks.gpu.tests import marked_tests
from benchmarks.gpu.training import gpt2
from benchmarks.harness import Row


@dataclass(frozen=True)
class Stage:
    """A part of the check: its table, and its time limit in seconds."""

    rows: Callable[[str, bool], Iterable[Row]]
    seconds: float
    title: str
    columns: dict[str, str]
    notes: tuple[str, ...] = ()


QUARTILES = {"low": ".2f", "high": ".2f"}
SHAPE = {"shape": "", "experts": "", "format": ""}
TIMES = {"dense ms": ".3f", "layer ms": ".3f", "elementwise ms": ".3f", "to dense": ".2f"} | QUARTILES
LAYERS = SHAPE | {"tokens": ",d", "precision": "", "run": "", "pass": ""} | TIMES
LAYERS |= {"to limit": ".2f", "TFLOP/s": ".1f", "note": ""}
LAYER_NOTES = (
    "to dense: time over that of a dense layer of equal parameters, median over rounds, with quartiles.",
    "to limit: time without the elementwise part, over the products of plan and gate in place.",
)
#: In the order in which they run: the most informative first.
STAGES = {
    "tests": Stage(
        marked_tests,
        80,
        "Tests on the device",
        {"test": "", "passed": "d", "failed": "d", "error": "d", "skipped": "d"},
    ),
    "gates": Stage(
        gates,
        40,
        "Gates",
        {"gate": "", "experts": ",d", "dtype": "", "pass": "", "ms": ".3f", "to limit": ".2f"}
        | QUARTILES
        | {"copy GB/s": ",.0f", "note": ""},
        ("to limit: time over that of the minimum traffic, from a copy of the logits in the same round.",),
    ),
    "layers": Stage(layers, 75, "Layers, eager and as CUDA graphs", LAYERS, LAYER_NOTES),
    "compiled": Stage(partial(layers, runs=("compiled",)), 75, "Layers, compiled", LAYERS, LAYER_NOTES),
    "memory": Stage(
        memory,
        20,
        "Memory of a step, float32",
        SHAPE
        | {"tokens": ",d", "recompute": ""}
        | dict.fromkeys(("dense peak MiB", "layer peak MiB", "layer kept MiB"), ",.1f"),
        ("peak: growth in a step, with gradients. kept: saved for the backward pass.",),
    ),
    "gpt2": Stage(
        gpt2,
        90,
        "A training step of GPT-2 124M, 8,192 tokens, bfloat16 by autocast, AdamW",
        {"model": "", "run": "", "ms": ".1f", "tokens/s": ",.0f", "to dense": ".2f"}
        | QUARTILES
        | {"peak MiB": ",.0f"},
        ("peak: growth in a step, on top of parameters and moments.",),
    ),
}


def main(name: str, device: str, sizes: str, path: str) -> None:
    """Write the rows of a stage to a file as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for row in STAGES[name].rows(device, sizes == "toy"):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
