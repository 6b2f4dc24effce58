"""The experiment with heads: its runs are those of the protocol, its tables those of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("fairlearn")

import torch

from paper_figures import accuracy_over_experts, expert_load, softmax_and_entmax
from paper_figures.experiments import heads
from paper_figures.experiments.heads import Run

MLP = 320 * 512 + 512 + 512 * 10 + 10


def test_runs_are_those_of_the_protocol() -> None:
    runs = heads.runs()
    assert len(runs) == len(set(runs)) == 5 * (2 + 16 + 4 + 8 + 5)
    for run in runs[: len(runs) // 5]:
        head = run.build(320, 10)
        count = sum(p.numel() for p in head.parameters())
        if run.kind == "matched":
            assert count == pytest.approx(MLP, rel=0.015), run
        elif run.format == "cp":
            assert count == 64 * (run.experts[0] + 321 + 10) + 320 * run.experts[0]


def test_seeds_draw_the_weights() -> None:
    one, same, other = (Run("single", "cp", (8,), seed=seed).build(320, 10) for seed in (0, 0, 1))
    assert torch.equal(one.body.experts.factors[0], same.body.experts.factors[0])
    assert not torch.equal(one.body.experts.factors[0], other.body.experts.factors[0])


def test_the_best_rate_on_validation_rows_is_taken() -> None:
    rows = heads.table("heads_tuning")
    assert len(rows) == 7 * len(heads.LEARNING_RATES)
    for row in heads.table("heads"):
        run_as = [r for r in heads.runs() if heads.is_same(row, r.key)]
        assert len(run_as) == 1, row
        tried = [r for r in rows if heads.is_same(r, run_as[0].tuned_as.key)]
        best = max(r["accuracy"] for r in tried)
        assert row["learning_rate"] in [r["learning_rate"] for r in tried if r["accuracy"] == best]


def test_figures_say_what_the_table_says() -> None:
    table = heads.table("heads")
    rows = accuracy_over_experts.rows(False)
    assert rows[0]["name"] == "mlp" and {row["name"] for row in rows} == {"mlp", *heads.FORMATS}
    for row in rows:
        format = "linear" if row["name"] == "mlp" else row["name"]
        key = {"kind": "matched", "format": format, "experts": row["modes"]}
        values = [r["accuracy"] for r in table if heads.is_same(r, key)]
        assert row["accuracy"] == pytest.approx(np.mean(values)) and row["seeds"] == len(values)
        # Of five values Student's t has the quantile 2.776.
        half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
        assert row["accuracy_high"] - row["accuracy"] == pytest.approx(half, rel=1e-3)
    assert len(softmax_and_entmax.rows(False)) == 6
    for row in expert_load.rows(False):
        assert 0 <= row["load_low"] <= row["load"] <= row["load_high"] <= 1


def test_claims_are_differences_of_the_same_seed() -> None:
    table = heads.table("heads")
    found = {row["difference"]: row for row in heads.claims()}
    by_seed: dict[Any, dict[int, float]] = {}
    for row in table:
        if row["kind"] == "matched" and str(row["experts"]) in ("none", "32"):
            by_seed.setdefault(row["format"], {})[row["seed"]] = row["accuracy"]
    mine = [100 * (by_seed["cp"][seed] - by_seed["linear"][seed]) for seed in range(5)]
    told = found["accuracy in %, cp of 32 experts - MLP"]
    assert told["mean"] == pytest.approx(np.mean(mine)) and told["seeds"] == 5
    assert told["half"] == pytest.approx(2.776 * np.std(mine, ddof=1) / np.sqrt(5), rel=1e-3)


def test_a_training_of_the_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    y = torch.arange(600) % 10
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(24)[y]
    data = heads.Dataset(x, y)
    threads = torch.get_num_threads()
    monkeypatch.setattr(heads, "parts", lambda: (data, data))
    monkeypatch.setattr(heads, "test_rows", lambda: data)
    try:
        row, loads, top = heads.test(Run("single", "cp", (32,)), 0.01)
    finally:
        torch.set_num_threads(threads)
    assert row["accuracy"] > 0.9 and 0 < row["active"] <= 1
    assert row["polysemanticity"] < row["polysemanticity_random"]
    assert len(loads) == 32 and sorted((r["load"] for r in loads), reverse=True) == [r["load"] for r in loads]
    assert top["indices_32"].shape == (heads.SHOWN, heads.IMAGES)
    monkeypatch.setattr(heads, "TABLES", tmp_path)
    heads.write_table("some", [row])
    assert heads.is_same(heads.table("some")[0], Run("single", "cp", (32,)).key)
    assert not heads.is_same(heads.table("some")[0], Run("single", "cp", (32,), seed=1).key)
