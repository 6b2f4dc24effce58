"""What a language model loses without one of its experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.interventions import ablate
from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.analysis.parts import gate_of, read_experts
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.selections import Selection


@torch.no_grad()
def loss_effects(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    level: int = 0,
    experts: Selection | None = None,
) -> Tensor:
    """Change of the cross-entropy of every token when one expert is removed, as by `ablate`.

    Parameters
    ----------
    model : Module
        Token numbers of shape (rows, tokens) to logits of shape (rows, tokens, vocabulary), as they are or
        as attribute `logits`. Runs as in ``eval()``.
    layer : Module
        The layer of the model that the expert belongs to.
    batches : iterable of (tokens, next tokens)
        Of shape (rows, tokens) both. Kept in memory: they are read once for the intact model and once for
        every expert.
    level : int, default 0
    experts : int, sequence of int, or mask of shape (N,), optional
        Those to remove, one after the other; all of the level by default.

    Returns
    -------
    Tensor of shape (experts,)
        Mean loss of a token without the expert less that of the intact model, in nats: above zero for an
        expert that helps.

    Raises
    ------
    ValueError
        If the layer has not one gate, there is no such level or expert, there is no token, or the logits
        have another shape.
    TypeError
        If the level or an expert is no integer.
    """
    gate = gate_of(layer)
    level, removed = read_experts(gate, level, slice(None) if experts is None else experts)
    batches = [(tokens, read_labels(following, what="next tokens")) for tokens, following in batches]
    if not sum(following.numel() for _, following in batches):
        raise ValueError("there must be tokens whose loss can change, got none.")
    with evaluating(model):
        intact = _loss(model, batches)
        changes = []
        for expert in removed:
            with ablate(gate, [expert], level):
                changes.append(_loss(model, batches) - intact)
    return torch.tensor(changes)


def _loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over tokens."""
    total, count = 0.0, 0
    for tokens, following in batches:
        logits = logits_of(model, tokens).flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits.float(), following.flatten(), reduction="sum"))
        count += following.numel()
    return total / count


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits that a language model returns, alone or as an attribute, of every token."""
    output: Any = model(tokens)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            "the model must return logits for every token, of shape "
            f"{(*tokens.shape, 'vocabulary')}; got {got}."
        )
    return logits
