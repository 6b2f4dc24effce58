"""A Mixer with a rate for every factor: its settings, the choice of one, and paired differences."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from ledgers import ledger_of

from paper_figures.experiments import mixer_rates
from paper_figures.experiments.mixer_rates import FIRST, SETTINGS, Setting
from paper_figures.experiments.pretraining import LEARNING_RATES, SEEDS, settings_of

EFFECT = {"one": 0, "structured": 0.02, "batch": 0.01, "layer": 0, "none": 0, "linear": 0, "published": -0.01}


def test_settings_change_rates_norm_and_initialisation() -> None:
    assert len(set(SETTINGS)) == 12
    for setting in SETTINGS:
        read: Any = settings_of("mixer", setting.overrides, 1e-3, 0)
        assert (read.model.format, read.model.gate_norm, read.model.init) == ("cp", *setting[1:])
        assert read.train.structured_rates == (setting.rates == "structured")


def test_choices_and_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "mixer_rates_tuning": [
            {**setting._asdict(), "seed": 100, "learning_rate": rate, "accuracy": rate}
            for setting in SETTINGS
            for rate in LEARNING_RATES["mixer"]
        ],
        "mixer_rates_validation": [
            {**setting._asdict(), "seed": 100, "accuracy": 0.8 + sum(EFFECT[level] for level in setting)}
            for setting in reversed(SETTINGS)
        ],
        "mixer_rates": [
            {"arm": arm, "seed": seed, "accuracy": value + seed}
            for arm, value in {"dense": 0.9, "first": 0.8, "best": 0.85}.items()
            for seed in reversed(SEEDS)
        ],
    }
    monkeypatch.setattr(mixer_rates, "table", lambda name: ledger_of(tables[name]))
    assert mixer_rates.rate_of(FIRST) == max(LEARNING_RATES["mixer"])
    assert mixer_rates.best() == Setting("structured", "batch", "linear")
    rows = {row["difference"]: row for row in mixer_rates.claims()}
    expected = {
        "test, best of validation (structured, batch, linear) - dense": -5,
        "test, one, batch, linear - dense": -10,
        "validation, rates structured - one": 2,
        "validation, norm layer - batch": -1,
        "validation, norm none - batch": -1,
        "validation, init published - linear": -1,
    }
    assert {name: row["mean"] for name, row in rows.items()} == pytest.approx(expected)
    assert all(row["half"] == pytest.approx(0, abs=1e-9) for row in rows.values())
    assert [row["pairs"] for row in rows.values()] == [3, 3, 6, 4, 4, 6]
    tables["mixer_rates_validation"].pop()
    with pytest.raises(ValueError, match="compared first"):
        mixer_rates.best()
