"""Heads with a learning rate for every factor: choices are of validation rows, effects of the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch
from ledgers import ledger_of

from paper_figures.experiments import heads, rates
from paper_figures.experiments.heads import Dataset
from paper_figures.experiments.rates import Setting


def test_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.arange(600) % 10
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(24)[y]
    data = Dataset(x, y)
    for module in (heads, rates):
        monkeypatch.setattr(module, "parts", lambda: (data, data.rows(range(300))))
    monkeypatch.setattr(rates, "test_rows", lambda: data.rows(range(300, 600)))
    threads = torch.get_num_threads()
    try:
        for setting in (Setting("mlp"), Setting("cp", "structured", "none", "published")):
            validated, tested = (rates.judge(setting, 0, 0.01, on_test) for on_test in (False, True))
            assert min(validated["accuracy"], tested["accuracy"]) > 0.8
            assert validated["loss"] != tested["loss"] and validated["epoch"] == tested["epoch"]
            assert tested["parameters"] == pytest.approx(24 * 512 + 512 + 512 * 10 + 10, rel=0.02)
    finally:
        torch.set_num_threads(threads)


def test_choices_and_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    tuning = [
        {**setting._asdict(), "seed": seed, "learning_rate": rate, "accuracy": draw.random()}
        for setting in rates.SETTINGS
        for seed in rates.TUNING_SEEDS
        for rate in rates.LEARNING_RATES
    ]
    tested = [
        {**setting._asdict(), "seed": seed, "accuracy": draw.random()}
        for setting in rates.SETTINGS
        for seed in rates.SEEDS
    ]
    tables = {"rates_tuning": tuning, "rates": tested[::-1]}
    monkeypatch.setattr(rates, "table", lambda name: ledger_of(tables[name]))

    def mean(setting: Setting, rate: float) -> Any:
        rows = [row for row in tuning if Setting(*(row[f] for f in Setting._fields)) == setting]
        return np.mean([row["accuracy"] for row in rows if row["learning_rate"] == rate])

    for setting in rates.SETTINGS:
        assert rates.learning_rate(setting) == max(rates.LEARNING_RATES, key=lambda r: mean(setting, r))
    of_tr = [setting for setting in rates.SETTINGS if setting.format == "tr"]
    assert len(of_tr) == 12
    best = max(of_tr, key=lambda setting: max(mean(setting, rate) for rate in rates.LEARNING_RATES))
    assert rates.best("tr") == best
    differences = {row["difference"]: row for row in rates.claims()}
    accuracy = {(*(row[f] for f in Setting._fields), row["seed"]): 100 * row["accuracy"] for row in tested}
    for norm in ("layer", "none"):
        by_seed = [
            np.mean([
                accuracy["cp", rate, norm, init, seed] - accuracy["cp", rate, "batch", init, seed]
                for rate in rates.RATES
                for init in rates.INITS
            ])
            for seed in rates.SEEDS
        ]  # fmt: skip
        row = differences[f"cp, norm {norm} - batch"]
        assert row["mean"] == pytest.approx(np.mean(by_seed)) and row["seeds"] == 5
        assert row["half"] == pytest.approx(2.776 * np.std(by_seed, ddof=1) / np.sqrt(5), rel=1e-3)
    gaps = [accuracy[(*best, seed)] - accuracy["mlp", "one", "", "", seed] for seed in rates.SEEDS]
    assert differences[f"tr, best of validation ({', '.join(best[1:])}) - MLP"]["mean"] == pytest.approx(
        np.mean(gaps)
    )
    monkeypatch.setattr(rates, "table", lambda name: ledger_of(tuning[1:]))
    with pytest.raises(ValueError, match="must be tried first"):
        rates.learning_rate(Setting("mlp"))
