"""Specialisation of experts: the labels for which they are active, and the classes that depend on them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.interventions import random_gate
from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.analysis.parts import gate_of, read_experts
from mumoe_tensor.analysis.usage import CHUNK
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import evaluating, hooked
from mumoe_tensor.selections import Selection


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of the labels for which the experts of one level are active.

    Attributes
    ----------
    counts : Tensor of shape (N, C)
        For each expert, the number of inputs of every label for which it is active.
    entropy : float
        Conditional entropy of the label given an active expert, in nats: the mean over experts, weighted by
        how often each is active.
    ratio : float
        This entropy divided by the entropy of the labels of all inputs; 1 if experts are independent of the
        label.
    clarity : float
        Largest fraction of one label among the inputs of an expert, as a mean over experts with the same
        weights.
    """

    counts: Tensor
    entropy: float
    ratio: float
    clarity: float


class Labels:
    """Counts the labels of the inputs for which experts of one level are active, batch by batch.

    Parameters
    ----------
    experts, classes : int
    threshold : float, default 0
        An expert is active if its coefficient is positive and at least this threshold.
    """

    def __init__(self, experts: int, classes: int, threshold: float = 0.0):
        self.threshold = threshold
        self.counts = torch.zeros(experts, classes, dtype=torch.long)
        self.all = torch.zeros(classes, dtype=torch.long)

    def update(self, coefficients: Tensor, labels: Tensor) -> None:
        """Count additional inputs.

        Parameters
        ----------
        coefficients : Tensor of shape (rows, N)
        labels : Tensor of int of shape (rows,)
            From 0 to C − 1.

        Raises
        ------
        ValueError
            If the shapes do not match, or a label is out of range.
        TypeError
            If labels are not integers.
        """
        experts, classes = self.counts.shape
        if coefficients.shape != (*labels.shape, experts) or labels.ndim != 1:
            raise ValueError(
                f"there must be a label for every row of {experts} coefficients; got coefficients of "
                f"{tuple(coefficients.shape)}, labels of {tuple(labels.shape)}."
            )
        labels = read_labels(labels, classes)
        a, labels = coefficients.detach(), labels.to(coefficients.device)
        # Sums of floats, which are exact integers up to 2^24 rows per batch.
        counts = a.new_zeros(classes, experts, dtype=torch.float32)
        size = max(1, CHUNK // experts)
        buffer = torch.empty_like(a[:size], dtype=torch.float32)
        for part, of_part in zip(a.split(size), labels.split(size), strict=True):
            is_active = buffer[: len(part)]
            if self.threshold > 0:
                torch.ge(part, self.threshold, out=is_active)
            else:
                torch.gt(part, 0, out=is_active)
            counts.index_add_(0, of_part, is_active)
        self.counts += counts.T.to(self.counts.device, self.counts.dtype)
        self.all += torch.bincount(labels.to(self.all.device), minlength=classes)

    def statistics(self) -> LabelStatistics:
        """The statistics of all inputs so far.

        Raises
        ------
        ValueError
            If there were no inputs.
        """
        if not self.all.sum():
            raise ValueError("label statistics need at least one input, got none.")
        active = self.counts.sum(1)
        if not active.sum():
            return LabelStatistics(self.counts.clone(), float("nan"), float("nan"), float("nan"))
        weights = active / active.sum()
        shares = self.counts.double() / active.clamp_min(1)[:, None]
        entropy = float((torch.special.entr(shares).sum(1) * weights).sum())
        of_all = float(torch.special.entr(self.all / self.all.sum()).sum())
        return LabelStatistics(
            counts=self.counts.clone(),
            entropy=entropy,
            ratio=entropy / of_all if of_all else float("nan"),
            clarity=float((shares.amax(1) * weights).sum()),
        )


@torch.no_grad()
def ablation_effects(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    level: int = 0,
    experts: Selection | None = None,
    random_seed: int | None = None,
) -> Tensor:
    """Change of the accuracy of every class when a single expert is removed by `ablate`.

    Predictions are recomputed only for inputs with a nonzero coefficient of the expert. The model must
    therefore treat the inputs of a batch independently, as models do in evaluation mode.

    Parameters
    ----------
    model : Module
        A classifier that maps inputs of shape (rows, ...) to logits of shape (rows, classes), or to an object
        with an attribute `logits`. It is run in evaluation mode.
    layer : Module
        The layer of the model that contains the experts.
    batches : iterable of (inputs, labels)
        Batches of inputs and labels, iterated once.
    classes : int
    level : int, default 0
    experts : int, sequence of int, or mask of shape (N,), optional
        The experts to remove, one at a time; all experts of the level by default.
    random_seed : int, optional
        Compute the effects under `random_gate` with this seed, as a baseline.

    Returns
    -------
    Tensor of shape (experts, classes)
        Accuracy without the expert minus the accuracy of the intact model; NaN for a class without inputs.

    Raises
    ------
    ValueError
        If the layer does not have exactly one gate, there is no such level, expert or label, or the gate is
        not called exactly once with the rows of the batch.
    TypeError
        If the level, an expert or a label is not an integer.
    """
    gate = gate_of(layer)
    level, removed = read_experts(gate, level, slice(None) if experts is None else experts)
    count = gate.num_experts[level]
    total = torch.zeros(classes, dtype=torch.long)
    change = torch.zeros(len(removed), classes, dtype=torch.long)
    with evaluating(model):
        for place, (inputs, labels) in enumerate(batches):
            labels = read_labels(labels, classes)
            if not len(labels):
                continue
            total += torch.bincount(labels.cpu(), minlength=classes)
            coefficients, intact = _intact(model, layer, gate, inputs, random_seed, place)
            is_right = intact == labels
            uses = (coefficients[level] != 0).reshape(len(labels), -1, count).any(1)
            for k, expert in enumerate(removed):
                rows = uses[:, expert].nonzero()[:, 0]
                if len(rows):
                    without = [a[rows] for a in coefficients]
                    without[level][..., expert] = 0
                    with hooked(gate, lambda *_, given=tuple(without): given):
                        is_right_now = _predicted(model, inputs[rows]) == labels[rows]
                    difference = is_right_now.long() - is_right[rows].long()
                    change[k].index_add_(0, labels[rows].cpu(), difference.cpu())
    return change / total


def _intact(
    model: nn.Module, layer: nn.Module, gate: ExpertGate, inputs: Tensor, random_seed: int | None, place: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Coefficients of the gate, optionally permuted at random, and the predictions of the model with them."""
    seen: list[tuple[Tensor, ...]] = []
    with ExitStack() as stack:
        if random_seed is not None:
            stack.enter_context(random_gate(layer, random_seed + place))
        stack.enter_context(hooked(gate, lambda module, inputs, coefficients: seen.append(coefficients)))
        predicted = _predicted(model, inputs)
    if len(seen) != 1 or any(a.shape[0] != len(inputs) for a in seen[0]):
        raise ValueError(
            f"the gate must be called once, with the {len(inputs)} inputs of the batch in the first axis; it "
            f"was called {len(seen)} time(s), giving {[tuple(a.shape) for each in seen for a in each]}."
        )
    return seen[0], predicted


def _predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Any = model(inputs)
    return getattr(output, "logits", output).argmax(-1)


def polysemanticity(effects: Tensor) -> Tensor:
    r"""Polysemanticity of each expert: the distance of its effects from an effect on a single class.

    .. math:: p_n = \lVert d_n - e_{\arg\max d_n} \rVert_2,
        \qquad d_n = |\Delta_n| / \sum_c |\Delta_{nc}|

    for the changes :math:`\Delta_n` of the class accuracies without expert n (Oldfield et al., 2024). It is 0
    if only one class is affected. It decreases with the number of experts for any gate, so report it together
    with its value under `random_gate`.

    Parameters
    ----------
    effects : Tensor of shape (experts, classes)
        The result of `ablation_effects`; NaN counts as no change.

    Returns
    -------
    Tensor of shape (experts,)
        NaN for an expert without effects; ``nanmean()`` is the mean over the others.

    Examples
    --------
    >>> polysemanticity(torch.tensor([[-0.5, 0.0], [0.2, -0.2], [0.0, 0.0]]))
    tensor([0.0000, 0.7071,    nan])
    """
    size = effects.nan_to_num().abs()
    share = size / size.sum(1, keepdim=True)
    one = nn.functional.one_hot(size.argmax(1), size.shape[1]).to(share.dtype)
    return (share - one).norm(dim=1)
