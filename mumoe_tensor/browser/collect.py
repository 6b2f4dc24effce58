"""Collect statistics of a model's experts: one pass over inputs, and one more for each removed expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis import (
    TopInputs,
    Usage,
    UsageStatistics,
    ablation_effects,
    loss_effects,
    watch_coefficients,
)
from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import evaluating, gates_of
from mumoe_tensor.progress import Progress

if TYPE_CHECKING:
    from mumoe_tensor.replace.coefficients import CoefficientRows, Coefficients

#: Maximum number of coefficient sums per level; with too many labels, the rarest are counted together.
MOST_SUMS = 2**26


@dataclass(frozen=True)
class ExpertLevel:
    """Statistics of the experts in one level of one layer.

    An input is an item of the page: an image, a text, or a passage of a text. It may have several rows, the
    inputs of the layer: tokens, patches of an image, or channels.

    Attributes
    ----------
    layer : str
        Name of the layer's module; empty for the model itself.
    level : int
    usage : UsageStatistics
        Usage over all rows.
    labels : Tensor of int of shape (C,) or None
        Classes of the inputs or, for a language model, the tokens that occur. If there are more than 2²⁶ / N,
        the rarest are merged into the last label, −1.
    frequency : Tensor of shape (C,) or None
        Fraction of the inputs, or tokens, with each label.
    sums : Tensor of shape (N, C) or None
        Sum of each expert's coefficients over the rows with each label.
    top : Tensor of int of shape (N, k)
        Indices of the inputs with the largest coefficients, padded with −1.
    coefficients : Tensor of shape (N, k)
        Pooled coefficients of these inputs.
    rows : Tensor of shape (N, k, rows) or None
        The coefficient of every row of these inputs; None if inputs have one row each.
    effects : Tensor of shape (N, C) or (N,), or None
        Change in the accuracy of each class when the expert is removed or, for a language model, in the loss,
        in nats per token; NaN for experts that were not removed.
    is_language : bool
        Whether labels are tokens, and effects are changes in the loss.
    """

    layer: str
    level: int
    usage: UsageStatistics
    labels: Tensor | None
    frequency: Tensor | None
    sums: Tensor | None
    top: Tensor
    coefficients: Tensor
    rows: Tensor | None
    effects: Tensor | None
    is_language: bool = False


class _Seen:
    """Running statistics of one level."""

    def __init__(self, experts: int, labels: int, k: int, threshold: float):
        self.usage, self.top = Usage(experts, threshold), TopInputs(experts, k)
        self.sums = torch.zeros(labels, experts)

    def update(self, rows: Tensor, by_input: Tensor, pool: str, labels: Tensor | None) -> None:
        """Add the rows of a batch, also given in shape (inputs, rows of an input, experts)."""
        self.usage.update(rows)
        if by_input.shape[1] == 1:
            pooled, parts = by_input[:, 0], None
        else:
            pooled, parts = (by_input.amax(1) if pool == "max" else by_input.mean(1)), by_input
        self.top.update(pooled, parts=parts)
        if labels is not None:
            of_labels = rows if len(labels) == len(rows) else pooled
            self.sums.index_add_(0, labels, of_labels.float().cpu())


@torch.no_grad()
def collect(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    k: int = 8,
    batch_size: int = 256,
    pool: Literal["max", "mean"] = "max",
    passage: int | None = None,
    removed: int | None = None,
    effect_inputs: int | None = None,
    layers: Sequence[str] | None = None,
    threshold: float = 0.5,
    coefficients: Coefficients | None = None,
    progress: Progress | None = None,
) -> list[ExpertLevel]:
    """Collect statistics of all experts of a model, or of some of its modules.

    Parameters
    ----------
    model : Module
        Maps inputs of shape (rows, ...) to logits of shape (rows, classes) or, for a language model,
        (rows, tokens, vocabulary), or to an object with an attribute `logits`. Runs in evaluation mode. Each
        gate must be called once per batch, with the inputs along the first axis.
    inputs : Tensor of shape (rows, ...)
    labels : Tensor of int of shape (rows,) or (rows, tokens), optional
        Classes of the inputs or, if inputs are token ids, the next tokens.
    k : int, default 8
        Inputs to show for each expert.
    batch_size : int, default 256
    pool : {"max", "mean"}, default "max"
        How to pool the coefficients of an input with several rows (tokens of a text, patches of an image).
    passage : int, optional
        Divide inputs into passages of this many rows, which count as separate inputs: passage j of input i
        has the index ``i * passages + j``.
    removed : int, optional
        With `labels`: number of experts per level, the most used first, whose removal is measured by its
        effect on the accuracy of classes, or on the loss; all by default.
    effect_inputs : int, optional
        Measure effects only on this many first inputs; by default on all.
    layers : sequence of str, optional
        Names of modules of the model; only experts in these are included.
    threshold : float, default 0.5
        Smallest coefficient with which a row counts for the load of an expert.
    coefficients : Coefficients, optional
        Coefficients for these inputs, written by `.collect_coefficients`; the model is then run only to
        measure effects.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    list of ExpertLevel
        Ordered by layer, then by level.

    Raises
    ------
    ValueError
        If the model, or one of the layers, has no experts, there are no inputs, labels or coefficients do not
        match the inputs, or the rows of a gate do not divide into inputs and passages.
    """
    is_language = labels is not None and labels.ndim == 2 and labels.shape == inputs.shape
    if not len(inputs) or not (labels is None or is_language or labels.shape == inputs.shape[:1]):
        raise ValueError(
            "inputs must not be empty, and each input or token must have one label; got inputs "
            f"of shape {tuple(inputs.shape)}, labels of {None if labels is None else tuple(labels.shape)}."
        )
    labels = None if labels is None else read_labels(labels)
    gates = _gates_in(model, [""] if layers is None else layers)
    most = MOST_SUMS // max(experts for gate in gates.values() for experts in gate.num_experts)
    distinct, places, frequency = _labelled(inputs if is_language else labels, is_language, most)
    seen = {
        (name, level): _Seen(experts, 0 if distinct is None else len(distinct), k, threshold)
        for name, gate in gates.items()
        for level, experts in enumerate(gate.num_experts)
    }
    starts = range(0, len(inputs), batch_size)
    tell = progress or (lambda done, total, text: None)
    total = len(starts) + len(seen)

    def update(name: str, coefficients: tuple[Tensor, ...], start: int) -> None:
        if name not in gates:
            return
        count = min(batch_size, len(inputs) - start)
        of_batch = None if places is None else places[start : start + count]
        for level, rows in enumerate(coefficients):
            by_input = _by_input(rows, count, passage)
            if of_batch is not None and not is_language:
                of_batch = of_batch.reshape(count, -1)[:, :1].expand(-1, len(by_input) // count)
            seen[name, level].update(rows, by_input, pool, None if of_batch is None else of_batch.flatten())

    stored = {} if coefficients is None else _stored(coefficients, gates, len(inputs))
    with evaluating(model):
        for done, start in enumerate(starts):
            tell(done, total, "coefficients")
            batch = inputs[start : start + batch_size]
            for name, of_gate in stored.items():
                update(name, tuple(_rows_of(rows, start, len(batch)) for rows in of_gate), start)
            if not stored:
                with watch_coefficients(model, partial(update, start=start)):
                    model(batch)
        levels = []
        for done, ((name, level), counted) in enumerate(seen.items()):
            layer = name.rpartition(".")[0]
            tell(len(starts) + done, total, f"experts of {layer or 'the model'}")
            usage, lost = counted.usage.statistics(), None
            if removed != 0 and labels is not None:
                module = model.get_submodule(layer)
                chosen = usage.mean.argsort(descending=True, stable=True)[:removed].sort().values
                part = slice(0, effect_inputs)
                batches = list(
                    zip(inputs[part].split(batch_size), labels[part].split(batch_size), strict=True)
                )
                which: Any = {"level": level, "experts": chosen.tolist()}
                if is_language:
                    measured = loss_effects(model, module, batches, **which)
                else:
                    measured = ablation_effects(model, module, batches, int(labels.max()) + 1, **which)
                lost = torch.full((len(usage.mean), *measured.shape[1:]), torch.nan)
                lost[chosen] = measured
            levels.append(
                ExpertLevel(
                    layer, level, usage, distinct, frequency, None if distinct is None else counted.sums.T,
                    counted.top.indices, counted.top.coefficients,
                    counted.top.parts if counted.top.parts.shape[2] else None, lost, is_language,
                )
            )  # fmt: skip
        tell(total, total, "done")
    return levels


def _gates_in(model: nn.Module, layers: Sequence[str]) -> dict[str, ExpertGate]:
    """The gates with experts in given modules."""
    gates = {name: gate for name, gate in gates_of(model).items() if gate.num_experts}
    chosen: dict[str, ExpertGate] = {}
    for layer in layers:
        inside = {
            name: gate for name, gate in gates.items() if not layer or f"{name}.".startswith(f"{layer}.")
        }
        if not inside:
            raise ValueError(f"a layer must have experts, as {[*gates][:3]} do; {layer!r} has none.")
        chosen |= inside
    return chosen


def _stored(
    coefficients: Coefficients, gates: dict[str, ExpertGate], count: int
) -> dict[str, list[CoefficientRows]]:
    """The stored coefficients of gates, per level."""
    by_layer = {}
    for name, gate in gates.items():
        if coefficients.gates.get(name) != gate.num_experts:
            raise ValueError(
                f"coefficients must include the gate {name!r} with {gate.num_experts} experts; they "
                f"have {coefficients.gates}."
            )
        by_layer[name] = [coefficients[name, level] for level in range(len(gate.num_experts))]
        if any(len(rows) % count or int(rows.documents[-1]) + 1 != count for rows in by_layer[name]):
            raise ValueError(f"coefficients must be for the {count} inputs, with equally many rows for each.")
    return by_layer


def _rows_of(rows: CoefficientRows, start: int, count: int) -> Tensor:
    """Coefficients of a range of inputs."""
    each = len(rows) // (int(rows.documents[-1]) + 1)
    return torch.from_numpy(rows.rows(start * each, (start + count) * each).toarray())


def _labelled(
    labels: Tensor | None, is_language: bool, most: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Distinct labels, the index of each input's (token's) label among them, and their frequencies."""
    if labels is None:
        return None, None, None
    labels = labels.cpu()  # the statistics of all batches are on the CPU too
    if not is_language:
        counts = labels.bincount()
        return torch.arange(len(counts)), labels, counts / counts.sum()
    distinct, places, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(distinct) > most:
        frequent = counts.argsort(descending=True, stable=True)[: max(1, most - 1)].sort().values
        place_of = torch.full((len(distinct),), len(frequent))
        place_of[frequent] = torch.arange(len(frequent))
        places = place_of[places]
        distinct = torch.cat([distinct[frequent], distinct.new_tensor([-1])])
        counts = places.flatten().bincount()
    return distinct, places, counts / counts.sum()


def _by_input(rows: Tensor, count: int, passage: int | None) -> Tensor:
    """Coefficients of a batch in shape (inputs, rows of an input, experts)."""
    each, rest = divmod(len(rows), count)
    size = passage or each
    if rest or each % size:
        raise ValueError(
            f"a gate must have rows for {count} inputs, in whole passages of {passage} rows; it "
            f"has {len(rows)} rows."
        )
    return rows.reshape(-1, size, rows.shape[-1])
