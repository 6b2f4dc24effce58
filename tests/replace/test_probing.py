"""Labels of tokens by rules on the text, and sparse probes, against loops that anyone can read."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from scipy.sparse import csr_array  # noqa: E402
from sklearn.metrics import f1_score, roc_auc_score  # noqa: E402

from mumoe_tensor.replace import RULES, sparse_probe, token_labels  # noqa: E402


@pytest.mark.parametrize(
    ("rule", "tokens", "expected"),
    [
        ("digits", ["In", " 19", "31", " x2", " two"], [0, 1, 1, 1, 0]),
        ("quotes", ['"', "Yes", ',"', " she said, “", "no", "”", " don't"], [1, 0, 1, 1, 0, 1, 0]),
        ("capitals", [" NA", "TO", " met", " At", " I", " BBC"], [1, 1, 0, 0, 0, 1]),
        ("months", ["In", " Sept", "ember", " or", " May", " may", "Decembers"], [0, 1, 1, 0, 1, 0, 0]),
        (
            "urls",
            ["see", " http", "://", "www", ".a", ".org", "/x", " and", " ww", "w.b", ".c", "\n", "://"],
            [0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0],
        ),
        (re.compile("b+"), ["ab", "", "b", "a"], [1, 1, 1, 0]),
        (re.compile("x*"), ["a", "b"], [0, 0]),  # matches of nothing
        ("digits", [], []),
    ],
)
def test_rules(rule: Any, tokens: list[str], expected: list[int]) -> None:
    labels = token_labels(tokens, rule)
    assert labels.dtype == torch.bool and labels.tolist() == [bool(each) for each in expected]


@given(st.lists(st.text("ab1 ", min_size=1), max_size=8), st.sampled_from(["[0-9]+", "a b", "b+1?", "a$"]))
def test_a_token_is_labelled_if_a_match_has_one_of_its_characters(tokens: list[str], pattern: str) -> None:
    text = "".join(tokens)
    matched = [False] * len(text)
    for match in re.finditer(pattern, text):
        matched[match.start() : match.end()] = [True] * len(match[0])
    expected, start = [], 0
    for token in tokens:
        expected.append(any(matched[start : start + len(token)]))
        start += len(token)
    assert token_labels(tokens, re.compile(pattern)).tolist() == expected


def test_rules_are_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"one of digits, .*urls, or a compiled pattern; got 'digit'"):
        token_labels(["1"], "digit")
    assert set(RULES) == {"digits", "quotes", "capitals", "months", "urls"}


def drawn(rows: int = 300, n: int = 12) -> tuple[Any, Any]:
    """Sparse features, two of which go with the label."""
    generator = np.random.default_rng(0)
    labels = generator.random(rows) < 0.2
    features = generator.random((rows, n)).astype(np.float32) * (generator.random((rows, n)) < 0.3)
    features[:, 5] += 0.8 * (labels & (generator.random(rows) < 0.9))
    features[:, 2] += 0.5 * labels * (generator.random(rows) < 0.5)
    return features.astype(np.float32), labels


def best_f1(x: Any, labels: Any) -> float:
    """The threshold of one feature with the largest F1."""
    return max(x, key=lambda threshold: f1_score(labels, x >= threshold))


def test_a_probe_of_one_feature_is_its_best_threshold() -> None:
    features, labels = drawn()
    training, test = np.arange(300) < 200, np.arange(300) >= 200
    probe = sparse_probe(features, labels, training=training, test=test)
    seen, truth = features[training], labels[training]
    gaps = [abs(seen[truth, j].mean() - seen[~truth, j].mean()) / seen[:, j].std() for j in range(12)]
    assert probe.indices == (int(np.argmax(gaps)),) == (5,)
    threshold = best_f1(seen[:, 5], truth)
    assert probe.f1 == pytest.approx(f1_score(labels[test], features[test, 5] >= threshold))
    assert probe.auc == pytest.approx(roc_auc_score(labels[test], features[test, 5]))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_dense_sparse_and_tensors_have_one_probe(k: int) -> None:
    features, labels = drawn()
    parts = {"training": range(0, 300, 2), "test": slice(1, 300, 2)}
    probe = sparse_probe(features, labels, k=k, **parts)
    assert len(probe.indices) == len(set(probe.indices)) == k and probe.indices[0] == 5
    for others in (csr_array(features), torch.from_numpy(features), torch.from_numpy(features).double()):
        other = sparse_probe(others, torch.from_numpy(labels), k=k, **parts)
        assert other.indices == probe.indices
        assert (other.f1, other.auc) == pytest.approx((probe.f1, probe.auc))


def test_the_scale_of_a_feature_has_no_part_in_the_choice() -> None:
    features, labels = drawn()
    parts = {"training": range(200), "test": range(200, 300)}
    probe = sparse_probe(features, labels, k=2, **parts)
    features[:, 3] *= 1000
    features[:, 9] = 7
    assert sparse_probe(features, labels, k=2, **parts) == probe


def test_features_that_say_nothing_and_those_that_say_all() -> None:
    features, labels = drawn(2000)
    parts = {"training": range(1000), "test": range(1000, 2000)}
    nothing = sparse_probe(np.delete(features, [2, 5], 1), labels, **parts)
    assert abs(nothing.auc - 0.5) < 0.05
    # A feature that is lower where the label is says as much as one that is higher.
    features[:, 7] = 2 - 2 * labels
    assert sparse_probe(features, labels, **parts) == ((7,), 1, 1)


def test_the_rows_that_are_tested_have_no_part_in_the_choice() -> None:
    features, labels = drawn()
    parts = {"training": range(200), "test": range(200, 300)}
    probe = sparse_probe(features, labels, **parts)
    features[200:, 0] = 100 * labels[200:]
    assert sparse_probe(features, labels, **parts) == probe
    # Nor in the scale of a feature, and in the threshold.
    features[200:, 5] *= 1000
    threshold = best_f1(features[:200, 5], labels[:200])
    scaled = sparse_probe(features, labels, **parts)
    assert scaled.indices == probe.indices == (5,)
    assert scaled.f1 == pytest.approx(f1_score(labels[200:], features[200:, 5] >= threshold))
    assert scaled.f1 < 0.8 * probe.f1


def test_what_a_probe_refuses() -> None:
    features, labels = drawn()
    parts = {"training": range(200), "test": range(200, 300)}
    with pytest.raises(TypeError, match="booleans"):
        sparse_probe(features, labels.astype(int), **parts)
    with pytest.raises(ValueError, match=r"labels of \(299,\)"):
        sparse_probe(features, labels[:-1], **parts)
    with pytest.raises(ValueError, match="k=13"):
        sparse_probe(features, labels, k=13, **parts)
    with pytest.raises(ValueError, match=r"no rows in common, got \[199\]"):
        sparse_probe(features, labels, training=range(200), test=range(199, 300))
    for training, test in ((range(0), range(10)), (~labels, labels), (labels, ~labels)):
        with pytest.raises(ValueError, match="rows must be of both classes"):
            sparse_probe(features, labels, training=training, test=test)
    features[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"finite, got \[4\]"):
        sparse_probe(features, labels, **parts)
