"""Sparse probes: how well a few features predict token labels that rules derive from the text."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.checks import as_positive
from mumoe_tensor.extras import missing
from mumoe_tensor.selections import Selection, read_selection

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
#: Patterns of the rules of `token_labels`. The months include those that are also common words.
RULES = MappingProxyType(
    {
        "digits": re.compile(r"[0-9]+"),
        "quotes": re.compile('["“”„«»]'),
        "capitals": re.compile(r"\b[A-Z]{2,}\b"),
        "months": re.compile(rf"\b(?:{'|'.join(MONTHS)})\b"),
        "urls": re.compile(r"(?:https?://|www\.)[^\s<>\"]+"),
    }
)


def token_labels(tokens: Sequence[str], rule: str | re.Pattern[str]) -> Tensor:
    """Label the tokens that overlap a match in the text.

    Parameters
    ----------
    tokens : sequence of str
        The text of each token; concatenated, they are the whole text.
    rule : str or pattern
        One of the `RULES`: ``"digits"``, ``"quotes"`` (double quotation marks), ``"capitals"`` (all-caps
        words of at least two letters), ``"months"`` (English names, including every capitalised "May" and
        "March") and ``"urls"``; or a compiled regular expression.

    Returns
    -------
    Tensor of bool of shape (tokens,)

    Raises
    ------
    ValueError
        If there is no such rule.

    Examples
    --------
    >>> token_labels(["In", " Sept", "ember", " ", "19", "31", "."], "months").tolist()
    [False, True, True, False, False, False, False]
    """
    if not isinstance(rule, re.Pattern) and rule not in RULES:
        raise ValueError(f"a rule must be one of {', '.join(RULES)}, or a compiled pattern; got {rule!r}.")
    pattern = rule if isinstance(rule, re.Pattern) else RULES[rule]
    ends = list(accumulate(map(len, tokens)))
    labels = torch.zeros(len(ends), dtype=torch.bool)
    for match in pattern.finditer("".join(tokens)):
        if match.end() > match.start():
            labels[bisect_right(ends, match.start()) : bisect_left(ends, match.end()) + 1] = True
    return labels


class Probe(NamedTuple):
    """How well a few features predict the labels of test rows.

    Attributes
    ----------
    indices : tuple of int
        Indices of the features, in descending order of the difference of means.
    f1 : float
        F1 at the threshold that maximises F1 on the training rows.
    auc : float
        Area under the receiver operating characteristic.
    """

    indices: tuple[int, ...]
    f1: float
    auc: float


def sparse_probe(features: Any, labels: Any, *, k: int = 1, training: Selection, test: Selection) -> Probe:
    """Predict labels by logistic regression from the k features whose class means differ most.

    Features are selected, scaled and weighted on the training rows only. They can be the hidden units of a
    block (the inputs of its last layer), the latents of a transcoder or the coefficients of experts.
    Differences are in standard deviations of the feature, because some neurons of a language model have
    outputs a thousand times larger than others.

    Parameters
    ----------
    features : Tensor, array or sparse SciPy array of shape (rows, n)
    labels : Tensor or array of bool of shape (rows,)
    k : int, default 1
        Number of features to select, at most n.
    training, test : sequence of int, slice, or mask of shape (rows,)
        Rows to train and test on, which must be disjoint.

    Raises
    ------
    ValueError
        If shapes do not match, the parts overlap, a feature is not finite in the training rows, or a part
        does not have rows of both classes.
    TypeError
        If labels are not booleans.

    References
    ----------
    Gurnee et al., "Finding Neurons in a Haystack: Case Studies with Sparse Probing", TMLR 2023.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.arange(100) % 5 == 0
    >>> features = np.random.default_rng(0).normal(size=(100, 8))
    >>> features[:, 3] += 9 * labels
    >>> sparse_probe(features, labels, training=range(60), test=range(60, 100))
    Probe(indices=(3,), f1=1.0, auc=1.0)
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ModuleNotFoundError(missing("sklearn"), name="sklearn") from error

    matrix, is_labelled = _array(features), _array(labels)
    if is_labelled.dtype != bool:
        raise TypeError(f"labels must be booleans, got {is_labelled.dtype}.")
    if matrix.ndim != 2 or is_labelled.shape != matrix.shape[:1] or as_positive(k, "k") > matrix.shape[1]:
        raise ValueError(
            "features must have shape (rows, n), with a label for each row and n at least k; got features "
            f"of {matrix.shape}, labels of {is_labelled.shape}, k={k}."
        )
    rows = {
        what: np.array(read_selection(part, len(is_labelled), f"{what} rows"), dtype=int)
        for what, part in (("training", training), ("test", test))
    }
    if common := np.intersect1d(rows["training"], rows["test"]).tolist():
        raise ValueError(f"training and test must have no rows in common, got {common[:5]} in both.")
    for what, numbers in rows.items():
        if len(numbers) == 0 or is_labelled[numbers].all() or not is_labelled[numbers].any():
            raise ValueError(
                f"{what} rows must be of both classes, got {int(is_labelled[numbers].sum())} positives among "
                f"{len(numbers)}."
            )
    # The difference of means as one product, which also works for sparse features.
    weights = np.zeros(len(is_labelled), np.float32)
    kinds = is_labelled[rows["training"]]
    weights[rows["training"]] = np.where(kinds, 1 / kinds.sum(), -1 / (~kinds).sum())
    scale = StandardScaler(with_mean=False).fit(matrix[rows["training"]]).scale_  # 1 for constant features
    difference = np.abs(matrix.T @ weights) / scale
    if wrong := np.flatnonzero(~np.isfinite(difference)).tolist():
        raise ValueError(f"features must be finite, got {wrong[:5]} that are not.")
    indices = np.argsort(-difference, kind="stable")[:k]
    chosen = matrix[:, indices]
    chosen = chosen.toarray() if hasattr(chosen, "toarray") else chosen
    probe = make_pipeline(StandardScaler(), LogisticRegression()).fit(chosen[rows["training"]], kinds)
    training_scores, scores = (probe.decision_function(chosen[numbers]) for numbers in rows.values())
    precision, recall, thresholds = precision_recall_curve(kinds, training_scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    expected = is_labelled[rows["test"]]
    return Probe(
        tuple(indices.tolist()),
        float(f1_score(expected, scores >= thresholds[f1[:-1].argmax()], zero_division=0)),
        float(roc_auc_score(expected, scores)),
    )


def _array(values: Any) -> Any:
    """A NumPy array, or a sparse array that supports row and column selection."""
    if isinstance(values, Tensor):
        return (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
    return values.tocsr() if hasattr(values, "tocsr") else np.asarray(values)
