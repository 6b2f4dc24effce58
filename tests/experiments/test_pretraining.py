"""The experiments with Mixers and GPT-2s: runs of the protocol, tables of the runs, claims of the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")
pytest.importorskip("tokenizers")

from ledgers import ledger_of  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

from mumoe_tensor.models import GPT2, GPT2Config  # noqa: E402
from mumoe_tensor.models.saved import save_model  # noqa: E402
from mumoe_tensor.training.data import Dataset  # noqa: E402
from mumoe_tensor.training.settings import MixerRun  # noqa: E402
from paper_figures.experiments import command, pretraining, speed  # noqa: E402
from paper_figures.experiments import tables as experiments  # noqa: E402

ARMS = [(kind, arm) for kind, arms in pretraining.ARMS.items() for arm in arms]


@pytest.mark.parametrize(("kind", "arm"), ARMS)
def test_arms_have_the_parameters_of_the_dense_one(kind: str, arm: str) -> None:
    counts = []
    for each in ("dense", arm):
        model = pretraining.settings_of(kind, pretraining.ARMS[kind][each], 1e-3, 0).make_model("meta")
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_the_rate_is_that_of_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"tuning": arm, "rate": rate, "validation_loss": loss}
        for arm, losses in {"dense": (3.0, 2.0, 4.0), "CP": (1.0, 2.0, 3.0)}.items()
        for rate, loss in zip(pretraining.LEARNING_RATES["mixer"], losses, strict=True)
    ]
    monkeypatch.setattr(pretraining, "table", lambda name: ledger_of(rows))
    assert pretraining.learning_rate("mixer", "dense") == 2e-3
    assert pretraining.learning_rate("mixer", "CP, two levels") == 1e-3
    with pytest.raises(ValueError, match="with `tune`; TR has 0"):
        pretraining.learning_rate("mixer", "TR")


def test_claims_are_differences_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    arms, columns = list(pretraining.ARMS["mixer"]), ("validation_loss", "validation_accuracy")

    def rows(arms: list[str], columns: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            {"arm": arm, "seed": seed, "parameters": 100 + (arm == "CP")}
            | {column: draw.uniform(1, 2) for column in columns}
            for seed in reversed(pretraining.SEEDS)
            for arm in arms
        ]

    tables = {
        "mixer": rows(arms, columns),
        "mixer_test": rows(arms, ("loss", "accuracy")),
        "mixer_followed": rows(["TR, published initialisation"], columns),
    }
    monkeypatch.setattr(pretraining, "table", lambda name: ledger_of(tables[name]))
    actual = {(row["measure"], row["arm"]): row for row in pretraining.claims("mixer")}
    assert len(actual) == 5 * len(arms) + 3

    def of(name: str, arm: str, column: str) -> Any:
        return np.array([row[column] for row in tables[name] if row["arm"] == arm])

    def check(measure: str, arm: str, gaps: Any) -> None:
        row = actual[measure, arm]
        # Of three values Student's t has the quantile 4.303.
        half = 4.303 * np.std(gaps, ddof=1) / 3**0.5
        assert (row["minus dense"], row["half"]) == pytest.approx((gaps.mean(), half), rel=1e-3)

    for name, measure, column in (
        ("mixer", "validation", "validation_"),
        ("mixer_test", "test", ""),
        ("mixer_followed", "validation", "validation_"),
    ):
        dense = name.removesuffix("_followed")
        arm = "TR, published initialisation" if dense != name else "TR"
        ratios = of(name, arm, f"{column}loss") / of(dense, "dense", f"{column}loss") - 1
        check(f"{measure} loss, %", arm, 100 * ratios)
        points = of(name, arm, f"{column}accuracy") - of(dense, "dense", f"{column}accuracy")
        check(f"{measure} accuracy, points", arm, 100 * points)
    assert actual["parameters, %", "CP"]["minus dense"] == pytest.approx(1)
    mean = 100 * of("mixer_test", "CP", "accuracy").mean()
    assert actual["test accuracy, points", "CP"]["value"] == pytest.approx(mean)


def test_causes_are_means_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "changed": changed, "seed": seed, "learning_rate": 1e-3, "parameters": 7,
            "validation_loss": loss + seed, "validation_accuracy": loss / 10,
        }
        for changed, loss in (("dense", 1.0), ("softmax gate", 3.0))
        for seed in (0, 1)
    ]  # fmt: skip
    monkeypatch.setattr(pretraining, "table", {"mixer_causes": rows}.__getitem__)
    first, second = pretraining.tried("mixer")
    assert first == {
        "changed": "dense", "learning_rate": 1e-3, "parameters": 7, "validation_loss": 1.5,
        "validation_accuracy": 0.1, "seeds": 2,
    }  # fmt: skip
    assert (second["changed"], second["validation_loss"]) == ("softmax gate", 3.5)


def test_every_cause_changes_one_thing_of_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Any] = []
    monkeypatch.setattr(pretraining, "train_all", lambda kind, name, given, processes: tasks.extend(given))
    pretraining.find_causes("mixer", 1)
    seeds = len(pretraining.CAUSE_SEEDS["mixer"])
    assert len(tasks) == seeds * (len(pretraining.CAUSES["mixer"]) + 2 + 3)
    start = {}
    for key, changes, rate in tasks:
        settings = pretraining.settings_of("mixer", changes, rate, 0)
        flat = {**vars(settings.model), **vars(settings.train)}
        if key["changed"] in ("as in the protocol", "dense"):
            start[settings.model.format] = flat
        else:
            changed = {name for name, value in flat.items() if value != start[settings.model.format][name]}
            assert len(changed - {"final_learning_rate"}) == 1, key
    tasks.clear()
    pretraining.follow("mixer", 1)
    arms = list(pretraining.ARMS["mixer"])[1:]
    for arm, (key, changes, rate) in zip(arms * 3, tasks, strict=True):
        assert key["arm"] == f"{arm}, published initialisation"
        assert changes == [*pretraining.ARMS["mixer"][arm], "model.init=published"]
        assert rate == pretraining.learning_rate("mixer", arm)


def test_samples_continue_with_the_same_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    letters = sorted(ByteLevel.alphabet())
    vocabulary = tmp_path / "data" / "gpt2-vocabulary"
    vocabulary.mkdir(parents=True)
    ids = {token: k for k, token in enumerate([*letters, "th", "<|endoftext|>"])}
    (vocabulary / "encoder.json").write_text(json.dumps(ids))
    (vocabulary / "vocab.bpe").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    rows = []
    for seed, arm in enumerate(("dense", "CP")):
        torch.manual_seed(seed)
        config = GPT2Config(vocabulary=258, context=64, width=8, depth=1, heads=2, hidden=8)
        folder = tmp_path / "results" / "gpt2" / arm
        folder.mkdir(parents=True)
        save_model(GPT2(config), folder / "model.safetensors")
        rows += [{"arm": arm, "seed": seed, "folder": arm} for seed in (0, 1)]
    monkeypatch.setattr(pretraining, "ROOT", tmp_path)
    monkeypatch.setattr(pretraining, "TABLES", tmp_path)
    monkeypatch.setattr(pretraining, "table", lambda name: ledger_of(rows))
    command.run("pretraining", ["gpt2", "samples"])
    text = (tmp_path / "gpt2_samples.txt").read_text(encoding="utf-8")
    _, dense, cp = re.split("---- .* ----\n", text)
    assert text.count("----") == 4 and text.index("---- dense ----") < text.index("---- CP ----")
    assert dense.startswith(pretraining.START) and cp.startswith(pretraining.START)
    assert dense.rstrip() != cp.rstrip() and len(dense) > len(pretraining.START) + 50


@pytest.mark.parametrize(
    ("line", "message"),
    [("gpt2 follow", "invalid choice: 'follow'"), ("mixer samples", "invalid choice: 'samples'")],
)
def test_steps_that_a_kind_does_not_have(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.run("pretraining", line.split())
    assert message in capsys.readouterr().err


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Trainings of an experiment set one thread for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_training_is_kept_and_goes_into_its_table(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    y = torch.arange(256) % 10
    # A bright column tells the class.
    data = Dataset(torch.rand(256, 1, 28, 28) + 2 * torch.eye(28)[y][:, None, None], y)
    monkeypatch.setattr(MixerRun, "read_data", lambda self: (data, data.rows(torch.arange(200))))
    monkeypatch.setattr(pretraining, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "TABLES", tmp_path)
    key = {"arm": "CP, two levels", "seed": 7}
    changes = [*pretraining.ARMS["mixer"]["CP, two levels"], "train.epochs=4"]
    row = pretraining.trained("mixer", key, changes, 0.004)
    assert row["steps"] == 8 and row["validation_accuracy"] > 0.3 and row["folder"] == "CP-two-levels-7"
    experiments.write_table("mixer", [row])
    curve = pretraining.curves("mixer", experiments.table("mixer"))
    assert [point["step"] for point in curve] == [2, 4, 6, 8]
    assert curve[-1]["validation_loss"] == pytest.approx(row["validation_loss"])
    # Without the folder the curve is what the table has of it.
    experiments.write_table("mixer_curves", curve)
    assert pretraining.curves("mixer", [row | {"folder": "gone"}]) == list(experiments.table("mixer_curves"))
    assert pretraining.curves("mixer", [row | {"folder": "gone", "seed": 8}]) == []


# ---- the benchmark of its training steps ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "arm"), ARMS)
def test_steps_that_are_timed_train_the_arm(kind: str, arm: str) -> None:
    settings = pretraining.settings_of(kind, pretraining.ARMS[kind][arm], 1e-3, 0)
    step, inputs, parameters = speed.make(kind, arm)
    assert parameters == sum(p.numel() for p in settings.make_model("meta").parameters())
    assert inputs == settings.train.batch_size * (1 if kind == "mixer" else settings.model.context)
    losses = [step() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_the_table_of_the_benchmark_has_speed_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # (One arm: each takes seconds, and a process.)
    monkeypatch.setitem(pretraining.ARMS, "mixer", {"dense": pretraining.ARMS["mixer"]["dense"]})
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    report = speed.measure("mixer")
    (row,) = report.rows
    # A training keeps weights, gradients and two moments of each parameter, and what is between.
    assert row["peak MiB"] > 4 * 4 * row["parameters"] / 2**20 and row["images a second"] > 0
    assert row["time of a step / dense"] == 1 and "dense" in str(report)
