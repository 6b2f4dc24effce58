"""Ratios to hand-written code and to opt_einsum, measured in one process.

    python -m benchmarks.ratios [NAME ...] [--device cuda] [--quick] [--json FILE] [--list]

A comparison is a function in `COMPARISONS` that maps `quick` and a device to a `Report`. Counts, and the
search for plans, are the same on every device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple, get_args

import numpy as np
import opt_einsum
import torch

import mumoe_tensor as mt
from benchmarks.common import DEVICES, inputs
from benchmarks.harness import Report, Row, about_text, effort, quartiles, threads, times, write_json
from benchmarks.layers import entmax, gates, layers, one_token, sparse
from benchmarks.memory import memory
from benchmarks.predicted import predicted
from benchmarks.small import small
from benchmarks.structured import structured
from benchmarks.ways import ways
from mumoe_tensor.contraction.execute import execute
from mumoe_tensor.contraction.order import Objective
from mumoe_tensor.contraction.plan import ContractionPlan, Implementation, planned_steps
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.timing import Spread, compare
from mumoe_tensor.spec import LayerSpec

THREADS = 2
#: Seconds after which a search is not repeated.
LONG_SEARCH = 0.5
OPTIMIZERS = ("auto", "dp", "auto-hq")
#: Limits on the largest intermediate and the FLOPs of the paths that are run.
LARGEST, MOST_FLOPS = 2**26, 2e10


def layer(
    format: str,
    experts: int | Sequence[int],
    in_features: int,
    out_features: int,
    rank: int | Sequence[int] | None,
    bias: bool = False,
) -> LayerSpec:
    """A spec from positional arguments, which keeps tables of cases short."""
    return LayerSpec(
        format, experts=experts, in_features=in_features, out_features=out_features, rank=rank, bias=bias
    )


def label(spec: LayerSpec) -> str:
    """The sizes of a layer in a table."""
    experts = "x".join(map(str, spec.experts)) or "no"
    rank = ",".join(map(str, spec.full_rank)) or "-"
    bias = ", bias" if spec.bias else ""
    return f"{experts} experts {spec.in_features}->{spec.out_features} rank {rank}{bias}"


def arrays(
    spec: LayerSpec, backend: str, batch: int, device: str = "cpu"
) -> tuple[mt.FactorizedTensor, Any, list[Any]]:
    """A random weight, inputs and coefficients, in float32."""
    shapes = ((batch, n) for n in (spec.in_features, *spec.experts))
    z, *coefficients = inputs(backend, *shapes, device=device)
    return mt.FactorizedTensor.random(spec, like=z, seed=0), z, coefficients


def backends(device: str) -> tuple[str, ...]:
    """Backends to measure on a device."""
    return ("numpy", "torch") if device == "cpu" else ("torch",)


def as_numpy(array: Any) -> np.ndarray:
    """Convert any array to NumPy."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


# ---- overhead: planned execution compared with the same array operations written by hand ------------------

CP_LAYERS = (
    layer("cp", 4, 8, 8, 4),
    layer("cp", (4, 3), 8, 8, 4),
    layer("cp", 16, 32, 20, 8, bias=True),
    layer("cp", 64, 768, 1000, 393, bias=True),
    layer("cp", 256, 768, 3072, 556),
    layer("cp", 256, 3072, 768, 556),
)


def cp_by_hand(backend: str, weight: mt.FactorizedTensor, bias: bool) -> Callable[[Any, list[Any]], Any]:
    """The CP forward pass written by hand: project every vector, multiply, project to the output."""
    *levels, inner, outer = weight.arrays

    def project(z: Any) -> Any:
        if not bias:
            return z @ inner
        if backend == "torch":
            return torch.addmm(inner[-1], z, inner[:-1])
        return z @ inner[:-1] + inner[-1]

    def forward(z: Any, coefficients: list[Any]) -> Any:
        mixed = project(z)
        for a, factor in zip(coefficients, levels, strict=True):
            mixed = mixed * (a @ factor)
        return mixed @ outer.T

    return forward


@torch.no_grad()
def overhead(quick: bool, device: str) -> Report:
    """Planned CP forward pass, and the public function, vs. hand-written array operations, at batch 1."""
    rows: list[Row] = []
    for backend, spec in product(backends(device), CP_LAYERS[::3] if quick else CP_LAYERS):
        weight, z, coefficients = arrays(spec, backend, 1, device)
        hand, (plan,) = cp_by_hand(backend, weight, spec.bias), mt.plan(spec).terms
        public = partial(mt.multilinear_moe, weight, z, coefficients, bias=spec.bias)
        callables = {
            "by hand": partial(hand, z, coefficients),
            "planned": partial(execute, plan.program, [*weight.arrays, *coefficients, z]),
            "public": public,
        }
        for call in callables.values():
            np.testing.assert_allclose(as_numpy(call()), as_numpy(public()), rtol=1e-3, atol=1e-4)
        timings = compare(callables, "by hand", **effort(quick, 301, 6), turn=2e-4, device=device)
        row = {"backend": backend, "case": label(spec), **times(timings, ["by hand"], "us")}
        row |= quartiles(timings.excess("planned"), "planned more us", "q1", "q3", 1e6)
        more = quartiles(timings.excess("public"), "public more us", "public q1", "public q3", 1e6)
        rows.append(row | more)
    return Report(
        "overhead",
        "Planned CP forward vs. the same array operations by hand: batch 1, float32, microseconds",
        {"backend": "", "case": ""} | dict.fromkeys(list(rows[0])[2:], ".1f"),
        rows,
        [
            "planned: execute(plan.program, ...). public: multilinear_moe, which also checks its arguments",
            "and looks up its plan. more: median of the differences in each round, with their quartiles.",
        ],
    )


# ---- search: planning from a cold cache ----------------------------------------------------------------

#: Numbers of experts for each number of levels.
SEARCH_EXPERTS = ((), (256,), (16, 16), (8, 8, 4), (4, 4, 4, 2, 2), (4,) * 8, (4,) * 12)


def rank_of(format: str, experts: tuple[int, ...]) -> tuple[int, ...] | None:
    """A typical rank of a format; for formats outside the library, all bonds have size 8."""
    usual = {
        "cp": (64,),
        "tucker": (*(min(8, n) for n in experts), 64, 64),
        "tr": (*(4,) * (len(experts) + 1), 64),
        "tt": (*(4,) * len(experts), 64),
    }
    bonds = mt.get_format(format).bonds(len(experts))
    return usual.get(format, (8,) * len(bonds)) if bonds else None


def search(quick: bool, device: str) -> Report:
    """Planning from a cold cache: every format, 0 to 12 levels, batches 1 and 65,536, all objectives."""
    fresh = count(1)

    def median(
        format: str, experts: tuple[int, ...], minimize: Objective, implementation: Implementation
    ) -> float:
        # New sizes each time, which are not in the cache; even, so that every format can split them.
        seconds: list[float] = []
        for batch in (1, 65_536) * (1 if quick else 5):
            spec = layer(format, experts, 768 + 2 * next(fresh), 768, rank_of(format, experts), bias=True)
            start = process_time()
            mt.plan(spec, batch=batch, minimize=minimize, implementation=implementation)
            seconds.append(process_time() - start)
            if sum(seconds) > LONG_SEARCH:
                break
        return 1e3 * Spread.of(seconds).median

    levels = [experts for experts in SEARCH_EXPERTS if not quick or len(experts) <= 3]
    rows: list[Row] = []
    implementations: tuple[Implementation, ...] = ("factorized", "auto")
    for format, minimize, implementation in product(mt.formats(), get_args(Objective), implementations):
        row: Row = {"format": format, "minimize": minimize, "implementation": implementation}
        for experts in levels:
            row[f"E={len(experts)}"] = median(format, experts, minimize, implementation)
        rows.append(row)
    return Report(
        "search",
        "Planning from a cold cache: median milliseconds of CPU time, by levels of experts",
        dict.fromkeys(("format", "minimize", "implementation"), "")
        | {f"E={len(experts)}": ".1f" for experts in levels},
        rows,
        ["In features change from call to call, so that nothing is cached."],
    )


# ---- planner: comparison with the paths of opt_einsum ----------------------------------------------------

PLANNER_LAYERS = (
    *(
        layer("tucker", n, i, o, r)
        for n, i, o in ((128, 768, 40), (256, 768, 3072), (256, 3072, 768), (64, 768, 1000), (128, 128, 128))
        for r in ((32, 64, 64), (64, 128, 128), (8, 64, 64))
    ),
    layer("tucker", (16, 16), 768, 768, (8, 8, 64, 64)),
    layer("tucker", (16, 16), 768, 40, (16, 16, 64, 64)),
    layer("tucker", (8, 8, 8), 768, 40, (16, 16, 16, 64, 64)),
    layer("cp", 64, 768, 1000, 393),
    layer("cp", 256, 768, 3072, 556),
    layer("cp", (64, 64), 768, 3072, 556),
    layer("hadamard", 256, 768, 3072, None),
    layer("tr", 64, 768, 1000, (4, 4, 102)),
    layer("tr", 256, 3072, 768, (4, 4, 149)),
    layer("tr", (8, 8, 8), 768, 40, (4, 4, 4, 4, 149)),
    layer("tt", 256, 768, 3072, (4, 149)),
    layer("tt", 64, 768, 3072, (32, 32)),
    layer("tt", (8, 8, 8), 768, 40, (4, 4, 4, 149)),
)
PLANNER_BATCHES = (1, 16, 256, 4096, 65_536)


class Rival(NamedTuple):
    """A path that an optimizer of opt_einsum chooses for a layer.

    `size` is its largest intermediate; `ratio` is the ratio of its FLOPs to the plan with the fewest FLOPs.
    """

    spec: LayerSpec
    batch: int
    optimizer: str
    path: list[tuple[int, ...]]
    flops: int
    size: int
    ratio: float

    @property
    def can_run(self) -> bool:
        """Whether it is fast enough and fits into memory."""
        return self.size <= LARGEST and self.flops <= MOST_FLOPS


def einsum_of(spec: LayerSpec, batch: int) -> tuple[str, list[tuple[int, ...]]]:
    """The forward pass for opt_einsum: equation and shapes of the operands."""
    (plan,) = mt.plan(spec, batch=batch).terms
    network = plan.program.network
    sizes = network.sizes_at(batch)
    letter = {name: opt_einsum.get_symbol(k) for k, name in enumerate(sizes)}
    terms = ["".join(letter[x] for x in operand) for operand in (*network.operands, network.output)]
    shapes = [tuple(sizes[x] for x in operand) for operand in network.operands]
    return f"{','.join(terms[:-1])}->{terms[-1]}", shapes


def rival(spec: LayerSpec, batch: int, optimizer: str) -> Rival:
    """A contraction path from an opt_einsum optimizer."""
    equation, shapes = einsum_of(spec, batch)
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimizer)
    ratio = info.opt_cost / mt.plan(spec, batch=batch, minimize="flops").flops
    return Rival(spec, batch, optimizer, path, info.opt_cost, max(info.size_list[:-1], default=0), ratio)


def planner(quick: bool, device: str) -> Report:
    """Planned paths vs. opt_einsum's: FLOPs over a grid of layers, and time if both can run."""
    specs = PLANNER_LAYERS[::2] if quick else PLANNER_LAYERS
    batches = PLANNER_BATCHES[::2] if quick else PLANNER_BATCHES
    rivals = [rival(s, b, o) for s in specs for b in batches for o in OPTIMIZERS]
    rows: list[Row] = []
    for format, optimizer in dict.fromkeys((r.spec.format, r.optimizer) for r in rivals):
        group = [r for r in rivals if (r.spec.format, r.optimizer) == (format, optimizer)]
        group.sort(key=lambda rival: (round(rival.ratio, 3), rival.batch))
        rows.append(_row(group[-1]))
        if not quick or optimizer == "auto":
            *_, worst = (r for r in group if r.can_run)
            rows += [_row(worst) | _measured(backend, worst, quick, device) for backend in backends(device)]
    return Report(
        "planner",
        "opt_einsum's paths vs. planned paths: FLOPs, and time in float32",
        dict.fromkeys(("format", "optimizer", "run on", "case"), "")
        | {"batch": ",d", "FLOPs ratio": ".3f", "planned ms": ".3f"}
        | dict.fromkeys(("time ratio", "q1", "q3"), ".2f"),
        rows,
        [
            f"Worst of {len(specs)} layers at batches {', '.join(f'{b:,}' for b in batches)}.",
            "FLOPs ratio: to the plan with the fewest FLOPs. Not run: the worst of all. Run: the worst with",
            f"no intermediate above {LARGEST:,} elements and at most {MOST_FLOPS:,.0f} FLOPs.",
            "Time ratio: opt_einsum's prepared expression to multilinear_moe with its default plan.",
            "Above 1 the plan is better.",
        ],
    )


def _row(rival: Rival) -> Row:
    return {
        "format": rival.spec.format.name,
        "optimizer": rival.optimizer,
        "run on": "-",
        "case": label(rival.spec),
        "batch": rival.batch,
        "FLOPs ratio": rival.ratio,
    }


@torch.no_grad()
def _measured(backend: str, rival: Rival, quick: bool, device: str) -> Row:
    spec, batch = rival.spec, rival.batch
    equation, shapes = einsum_of(spec, batch)
    expression = opt_einsum.contract_expression(equation, *shapes, optimize=rival.path)
    weight, z, coefficients = arrays(spec, backend, batch, device)
    plan = mt.plan(spec, batch=batch)
    callables = {
        "planned": partial(mt.multilinear_moe, weight, z, coefficients, plan=plan),
        "opt_einsum": partial(expression, *weight.arrays, *coefficients, z),
    }
    ours, theirs = (as_numpy(call()) for call in callables.values())
    np.testing.assert_allclose(theirs, ours, rtol=1e-2, atol=1e-3 * np.abs(ours).max())
    timings = compare(callables, "planned", **effort(quick, limit=1.5), device=device)
    ratio = quartiles(timings.ratio("opt_einsum"), "time ratio", "q1", "q3")
    return {"run on": backend, **times(timings, ["planned"]), **ratio}


# ---- batch: no single path is best for all batch sizes ---------------------------------------------------

BATCH_LAYERS = (
    layer("tucker", 128, 768, 40, (32, 64, 64)),
    layer("tucker", 256, 768, 768, (64, 128, 128)),
    layer("tucker", (16, 16), 768, 40, (16, 16, 64, 64)),
    layer("cp", 256, 768, 768, 556),
    layer("tr", 128, 768, 40, (4, 4, 95)),
    layer("tr", (8, 8, 8), 768, 40, (4, 4, 4, 4, 95)),
    layer("tt", 128, 768, 40, (16, 95)),
)
ONE, MANY = 1, 65_536


def batch_loss(spec: LayerSpec) -> tuple[float, float]:
    """FLOPs, relative to the best path, of the best path for 1 input at 65,536 inputs, and vice versa."""
    (few,), (many,) = (mt.plan(spec, batch=batch, minimize="flops").terms for batch in (ONE, MANY))

    def flops(plan: ContractionPlan, batch: int) -> int:
        return sum(step.flops for step in planned_steps(plan.program, batch))

    return flops(few, MANY) / flops(many, MANY), flops(many, ONE) / flops(few, ONE)


def batch(quick: bool, device: str) -> Report:
    """The cost of the best path for one batch size at another."""
    rows: list[Row] = []
    for spec in BATCH_LAYERS:
        at_many, at_one = batch_loss(spec)
        row = {"format": spec.format.name, "case": label(spec)}
        rows.append(row | {"best for 1, at 65,536": at_many, "best for 65,536, at 1": at_one})
    return Report(
        "batch",
        "FLOPs of a path at a batch size it was not chosen for, relative to the best path there",
        {"format": "", "case": ""} | dict.fromkeys(list(rows[0])[2:], ".3f"),
        rows,
        ["Counted, not measured. 1: the same path, or an equally good one."],
    )


COMPARISONS: dict[str, Callable[[bool, str], Report]] = {
    "overhead": overhead,
    "search": search,
    "planner": planner,
    "batch": batch,
    **({} if entmax is None else {"gates": gates}),
    "one-token": one_token,
    "sparse": sparse,
    "memory": memory,
    "layers": layers,
    "small": small,
    "ways": ways,
    "predicted": predicted,
    "structured": structured,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named comparisons, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.split("\n")[0])
    names = ", ".join(COMPARISONS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {names}; default: all")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute; default: cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports as JSON")
    parser.add_argument("--list", action="store_true", help="list the comparisons and exit")
    options = parser.parse_args(arguments)
    if options.list:
        for name, function in COMPARISONS.items():
            print(f"{name:11}{(function.__doc__ or '').splitlines()[0]}")
        return
    for name in options.names:
        if name not in COMPARISONS:
            parser.error(f"unknown comparison {name!r}; the comparisons are {names}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device")
    reports: list[Report] = []
    with threads(THREADS) as used:
        about = environment() | {"device": options.device, "threads": used, "quick": str(options.quick)}
        print(about_text(about))
        for name in options.names or COMPARISONS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            reports.append(COMPARISONS[name](options.quick, options.device))
            print(f"\n{reports[-1]}", flush=True)
            # Written after each comparison, so that stopping a later one loses nothing.
            if options.json:
                write_json(options.json, reports, about)


if __name__ == "__main__":
    main()
