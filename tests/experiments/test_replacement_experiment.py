"""Texts and claims of the experiment with replaced layers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from ledgers import ledger_of

from paper_figures.experiments import replacement

TEXT = """
   Introduction

Glossary

   bar

   :bar: /bar/, n.

   1. [very common] The second
   {metasyntactic variable}.

   2. Often appended
   to {foo}.

   :baz: n.

   [common] The third.
"""


def test_entries_are_paragraphs_without_braces() -> None:
    assert replacement.entries(TEXT) == [
        ":bar: /bar/, n.\n\n1. [very common] The second metasyntactic variable.\n\n2. Often appended to foo.",
        ":baz: n.\n\n[common] The third.",
    ]


def test_neighbours_are_joined_to_documents_of_a_length() -> None:
    parts = ["a" * 4, "b" * 4, "c" * 10, "d" * 3]
    assert replacement.documents(parts, 10) == ["aaaa\n\nbbbb", "c" * 10]


def test_every_document_is_in_one_part() -> None:
    texts = [str(i) for i in range(200)]
    parts = replacement.split(texts)
    assert list(parts) == ["training", "validation", "test"]
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    assert [len(part) for part in parts.values()] == [164, 18, 18]
    assert parts == replacement.split(texts)


def test_arms_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(arm: str, k: int, seed: int, rise: float, module: str = "mlp") -> dict[str, Any]:
        return {"module": module, "arm": arm, "k": k, "seed": seed, "rise": rise}

    rows = [row("MxD", k, seed, 0.1 * k + 0.01 * seed) for k in (8, 32) for seed in (0, 1)]
    rows += [row("transcoder", 8, seed, 0.9 + 0.01 * seed) for seed in (0, 1)]
    rows += [row("no experts", 0, 1, 3.0), row("MxD", 8, 0, 7.0, "another")]
    monkeypatch.setattr(replacement, "table", lambda name: ledger_of(rows))
    actual = {(each["arm"], each["K"]): each for each in replacement.claims()}
    assert actual.keys() == {("transcoder", 8), ("no experts", 8), ("no experts", 32)}
    assert actual["transcoder", 8]["mean"] == pytest.approx(0.1)
    assert (
        actual["transcoder", 8]["half"] == pytest.approx(0, abs=1e-9)
        and actual["transcoder", 8]["seeds"] == 2
    )
    assert (
        actual["no experts", 32]["mean"] == pytest.approx(-0.21) and actual["no experts", 32]["half"] is None
    )


def test_results_are_means_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"module": "mlp", "active": 8.0, "dead": 1, "seconds": 60.0}
    rows = [{**same, "arm": "MxD", "k": 8, "seed": s, "rise": r, "nmse": r} for s, r in enumerate((0.1, 0.3))]
    rows += [{**same, "arm": "transcoder", "k": 8, "seed": 0, "rise": 0.1, "nmse": 0.5}]
    monkeypatch.setattr(replacement, "table", lambda name: ledger_of(rows))
    first, second = replacement.rises()
    assert (first["arm"], first["rise"], first["half"], first["seeds"]) == ("transcoder", 0.1, None, 1)
    assert second["nmse"] == pytest.approx(0.2) and second["half"] == pytest.approx(12.706 * 0.1, rel=1e-3)


def test_probes_are_means_over_seeds_and_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"arm": arm, "seed": seed, "rule": rule, "features": features, "f1": f1 / features}
        for features in replacement.FEATURES
        for arm, seed, rule, f1 in (
            ("MxD", 0, "digits", 1.0), ("MxD", 1, "digits", 2.0), ("MxD", 0, "quotes", 3.0),
            ("neurons", 0, "digits", 4.0), ("neurons", 0, "quotes", 4.0),
        )
    ]  # fmt: skip
    monkeypatch.setattr(replacement, "table", lambda name: ledger_of(rows))
    first, second = replacement.probes()
    assert (first["arm"], first["mean"]) == ("neurons", pytest.approx(0.8))
    assert (second["digits"], second["quotes"]) == (pytest.approx(0.3), pytest.approx(0.6))
    assert second["mean"] == pytest.approx(0.45)
