"""What there is to tell of the experts of a model, from one pass over some inputs and one for each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis import (
    Labels,
    TopInputs,
    Usage,
    UsageStatistics,
    ablation_effects,
    watch_coefficients,
)
from mumoe_tensor.analysis.coefficients import gates_of


@dataclass(frozen=True)
class ExpertLevel:
    """The experts of one level of one layer.

    Attributes
    ----------
    layer : str
        Name of the layer's module; empty for the model itself.
    level : int
    usage : UsageStatistics
    labels : Tensor of shape (N, classes) or None
        Inputs of each class that use the expert.
    top : Tensor of int of shape (N, k)
        Numbers of the inputs with the largest coefficients; −1 where there are fewer.
    coefficients : Tensor of shape (N, k)
        Theirs; of a text, that of its most active token.
    tokens : dict of (int, int) to list of float
        By expert and text: the coefficient of every token. Empty for other inputs.
    effects : Tensor of shape (N, classes) or None
        Change of the accuracy of each class without the expert.
    """

    layer: str
    level: int
    usage: UsageStatistics
    labels: Tensor | None
    top: Tensor
    coefficients: Tensor
    tokens: dict[tuple[int, int], list[float]]
    effects: Tensor | None


class _Seen:
    """What is counted of one level as batches pass."""

    def __init__(self, experts: int, classes: int | None, k: int):
        self.usage, self.top = Usage(experts), TopInputs(experts, k)
        self.labels = None if classes is None else Labels(experts, classes)

    def update(self, coefficients: Tensor, inputs: int, labels: Tensor | None) -> None:
        self.usage.update(coefficients)
        # A text is as active as its most active token.
        of_input = coefficients.unflatten(0, (inputs, -1)).amax(1)
        self.top.update(of_input)
        if self.labels is not None and labels is not None:
            self.labels.update(of_input, labels)


@torch.no_grad()
def collect(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    k: int = 8,
    batch_size: int = 256,
    effects: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ExpertLevel]:
    """Look at all experts of a model.

    Parameters
    ----------
    model : Module
        Inputs of shape (rows, ...) to logits; with `effects`, of shape (rows, classes). Runs as in
        ``eval()``. Each of its gates is called once a batch, with the rows in the first axis.
    inputs : Tensor of shape (rows, ...)
    labels : Tensor of int of shape (rows,), optional
        Classes of the inputs.
    k : int, default 8
        Inputs to show for each expert.
    batch_size : int, default 256
    effects : bool, default True
        Remove every expert once, to see which classes suffer; only with `labels`.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    list of ExpertLevel
        Layer after layer, level after level.

    Raises
    ------
    ValueError
        If the model has no gate, there is no input, or labels are not one an input.
    """
    if not len(inputs) or (labels is not None and labels.shape != inputs.shape[:1]):
        raise ValueError(
            f"there must be inputs, and a label for each if there are labels; got {len(inputs)} inputs and "
            f"labels of shape {None if labels is None else tuple(labels.shape)}."
        )
    gates = gates_of(model)
    classes = None if labels is None else int(labels.max()) + 1
    seen = {
        (name, level): _Seen(experts, classes, k)
        for name, gate in gates.items()
        for level, experts in enumerate(gate.experts)
    }
    batches = [(start, inputs[start : start + batch_size]) for start in range(0, len(inputs), batch_size)]
    tell = progress or (lambda done, total, text: None)
    total = len(batches) + len(seen)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for done, (start, batch) in enumerate(batches):
            tell(done, total, "coefficients")
            of_batch = None if labels is None else labels[start : start + batch_size]

            def update(
                name: str, found: tuple[Tensor, ...], count: int = len(batch), y: Tensor | None = of_batch
            ) -> None:
                for level, coefficients in enumerate(found):
                    seen[name, level].update(coefficients, count, y)

            with watch_coefficients(model, update):
                model(batch)
        tokens = _tokens(model, inputs, seen)
        levels = []
        for done, ((name, level), counted) in enumerate(seen.items()):
            layer = name.rpartition(".")[0]
            tell(len(batches) + done, total, f"experts of {layer or 'the model'}")
            lost = None
            if effects and labels is not None and classes is not None:
                pairs = [(batch, labels[start : start + batch_size]) for start, batch in batches]
                lost = ablation_effects(model, model.get_submodule(layer), pairs, classes, level=level)
            levels.append(
                ExpertLevel(
                    layer, level, counted.usage.statistics(),
                    None if counted.labels is None else counted.labels.counts,
                    counted.top.indices, counted.top.coefficients, tokens[name, level], lost,
                )
            )  # fmt: skip
        tell(total, total, "done")
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return levels


def _tokens(
    model: nn.Module, inputs: Tensor, seen: dict[tuple[str, int], _Seen]
) -> dict[tuple[str, int], dict[tuple[int, int], list[float]]]:
    """Coefficients of every token of the texts that are shown, from a second look at these."""
    found: dict[tuple[str, int], dict[tuple[int, int], list[float]]] = {key: {} for key in seen}
    wanted: dict[int, list[tuple[tuple[str, int], int]]] = {}
    for key, counted in seen.items():
        for expert, row in (counted.top.indices >= 0).nonzero().tolist():
            wanted.setdefault(int(counted.top.indices[expert, row]), []).append((key, expert))
    for index, users in wanted.items():
        passed: dict[str, tuple[Tensor, ...]] = {}
        with watch_coefficients(model, passed.__setitem__):
            model(inputs[index : index + 1])
        for (name, level), expert in users:
            coefficients = passed[name][level]
            if len(coefficients) == 1:  # no text: nothing to shade
                return found
            found[name, level][expert, index] = coefficients[:, expert].tolist()
    return found


def as_plain(levels: list[ExpertLevel]) -> list[dict[str, Any]]:
    """Levels as the plain values that the page reads."""
    return [
        {
            "layer": level.layer or "model",
            "level": level.level,
            "experts": [_plain_expert(level, n) for n in range(len(level.top))],
        }
        for level in levels
    ]


def _plain_expert(level: ExpertLevel, n: int) -> dict[str, Any]:
    effects = None if level.effects is None else level.effects[n].nan_to_num()
    shown = [(int(i), float(a)) for i, a in zip(level.top[n], level.coefficients[n], strict=True) if i >= 0]
    return {
        "n": n,
        "mean": float(level.usage.mean[n]),
        "load": float(level.usage.load[n]),
        "classes": None if level.labels is None else level.labels[n].tolist(),
        "effect": None if effects is None else float(effects.abs().sum()),
        "effects": None if effects is None else effects.tolist(),
        "top": [{"i": index, "a": a, "tokens": level.tokens.get((n, index))} for index, a in shown],
    }
