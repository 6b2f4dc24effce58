"""Grids of replacements as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")

from mumoe_tensor.ledger import Ledger
from mumoe_tensor.replace.grid import TUNING, Arm, Grid, Place


def test_a_grid_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'context = 8\ntuned_at = 2\n[[places]]\nmodule = "a"\nk = [2]\nseeds = [1]\n'
        '[arms.dense]\nlayer = "MixtureOfDecoders"\noptions = { experts = [] }\nparameters = "none"\n'
    )
    grid = Grid.read(path)
    assert grid.places == (Place("a", (2,), (1,)),)
    assert grid.arms["dense"].parameters is None and not grid.arms["dense"].has_k
    for old, new, error in (
        ("tuned_at = 2", "tuned_at = 3", "tuned_at must be a K of the first place"),
        ("k = [2]", "k = [2, 4]", "same number of positive entries"),
        ('"MixtureOfDecoders"', '"Decoder"', "arms.dense.layer"),
        ("context", "contexts", "contexts"),
        ("context = 8", "context = 1", "at least two tokens"),
        ("context = 8", "context = 8\nmassive = -1.0", "massive must be positive"),
        ("context = 8", "context = 8\nmassive = nan", "massive"),
        ("[arms.dense]", "[arms.dense]\nlearning_rates = [0.0]", "learning_rates must be positive"),
        ("[arms.dense]", "[arms.dense]\npenalties = [-1.0]", "penalties must not be negative"),
    ):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(ValueError, match=error):
            Grid.read(path)
        path.write_text(path.read_text().replace(new, old))


def test_no_two_runs_have_one_name() -> None:
    place, arm = Place("a", (2,), (1,)), Arm("Transcoder")
    for places, arms, error in (
        ((place, place), {"x": arm}, "more than one a x K=2 seed=0"),
        ((Place("a", (2, 2), (1, 1)),), {"x": arm}, "more than one a x K=2 seed=0"),
        ((place,), {"x, y": arm, "x y": arm}, "more than one a x y K=2 seed=0"),
        ((place,), {"x/y": arm}, r"must not contain a slash, got \['x/y'\]"),
    ):
        with pytest.raises(ValueError, match=error):
            Grid(places, arms, tuned_at=2)


def test_settings_are_those_tuned_at_the_first_place() -> None:
    grid = Grid((Place("a", (2,), (1,)), Place("b", (2,), (1,))), {"x": Arm("Transcoder")}, tuned_at=2)
    key = {"arm": "x", "k": 2, "seed": 100, "penalty": 0.0}
    measured = {"parameters": 9, "experts": 3, "active": 2.0, "dead": 0, "seconds": 1.0}
    tuning = Ledger(None, TUNING)
    for module, rate, nmse in (("a", 0.1, 0.5), ("a", 0.2, 0.4), ("b", 0.3, 0.1)):
        run = {"run": f"{module} {rate}", "module": module, "learning_rate": rate, "nmse": nmse}
        tuning.add([{**run, **key, **measured}])
    chosen = [grid.chosen(run, tuning).learning_rate for run in grid.runs()]
    assert chosen == [0.2, 0.2]
