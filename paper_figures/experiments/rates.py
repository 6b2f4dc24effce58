"""Heads with a learning rate for every factor; the protocol is ``docs/experiments/rates.md``.

    python -m paper_figures.experiments.rates tune      choose learning rates on validation rows
    python -m paper_figures.experiments.rates test      all results on test rows
    python -m paper_figures.experiments.rates claims    the differences that the claims are about

Needs `make data` and the features of ``python -m paper_figures.experiments.heads features``. After an
interruption, the same command resumes. ``--jobs`` is the number of parallel training runs, each on one
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import torch

from mumoe_tensor.ledger import Row
from mumoe_tensor.models import Head
from paper_figures.experiments import command
from paper_figures.experiments.heads import HIDDEN, fit, make_features, parts, test_rows
from paper_figures.experiments.tables import DATA, difference, grouped, keep, table

FORMATS, EXPERTS = ("cp", "tr"), 32
RATES, NORMS, INITS = ("one", "structured"), ("batch", "layer", "none"), ("linear", "published")
LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01)
TUNING_SEEDS, SEEDS = (100, 101), range(5)
MLP = "mlp"


class Setting(NamedTuple):
    """A head and its training; the MLP has no choice of rates, norm and initialisation."""

    format: str
    rates: str = "one"
    norm: str = ""
    init: str = ""


SETTINGS = [Setting(MLP), *(Setting(*each) for each in product(FORMATS, RATES, NORMS, INITS))]


def judge(setting: Setting, seed: int, learning_rate: float, on_test: bool) -> Row:
    """Train a head; accuracy and loss on validation or test rows."""
    options: Any = {"format": "linear"}
    if setting.format != MLP:
        options = {"format": setting.format, "gate_norm": setting.norm, "init": setting.init}
        options |= {"experts": EXPERTS, "parameters": "match"}
    torch.manual_seed(seed)
    head = Head(parts()[0].x.shape[1], 10, HIDDEN, **options)
    row, _ = fit(
        head, test_rows() if on_test else None, learning_rate=learning_rate, seed=seed,
        structured_rates=setting.rates == "structured",
    )  # fmt: skip
    return {**setting._asdict(), "seed": seed, "learning_rate": learning_rate, **row}


def tune_all(jobs: int | str) -> None:
    """Try every learning rate of every setting."""
    tasks = [
        ({**setting._asdict(), "seed": seed, "learning_rate": rate}, (setting, seed, rate, False))
        for seed, setting, rate in product(TUNING_SEEDS, SETTINGS, LEARNING_RATES)
    ]
    keep("rates_tuning", tasks, judge, jobs)


def validated(setting: Setting) -> dict[float, float]:
    """Mean accuracy on validation rows by learning rate."""
    rows = table("rates_tuning").of(**setting._asdict())
    if len(rows) != len(LEARNING_RATES) * len(TUNING_SEEDS):
        raise ValueError(f"learning rates must be tried first, with `tune`; {setting} has {len(rows)} rows.")
    groups = grouped(rows, "learning_rate")
    return {rate: fmean(row["accuracy"] for row in groups[rate]) for rate in LEARNING_RATES}


def learning_rate(setting: Setting) -> float:
    """The rate with the highest mean accuracy on validation rows."""
    accuracies = validated(setting)
    return max(accuracies, key=lambda rate: accuracies[rate])


def best(format: str) -> Setting:
    """The setting of a format with the highest accuracy on validation rows."""
    settings = [setting for setting in SETTINGS if setting.format == format]
    return max(settings, key=lambda setting: max(validated(setting).values()))


def test_all(jobs: int | str) -> None:
    """Train every setting with its learning rate, and evaluate it on the test rows."""
    rates = {setting: learning_rate(setting) for setting in SETTINGS}
    make_features("t10k", DATA / "heads-test.npz")
    tasks = [
        ({**setting._asdict(), "seed": seed}, (setting, seed, rate, True))
        for seed in SEEDS
        for setting, rate in rates.items()
    ]
    keep("rates", tasks, judge, jobs)


def claims() -> list[Row]:
    """Paired differences in accuracy in percent: mean and 95 % interval.

    A main effect is the mean of a seed's differences over all settings of the other factors.
    """
    rows = table("rates")

    def accuracy(setting: Setting) -> dict[int, float]:
        return {row["seed"]: 100 * row["accuracy"] for row in rows.of(**setting._asdict())}

    records: list[Row] = []

    def compare(text: str, pairs: Sequence[tuple[Setting, Setting]]) -> None:
        sides = (list(map(accuracy, side)) for side in zip(*pairs, strict=True))
        one, other = ({seed: fmean(each[seed] for each in side) for seed in SEEDS} for side in sides)
        records.append({"difference": text, **difference(one, other)})

    for format in FORMATS:
        setting = best(format)
        compare(f"{format}, best of validation ({', '.join(setting[1:])}) - MLP", [(setting, Setting(MLP))])
        first = Setting(format, "one", "batch", "linear")
        compare(f"{format}, as in the first protocol - MLP", [(first, Setting(MLP))])
        for factor, (base, *others) in {"rates": RATES, "norm": NORMS, "init": INITS}.items():
            before = [each for each in SETTINGS if each.format == format and getattr(each, factor) == base]
            for other in others:
                after: list[Setting] = [each._replace(**{factor: other}) for each in before]
                compare(f"{format}, {factor} {other} - {base}", list(zip(after, before, strict=True)))
    return records


STEPS = {"tune": tune_all, "test": test_all, "claims": claims}

if __name__ == "__main__":
    command.run("rates")
