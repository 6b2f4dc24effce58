"""Commands that only count: formats, plan, cost, fit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

import mumoe_tensor as mt
from mumoe_tensor.cli.configs import options_of
from mumoe_tensor.cli.console import bad_input, new_table, print_json, show
from mumoe_tensor.cli.options import FormatName, Gate, Imports, Json
from mumoe_tensor.cli.values import read_budget
from mumoe_tensor.configs.layer import LayerConfig, PlanConfig
from mumoe_tensor.contraction.machine import in_words
from mumoe_tensor.formats import Format, mode_names
from mumoe_tensor.formats.text import read_format
from mumoe_tensor.spec import as_budget

#: Attributes of a single layer, as opposed to a block.
MATRIX = ("experts", "in_features", "out_features", "rank", "bias")
#: Attributes of a cost, and their names in the table.
_COST = {
    "parameters": "parameters",
    "flops": "FLOPs",
    "reference_flops": "FLOPs, closed form",
    "write": "written",
    "size": "largest intermediate",
    "peak": "peak",
    "saved": "saved for backward",
    "max_expert_rank": "largest expert rank",
    "seconds": "predicted time",
}


def formats(imports: Imports = None, as_json: Json = False) -> None:
    """List the tensor formats with their factors, rank and number of parameters.

    For one level of N experts, I inputs (including the bias row) and O outputs.

    Example: `mumoe-tensor formats`
    """
    entries = [_declared(format) for format in mt.formats().values()]
    if as_json:
        print_json(entries)
        return
    table = new_table("format", "title", "factors", "splits", "rank", "parameters")
    for entry in entries:
        # One line per factor, with its parameters.
        terms = entry["parameters"].replace(" + ", "\n+ ")
        units = "\n" * (len(entry["factors"]) - len(terms.splitlines()))
        rank = ", ".join(entry["rank"]) or "none"
        factors = "\n".join(entry["factors"])
        splits = "\n".join(f"{mode} in {parts}" for mode, parts in entry["splits"].items())
        table.add_row(entry["name"], entry["title"], factors, splits, rank, units + terms, end_section=True)
    show(table)


@options_of("layer", LayerConfig, MATRIX, required=True)
@options_of("options", PlanConfig)
def plan(
    format: FormatName,
    *,
    layer: dict[str, Any],
    options: dict[str, Any],
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Show the contraction path of a forward pass, with FLOPs and memory of its products.

    Example: `mumoe-tensor plan tucker --experts 256 --in-features 768
    --out-features 768 --rank 64,128,128 --batch 8192`
    """
    with bad_input():
        planned = mt.plan(read_format(format), **layer, **options)
    if as_json:
        print_json({"format": format, **_plan_figures(planned)})
    else:
        print(planned)


@options_of("layer", LayerConfig, required=True)
@options_of("options", PlanConfig)
def cost(
    format: FormatName,
    *,
    layer: dict[str, Any],
    gate: Gate = False,
    options: dict[str, Any],
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Count the parameters, FLOPs and memory of a layer or a block.

    Example: `mumoe-tensor cost cp --experts 256 --in-features 768 --hidden 3072
    --out-features 768 --rank 556 --bias --gate`
    """
    with bad_input():
        total = mt.cost(read_format(format), gate=gate, **layer, **options)
    figures = _cost_figures(total)
    layers = [mt.Cost(spec, (plan,)) for spec, plan in zip(total.spec.layers, total.plans, strict=True)]
    columns = [
        (f"{part.spec.in_features} → {part.spec.out_features}", _cost_figures(part)) for part in layers
    ]
    of_gate = {name: getattr(total, f"gate_{name}") for name in ("parameters", "flops", "seconds")}
    first = total.plans[0]
    unit = "bytes" if first.dtype else "elements"
    if as_json:
        gate_figures = {f"gate_{name}": value for name, value in of_gate.items()}
        parts = [part for _, part in columns]
        padded = {name: held for name, (_, held) in total.spec.padding.items()}
        about = {"unit": unit, "machine": asdict(first.machine), "padded": padded}
        print_json({"format": format, **figures, **gate_figures, **about, "layers": parts})
        return
    if gate:
        columns.append(("gate", of_gate))
    columns.append(("total", figures))
    headings = [heading for heading, _ in columns]
    table = new_table("", *headings, title=f"{format}, batch {first.batch:,}; memory in {unit}")
    for name, title in _COST.items():
        table.add_row(title, *(_figure(name, column.get(name)) for _, column in columns))
    for column in table.columns[1:]:
        column.justify = "right"
    show(table)
    print(f"predicted at {first.machine}")
    for name, (size, held) in total.spec.padding.items():
        print(f"{name} {size:,} padded to {held:,}")


@options_of("layer", LayerConfig, required=True)
def fit(
    format: FormatName,
    *,
    layer: dict[str, Any],
    parameters: Annotated[
        str,
        typer.Option(help="Number of parameters, match for that of the dense layer, or a multiple (2x)."),
    ] = "match",
    gate: Gate = False,
    rounding: Annotated[
        str, typer.Option(help="Rank to choose if none fits exactly: up, down or nearest.")
    ] = "up",
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Find the rank at which a layer has a given number of parameters.

    Example: `mumoe-tensor fit tr --experts 64 --in-features 768 --out-features 1000
    --rank '4,4,?' --parameters 769000 --bias --gate`
    """
    with bad_input():
        spec = mt.LayerSpec(read_format(format), **layer)
        budget = as_budget(read_budget(parameters), spec.dense_parameters)
        fitted = spec.fitted(budget, rounding=rounding, gate=gate)  # type: ignore[arg-type]
    gate_parameters = fitted.gate_parameters if gate else 0
    total = fitted.weight_parameters + gate_parameters
    if as_json:
        result = {"format": format, "rank": fitted.rank, "parameters": total, "budget": budget}
        print_json({**result, "gate_parameters": gate_parameters})
        return
    print(f"rank {','.join(map(str, fitted.full_rank))}")
    share = f", of which the gate has {gate_parameters:,}" if gate else ""
    print(f"{total:,} parameters{share}; the budget is {budget:,}")


def _declared(format: Format) -> dict[str, Any]:
    """Describe a format for one level of experts; for a sum, the factors of all terms."""
    letters = dict(zip(mode_names(1), "NIO", strict=True))
    names = {
        part: part.replace(mode, letter, 1) for mode, letter in letters.items() for part in format.parts(mode)
    }
    factors = format.declaration(1)
    held = [f for f in factors if not f.optional]
    return {
        "name": format.name,
        "title": format.title,
        "splits": {letters.get(mode, mode): parts for mode, parts in format.splits.items()},
        "terms": [term.title for term, _ in format.summands(1)],
        "factors": [" ".join(names.get(x, x) for x in f.indices) + " (ones)" * f.optional for f in factors],
        "rank": list(format.bonds(1)),
        "parameters": " + ".join("·".join(names.get(x, x) for x in f.indices) for f in held),
    }


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return in_words(value) if name == "seconds" else f"{value:,}"


def _cost_figures(cost: mt.Cost) -> dict[str, Any]:
    return {name: getattr(cost, name) for name in _COST}


def _plan_figures(plan: mt.ContractionPlan | mt.SumPlan) -> dict[str, Any]:
    figures = ("flops", "write", "copied", "size", "peak", "saved", "seconds")
    names = ("equation", "kind", "shape", "flops", "write", "copied", "saved", "live")
    steps, constant_steps = (
        [{name: getattr(step, name) for name in names} for step in steps]
        for steps in (plan.steps, plan.constant_steps)
    )
    return {
        "implementation": plan.implementation,
        "minimize": plan.minimize,
        "batch": plan.batch,
        "machine": asdict(plan.machine),
        **{name: getattr(plan, name) for name in figures},
        "unit": "bytes" if plan.dtype else "elements",
        "steps": steps,
        "constant_steps": constant_steps,
        "terms": [_plan_figures(term) for term in plan.terms] if len(plan.terms) > 1 else [],
    }
