"""Removing experts from layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.formats.registry import label
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.selections import Selection, read_number, read_selection


def keep_experts(layer: Any, level: int, indices: Selection) -> Any:
    """A new layer with some of the experts of a level; see `MuMoE.keep_experts`."""
    counts = layer.mixtures[0].weight.experts  # raises for a layer divided over processes
    level = read_number(level, len(counts), "level")
    indices = read_selection(indices, counts[level], f"indices of level {level}", empty=False)
    _check_parameters(layer)
    for experts in layer.mixtures:
        _check_terms(experts, level)
    fewer = (*counts[:level], len(indices), *counts[level + 1 :])
    changed = {"gate": copy.deepcopy(layer.gate.gate), "experts": fewer}
    smaller = type(layer).from_config({**layer._arguments, **changed}, device="meta")
    for name, child in layer.named_children():
        if child is not layer.gate and not isinstance(child, Experts):
            setattr(smaller, name, copy.deepcopy(child))
    if layer.gate.norm is not None and smaller.gate.norm is not None:
        for name in ("eps", "momentum", "copies"):
            setattr(smaller.gate.norm, name, getattr(layer.gate.norm, name))
    smaller.fit_errors = layer.fit_errors
    smaller.load_state_dict(_select(layer, level, indices), assign=True)
    for name, module in smaller.named_modules():
        module.training = layer.get_submodule(name).training
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return smaller


def _check_terms(experts: Experts, level: int) -> None:
    """Raise an error if a term of the format slices or splits a level."""
    mode = f"n{level + 1}"
    for format, _ in experts.spec.weight_format.summands(len(experts.num_experts)):
        if format.window(level) is not None or format.parts(mode) != (mode,):
            raise ValueError(
                "no term may slice or split a level whose experts are removed; term "
                f"{label(format)!r} does so with level {level}."
            )


def _check_parameters(layer: Any) -> None:
    """Raise an error if weights are computed from other parameters."""
    weights = [factor for experts in layer.mixtures for factor in experts.factors]
    if layer.gate.num_experts:
        buffers = dict(layer.gate.named_buffers(recurse=False))
        names = ("weight", *layer.gate.per_expert)
        weights += [getattr(layer.gate, name) for name in names if name not in buffers]
    if not all(isinstance(weight, nn.Parameter) for weight in weights):
        raise ValueError(
            "weights and factors must be parameters for experts to be removed; they are computed by pruning "
            "or a parametrization: make it permanent first (prune.remove, remove_parametrizations)."
        )


def _select(layer: Any, level: int, indices: list[int]) -> dict[str, Tensor]:
    """A copy of the state, with only the selected experts."""
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def select(name: str, axis: int, entries: list[int]) -> None:
        state[name] = state[name].index_select(axis, torch.tensor(entries, device=state[name].device))

    # The rows of the gate are the experts of all levels, concatenated.
    counts = layer.gate.num_experts
    start = sum(counts[:level])
    rows = [*range(start), *(start + k for k in indices), *range(start + counts[level], sum(counts))]
    names = ("weight", "norm.running_mean", "norm.running_var", *layer.gate.per_expert)
    for name in (f"gate.{name}" for name in names):
        if name in state and len(state[name]):
            select(name, 0, rows)
    mode = f"n{level + 1}"
    for name, experts in layer.named_children():
        if isinstance(experts, Experts):
            for k, axes in enumerate(experts.axes):
                if mode in axes:
                    select(f"{name}.factor_{k}", axes.index(mode), indices)
            for edit in experts.edits or ():
                select(f"{name}.edits.{edit}.mean_{level}", 0, indices)
    return state
