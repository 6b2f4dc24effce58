"""A Mixer with a learning rate for every factor; the protocol is in ``docs/experiments/rates.md``.

    python -m paper_figures.experiments.mixer_rates tune       choose learning rates on validation rows
    python -m paper_figures.experiments.mixer_rates compare    all settings on validation rows
    python -m paper_figures.experiments.mixer_rates test       the best of them on test images
    python -m paper_figures.experiments.mixer_rates claims     the differences that the claims are about

Needs `make data`. After an interruption, the same command resumes, even within a training run. ``--jobs`` is
the number of parallel training runs, each on one thread.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from mumoe_tensor.ledger import Row
from mumoe_tensor.models import load_model
from mumoe_tensor.training import evaluate
from paper_figures.experiments import command
from paper_figures.experiments.pretraining import (
    LEARNING_RATES,
    SEEDS,
    TUNING_SEED,
    learning_rate,
    test_images,
    trained,
)
from paper_figures.experiments.rates import INITS, NORMS, RATES
from paper_figures.experiments.tables import ROOT, difference, keep, table, tuned_rate

TUNING = ["train.epochs=1"]


class Setting(NamedTuple):
    """The training of a Mixer with CP blocks."""

    rates: str
    norm: str
    init: str

    @property
    def overrides(self) -> list[str]:
        """Changes to the packaged settings."""
        structured = str(self.rates == "structured").lower()
        return [
            "model.format=cp", f"model.gate_norm={self.norm}", f"model.init={self.init}",
            f"train.structured_rates={structured}",
        ]  # fmt: skip


SETTINGS = [Setting(*each) for each in product(RATES, NORMS, INITS)]
FIRST = Setting("one", "batch", "linear")
DENSE = "dense"


def fitted(key: Row, overrides: list[str], rate: float, on_test: bool) -> Row:
    """Train a Mixer; accuracy and loss on validation rows, or on test images."""
    row = trained("mixer", {"experiment": "rates", **key}, overrides, rate)
    loss, accuracy = row["validation_loss"], row["validation_accuracy"]
    if on_test:
        model = load_model(ROOT / "results" / "mixer" / row["folder"] / "model.safetensors")
        loss, accuracy = evaluate(model, test_images())
    columns = ("learning_rate", "parameters", "seconds")
    return {**key, **{name: row[name] for name in columns}, "accuracy": accuracy, "loss": loss}


def tune_all(jobs: int | str) -> None:
    """Try every learning rate of every setting in short runs."""
    keys = [
        (setting, {**setting._asdict(), "seed": TUNING_SEED, "learning_rate": rate})
        for setting in SETTINGS
        for rate in LEARNING_RATES["mixer"]
    ]
    tasks = [
        (key, (key, [*setting.overrides, *TUNING], key["learning_rate"], False)) for setting, key in keys
    ]
    keep("mixer_rates_tuning", tasks, fitted, jobs)


def rate_of(setting: Setting) -> float:
    """The rate with the highest validation accuracy."""
    return tuned_rate(table("mixer_rates_tuning"), setting._asdict(), LEARNING_RATES["mixer"])


def compare_all(jobs: int | str) -> None:
    """Train every setting in full, and evaluate it on validation rows."""
    keys = [{**setting._asdict(), "seed": TUNING_SEED} for setting in SETTINGS]
    tasks = [
        (key, (key, setting.overrides, rate_of(setting), False))
        for setting, key in zip(SETTINGS, keys, strict=True)
    ]
    keep("mixer_rates_validation", tasks, fitted, jobs)


def validated() -> dict[Setting, float]:
    """Accuracy of every setting on validation rows in percent."""
    rows = table("mixer_rates_validation")
    accuracy = {Setting(*(row[field] for field in Setting._fields)): 100 * row["accuracy"] for row in rows}
    if accuracy.keys() != set(SETTINGS):
        raise ValueError(f"all settings must be compared first, with `compare`; got {len(accuracy)}.")
    return accuracy


def best() -> Setting:
    """The setting with the highest accuracy on validation rows."""
    accuracy = validated()
    return max(SETTINGS, key=accuracy.__getitem__)


def test_all(jobs: int | str) -> None:
    """Train the best setting, that of the first protocol and the dense Mixer; evaluate on test images."""
    arms = {
        DENSE: (["model.format=mlp"], learning_rate("mixer", "dense")),
        "first": (FIRST.overrides, rate_of(FIRST)),
        "best": (best().overrides, rate_of(best())),
    }
    tasks = []
    for seed in SEEDS:
        for arm, (overrides, rate) in arms.items():
            key = {"arm": arm, "seed": seed}
            tasks.append((key, (key, overrides, rate, True)))
    keep("mixer_rates", tasks, fitted, jobs)


def claims() -> list[Row]:
    """Paired differences in accuracy in percent: mean and 95 % interval.

    A pair is of one seed on test images, and of one setting of the other factors on validation rows.
    """
    tested = table("mixer_rates")

    def on_test(arm: str) -> dict[int, float]:
        return {row["seed"]: 100 * row["accuracy"] for row in tested.of(arm=arm)}

    records: list[Row] = []

    def compare(text: str, one: dict[int, float], other: dict[int, float]) -> None:
        row = difference(one, other)
        records.append({"difference": text, "pairs": row.pop("seeds"), **row})

    for arm, text in (("best", f"best of validation ({', '.join(best())})"), ("first", ", ".join(FIRST))):
        compare(f"test, {text} - dense", on_test(arm), on_test(DENSE))
    accuracy = validated()
    for factor, (base, *others) in {"rates": RATES, "norm": NORMS, "init": INITS}.items():
        settings = [setting for setting in SETTINGS if getattr(setting, factor) == base]
        before = {pair: accuracy[setting] for pair, setting in enumerate(settings)}
        for other in others:
            changed = [setting._replace(**{factor: other}) for setting in settings]
            after = {pair: accuracy[setting] for pair, setting in enumerate(changed)}
            compare(f"validation, {factor} {other} - {base}", after, before)
    return records


STEPS = {"tune": tune_all, "compare": compare_all, "test": test_all, "claims": claims}

if __name__ == "__main__":
    command.run("mixer_rates")
