"""Fairness of a classifier over subpopulations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mumoe_tensor.analysis.labels import as_integers


@dataclass(frozen=True)
class Fairness:
    """Fairness metrics of a binary classifier over subpopulations: inputs with a given label and group.

    Attributes
    ----------
    accuracy : float
        Accuracy over all inputs.
    subpopulations : dict of (int, int) to float
        Accuracy for each pair of a label and a group that occurs.
    target : float
        Accuracy of the target subpopulation.
    worst : float
        Lowest accuracy of a subpopulation; higher is fairer.
    deviation : float
        Unweighted standard deviation of these accuracies; lower is fairer.
    equal_opportunity : float
        Largest difference between groups in the true positive rate (recall of label 1); lower is fairer.
    """

    accuracy: float
    subpopulations: dict[tuple[int, int], float]
    target: float
    worst: float
    deviation: float
    equal_opportunity: float


def fairness(predictions: Tensor, labels: Tensor, groups: Tensor, target: tuple[int, int]) -> Fairness:
    """Compare the accuracies of a binary classifier over labels and groups.

    `fairlearn <https://fairlearn.org>`_ computes the metrics and must be installed:
    ``pip install "mumoe_tensor[experiments]"``.

    Parameters
    ----------
    predictions, labels : Tensor of int of shape (rows,)
        Predicted and true classes, 0 or 1.
    groups : Tensor of int of shape (rows,)
        A sensitive attribute of every input.
    target : tuple of int
        Label and group of the target subpopulation.

    Returns
    -------
    Fairness

    Raises
    ------
    ValueError
        If shapes differ, predictions or labels are not 0 or 1, a group has no input with label 1, or the
        target has no inputs.
    TypeError
        If predictions, labels or groups are not integers.
    ImportError
        If fairlearn is not installed.

    Examples
    --------
    >>> import torch
    >>> labels, groups = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 0, 1, 1])
    >>> result = fairness(torch.tensor([0, 0, 1, 1, 1, 0]), labels, groups, target=(1, 1))
    >>> result.target, result.worst, result.equal_opportunity
    (0.5, 0.5, 0.5)
    """
    MetricFrame, equal_opportunity_difference = _fairlearn()
    named = {"predictions": predictions, "labels": labels, "groups": groups}
    predictions, labels, groups = (as_integers(x, name) for name, x in named.items())
    _check(predictions, labels, groups, target)
    y, predicted, group = (x.detach().cpu().numpy() for x in (labels, predictions, groups))
    frame = MetricFrame(
        metrics=lambda true, predicted: (true == predicted).mean(),
        y_true=y,
        y_pred=predicted,
        sensitive_features={"label": y, "group": group},
    )
    accuracies = frame.by_group.dropna()
    subpopulations = {(int(a), int(b)): float(value) for (a, b), value in accuracies.items()}
    return Fairness(
        accuracy=float(frame.overall),
        subpopulations=subpopulations,
        target=subpopulations[int(target[0]), int(target[1])],
        worst=float(frame.group_min()),
        deviation=float(accuracies.std(ddof=0)),
        equal_opportunity=float(
            equal_opportunity_difference(y, predicted, sensitive_features={"group": group})
        ),
    )


def _fairlearn() -> tuple[Any, Any]:
    try:
        from fairlearn.metrics import MetricFrame, equal_opportunity_difference
    except ImportError as error:
        raise ImportError(
            'fairness metrics need fairlearn 0.12 or later: pip install "mumoe_tensor[experiments]".'
        ) from error
    return MetricFrame, equal_opportunity_difference


def _check(predictions: Tensor, labels: Tensor, groups: Tensor, target: tuple[int, int]) -> None:
    shapes = [tuple(x.shape) for x in (predictions, labels, groups)]
    if labels.ndim != 1 or len(set(shapes)) > 1 or not len(labels):
        raise ValueError(f"there must be a prediction, a label and a group for every input, got {shapes}.")
    for name, x in (("predictions", predictions), ("labels", labels)):
        if bool(((x != 0) & (x != 1)).any()):
            raise ValueError(f"{name} must be 0 or 1, got {sorted(set(x.tolist()))}.")
    if without := sorted(set(groups.tolist()) - set(groups[labels == 1].tolist())):
        raise ValueError(f"every group must have inputs with label 1; the groups {without} have none.")
    if not bool(((labels == target[0]) & (groups == target[1])).any()):
        raise ValueError(f"the target must have inputs, got none with label and group {target}.")
