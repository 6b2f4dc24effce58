"""Effects of removing experts on the loss of a language model."""

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
    """Change of the mean cross-entropy of tokens when a single expert is removed by `ablate`.

    Parameters
    ----------
    model : Module
        A language model that maps tokens of shape (rows, tokens) to logits of shape (rows, tokens,
        vocabulary), or to an object with an attribute `logits`. It is run in evaluation mode.
    layer : Module
        The layer of the model that contains the experts.
    batches : iterable of (tokens, next tokens)
        Batches of tokens and targets, both of shape (rows, tokens). All are kept in memory, since the intact
        model and every ablated model run on them.
    level : int, default 0
    experts : int, sequence of int, or mask of shape (N,), optional
        The experts to remove, one at a time; all experts of the level by default.

    Returns
    -------
    Tensor of shape (experts,)
        Mean loss per token without the expert minus the loss of the intact model, in nats: positive if the
        expert reduces the loss.

    Raises
    ------
    ValueError
        If the layer does not have exactly one gate, there is no such level or expert, there are no tokens, or
        the logits have the wrong shape.
    TypeError
        If the level or an expert is not an integer.
    """
    gate = gate_of(layer)
    level, removed = read_experts(gate, level, slice(None) if experts is None else experts)
    batches = [(tokens, read_labels(following, what="next tokens")) for tokens, following in batches]
    if not sum(following.numel() for _, following in batches):
        raise ValueError("there must be at least one token, got none.")
    with evaluating(model):
        intact = _loss(model, batches)
        changes = []
        for expert in removed:
            with ablate(gate, [expert], level):
                changes.append(_loss(model, batches) - intact)
    return torch.tensor(changes)


def _loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over all tokens."""
    total, count = 0.0, 0
    for tokens, following in batches:
        logits = logits_of(model, tokens).flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits.float(), following.flatten(), reduction="sum"))
        count += following.numel()
    return total / count


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits of every token, which a language model returns directly or as an attribute."""
    output: Any = model(tokens)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            "the model must return logits for every token, of shape "
            f"{(*tokens.shape, 'vocabulary')}; got {got}."
        )
    return logits
