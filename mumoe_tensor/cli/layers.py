"""Commands on a layer of some sizes: formats, plan, cost, fit."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import typer

import mumoe_tensor as mt
from mumoe_tensor.cli.console import bad_input, new_table, print_json, show
from mumoe_tensor.cli.options import (
    Batch,
    Bias,
    Constants,
    Dtype,
    Experts,
    FormatName,
    Gate,
    Hidden,
    Implementation,
    InFeatures,
    Json,
    MemoryLimit,
    Minimize,
    OpenRank,
    OutFeatures,
    Parameters,
    Rank,
)
from mumoe_tensor.cli.values import read_budget, read_experts, read_known_rank, read_rank
from mumoe_tensor.formats import Format, mode_names
from mumoe_tensor.spec import as_budget

#: Figures of a cost, and how they are written.
_COST = {
    "parameters": "parameters",
    "flops": "FLOPs",
    "reference_flops": "FLOPs, closed form",
    "write": "written",
    "size": "largest intermediate",
    "peak": "peak",
    "saved": "saved for backward",
    "max_expert_rank": "largest expert rank",
}


def formats(as_json: Json = False) -> None:
    """List the formats: their factors, the entries of a rank, and their parameters.

    Shown for one level of experts, of sizes N experts, I inputs (with the bias row), O outputs.

    Example: `mumoe-tensor formats`
    """
    found = [_declared(format) for format in mt.formats().values()]
    if as_json:
        print_json(found)
        return
    table = new_table("format", "title", "factors", "rank", "parameters")
    for entry in found:
        # One line a factor, its parameters beside it.
        terms = entry["parameters"].replace(" + ", "\n+ ")
        units = "\n" * (len(entry["factors"]) - len(terms.splitlines()))
        rank = ", ".join(entry["rank"]) or "none"
        table.add_row(
            entry["name"], entry["title"], "\n".join(entry["factors"]), rank, units + terms, end_section=True
        )
    show(table)


def plan(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    rank: Rank = None,
    batch: Batch = 1,
    bias: Bias = False,
    minimize: Minimize = "time",
    implementation: Implementation = "factorized",
    memory_limit: MemoryLimit = None,
    constants: Constants = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show the pairwise products of a forward pass, with their FLOPs and memory.

    Example: `mumoe-tensor plan tucker --experts 256 --in-features 768
    --out-features 768 --rank 64,128,128 --batch 8192`
    """
    with bad_input():
        planned = mt.plan(
            format,
            experts=read_experts(experts),
            in_features=in_features,
            out_features=out_features,
            rank=read_known_rank(rank),
            batch=batch,
            bias=bias,
            minimize=minimize,  # type: ignore[arg-type]  # the library says what it may be
            implementation=implementation,  # type: ignore[arg-type]
            memory_limit=memory_limit,
            constants=constants,  # type: ignore[arg-type]
            dtype=dtype,
        )
    if as_json:
        print_json({"format": format, **_plan_figures(planned)})
    else:
        print(planned)


def cost(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    hidden: Hidden = None,
    rank: Rank = None,
    batch: Batch = 1,
    bias: Bias = False,
    gate: Gate = False,
    minimize: Minimize = "time",
    implementation: Implementation = "factorized",
    memory_limit: MemoryLimit = None,
    constants: Constants = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say what a layer, or a block of two, costs: parameters, FLOPs, memory, expert rank.

    Example: `mumoe-tensor cost cp --experts 256 --in-features 768 --hidden 3072
    --out-features 768 --rank 556 --bias --gate`
    """
    with bad_input():
        found = mt.cost(
            format,
            experts=read_experts(experts),
            in_features=in_features,
            out_features=out_features,
            hidden=hidden,
            rank=read_known_rank(rank),
            batch=batch,
            bias=bias,
            gate=gate,
            minimize=minimize,  # type: ignore[arg-type]
            implementation=implementation,  # type: ignore[arg-type]
            memory_limit=memory_limit,
            constants=constants,  # type: ignore[arg-type]
            dtype=dtype,
        )
    total = {name: getattr(found, name) for name in _COST}
    parts = [mt.Cost(spec, (plan,)) for spec, plan in zip(found.spec.layers, found.plans, strict=True)]
    layers = [{name: getattr(part, name) for name in _COST} for part in parts]
    unit = "bytes" if dtype else "elements"
    if as_json:
        gate_figures = {"gate_parameters": found.gate_parameters, "gate_flops": found.gate_flops}
        print_json({"format": format, **total, **gate_figures, "unit": unit, "layers": layers})
        return
    sizes = [n for n in (in_features, hidden, out_features) if n is not None]
    gate_column: dict[str, int] = {"parameters": found.gate_parameters, "flops": found.gate_flops}
    columns = dict(zip((f"{i} → {o}" for i, o in pairwise(sizes)), layers, strict=True))
    table = new_table(
        "",
        *columns,
        *(["gate"] if gate else []),
        "total",
        title=f"{format}, batch {batch:,}; memory in {unit}",
    )
    for name, title in _COST.items():
        values = [*(layer[name] for layer in layers), *([gate_column.get(name)] if gate else []), total[name]]
        table.add_row(title, *("" if value is None else f"{value:,}" for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    show(table)


def fit(
    format: FormatName,
    experts: Experts,
    in_features: InFeatures,
    out_features: OutFeatures,
    hidden: Hidden = None,
    rank: OpenRank = None,
    parameters: Parameters = "match",
    bias: Bias = False,
    gate: Gate = False,
    rounding: Annotated[str, typer.Option(help="up, down or nearest.")] = "up",
    as_json: Json = False,
) -> None:
    """Find the rank at which a layer has a given number of parameters.

    Example: `mumoe-tensor fit tr --experts 64 --in-features 768 --out-features 1000
    --rank '4,4,?' --parameters 769000 --bias --gate`
    """
    sizes: dict[str, Any] = {"in_features": in_features, "hidden": hidden, "out_features": out_features}
    with bad_input():
        layer: dict[str, Any] = {**sizes, "experts": read_experts(experts), "bias": bias, "gate": gate}
        wanted = read_budget(parameters)
        fitted = mt.fit_rank(
            format,
            rank=read_rank(rank),
            parameters=wanted,
            rounding=rounding,  # type: ignore[arg-type]
            **layer,
        )
        found = mt.cost(format, rank=fitted, **layer)
    entries = [fitted] if isinstance(fitted, int) else list(fitted)
    budget = as_budget(wanted, mt.dense_parameters(**sizes, bias=bias))
    if as_json:
        result = {"format": format, "rank": entries, "parameters": found.parameters, "budget": budget}
        print_json({**result, "gate_parameters": found.gate_parameters})
        return
    print(f"rank {','.join(map(str, entries))}")
    share = f", of which the gate {found.gate_parameters:,}" if gate else ""
    print(f"{found.parameters:,} parameters{share}; the budget is {budget:,}")


def _declared(format: Format) -> dict[str, Any]:
    """A format in words, for one level of experts."""
    names = dict(zip(mode_names(1), "NIO", strict=True))
    factors = format.declaration(1)
    held = [f for f in factors if not f.optional]
    return {
        "name": format.name,
        "title": format.title,
        "factors": [" ".join(names.get(x, x) for x in f.indices) + " (ones)" * f.optional for f in factors],
        "rank": list(format.bonds(1)),
        "parameters": " + ".join("·".join(names.get(x, x) for x in f.indices) for f in held),
    }


def _plan_figures(planned: mt.ContractionPlan) -> dict[str, Any]:
    figures = ("flops", "write", "copied", "size", "peak", "saved")
    steps = ("equation", "kind", "shape", "flops", "write", "copied", "saved", "live")

    def told(found: Any) -> list[dict[str, Any]]:
        return [{name: getattr(step, name) for name in steps} for step in found]

    return {
        "implementation": planned.implementation,
        "minimize": planned.minimize,
        "batch": planned.batch,
        **{name: getattr(planned, name) for name in figures},
        "unit": "bytes" if planned.dtype else "elements",
        "steps": told(planned.steps),
        "constant_steps": told(planned.constant_steps),
    }
