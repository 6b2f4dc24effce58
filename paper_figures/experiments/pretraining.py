"""Mixers and GPT-2s trained from scratch; the protocols are ``docs/experiments/mixer.md`` and ``gpt2.md``.

    python -m paper_figures.experiments.pretraining mixer tune      choose learning rates on validation rows
    python -m paper_figures.experiments.pretraining mixer runs      all training runs; test images for Mixers
    python -m paper_figures.experiments.pretraining mixer causes    try other settings on validation rows
    python -m paper_figures.experiments.pretraining mixer follow    use the best of them for all expert arms
    python -m paper_figures.experiments.pretraining mixer svd       dense models of lower rank
    python -m paper_figures.experiments.pretraining mixer claims    the differences that the claims are about
    python -m paper_figures.experiments.pretraining gpt2 samples    texts of the models of seed 0

The steps are the same for ``gpt2``, but ``follow`` is only for ``mixer`` and ``samples`` only for ``gpt2``.
Needs `make data`, and for GPT-2 the tokens, whose command is in ``mumoe_tensor/configs/gpt2.toml``. After an
interruption, the same command resumes, even within a training run. ``--jobs`` is the number of parallel
training runs, each on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from mumoe_tensor.analysis import truncate
from mumoe_tensor.files import whole_file
from mumoe_tensor.interval import interval
from mumoe_tensor.ledger import Row
from mumoe_tensor.models import load_model
from mumoe_tensor.training import Dataset, evaluate, read_idx
from mumoe_tensor.training.log import read_evaluations
from mumoe_tensor.training.run import run
from mumoe_tensor.training.settings import read_settings
from mumoe_tensor.training.tokens import Tokenizer
from paper_figures.common import table as as_text
from paper_figures.experiments import command
from paper_figures.experiments.tables import DATA, ROOT, TABLES, grouped, keep, means, table, write_table

#: The arms of the comparison, and their changes to the packaged settings.
ARMS: dict[str, dict[str, list[str]]] = {
    "mixer": {
        "dense": ["model.format=mlp"],
        "CP": ["model.format=cp"],
        # (With the closest rank for each block, the total would be off by two and three percent.)
        "TR": ["model.format=tr", "model.token_rank=[4, 4, 3]", "model.channel_rank=[4, 4, 12]"],
        "CP, two levels": ["model.format=cp", "model.experts=[4, 4]"],
        "TR, two levels": [
            "model.format=tr",
            "model.experts=[4, 4]",
            "model.token_rank=[4, 4, 4, 5]",
            "model.channel_rank=[4, 4, 4, 12]",
        ],
    },
    "gpt2": {"dense": ["model.format=mlp"], "CP": ["model.format=cp"], "TR": ["model.format=tr"]},
}
SEEDS, TUNING_SEED = range(3), 100
LEARNING_RATES = {"mixer": (1e-3, 2e-3, 4e-3), "gpt2": (2e-3, 4e-3, 8e-3)}
#: Length of the training runs that try learning rates and other settings.
TUNING = {"mixer": ["train.epochs=2"], "gpt2": ["train.steps=180"]}
CAUSING = {"mixer": ["train.epochs=3"], "gpt2": ["train.steps=300"]}
#: Final learning rate as a fraction of the peak.
FINAL = {"mixer": 0.0, "gpt2": 0.1}
#: Changes of one setting at a time, in CP blocks.
CAUSES: dict[str, dict[str, list[str]]] = {
    "mixer": {
        "as in the protocol": [],
        "published initialisation": ["model.init=published"],
        "layer norm of the logits": ["model.gate_norm=layer"],
        "no norm of the logits": ["model.gate_norm=none"],
        "64 experts": ["model.experts=[64]"],
        "softmax gate": ["model.gate=softmax"],
    },
    "gpt2": {
        "as in the protocol": [],
        "published initialisation": ["model.init=published"],
        "batch norm of the logits": ["model.gate_norm=batch"],
        "no norm of the logits": ["model.gate_norm=none"],
        "128 experts": ["model.experts=[128]"],
        "two levels": ["model.experts=[8, 4]"],
        "softmax gate": ["model.gate=softmax"],
    },
}
#: The best of these on validation rows; all expert arms are trained with it for the full length.
FOLLOWED = {"mixer": "published initialisation"}
CAUSE_SEEDS = {"mixer": (100, 101), "gpt2": (100,)}
#: Fractions of the singular values that truncated linear layers keep.
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
#: The prompt for GPT-2s, from a play they were not trained on; the number of tokens, and sampling settings.
START, WRITTEN, TEMPERATURE, TOP_K = "FIRST WITCH.\nWhen shall we three meet again?\n", 100, 0.8, 40


def settings_of(kind: str, overrides: Sequence[str], learning_rate: float, seed: int) -> Any:
    """Settings of a training run."""
    rates = [
        f"train.learning_rate={learning_rate}",
        f"train.final_learning_rate={FINAL[kind] * learning_rate}",
    ]
    return read_settings(kind, None, [*overrides, *rates, f"train.seed={seed}"])


def trained(kind: str, key: Row, overrides: Sequence[str], learning_rate: float) -> Row:
    """Train or resume a run, and return the metrics of its last evaluation. Runs in a separate process."""
    torch.set_num_threads(1)
    settings = settings_of(kind, overrides, learning_rate, key["seed"])
    name = "-".join(str(value).replace(", ", "-").replace(" ", "-") for value in key.values())
    outcome = run(settings, ROOT / "results" / kind / name)
    ranks = " ".join(f"{name} {value}" for name, value in outcome["ranks"].items() if value) or "none"
    return {
        **key, "parameters": outcome["parameters"], "ranks": ranks, "learning_rate": learning_rate,
        "steps": outcome["steps"], "seconds": outcome["seconds"],
        "validation_loss": outcome["validation_loss"], "validation_accuracy": outcome["accuracy"],
        "folder": name,
    }  # fmt: skip


def train_all(kind: str, name: str, tasks: Sequence[tuple[Row, list[str], float]], jobs: int | str) -> None:
    """Train the runs without a row in a table: columns of the row, settings, learning rate."""
    work = [(key, (kind, key, overrides, rate)) for key, overrides, rate in tasks]
    keep(name, work, trained, jobs)


def tune(kind: str, jobs: int | str) -> None:
    """Try every learning rate with one level of experts in each format, and with the dense model."""
    tasks = [
        ({"tuning": arm, "rate": rate, "seed": TUNING_SEED}, [*ARMS[kind][arm], *TUNING[kind]], rate)
        for arm, rate in product(("dense", "CP", "TR"), LEARNING_RATES[kind])
    ]
    train_all(kind, f"{kind}_tuning", tasks, jobs)


def learning_rate(kind: str, arm: str) -> float:
    """The rate with the lowest validation loss; two levels use the rate of one level."""
    group = table(f"{kind}_tuning").of(tuning=arm.partition(",")[0])
    if len(group) != len(LEARNING_RATES[kind]):
        raise ValueError(f"learning rates must be tried first, with `tune`; {arm} has {len(group)}.")
    return float(min(group, key=lambda row: row["validation_loss"])["rate"])


def curves(kind: str, rows: Iterable[Row]) -> list[Row]:
    """Evaluations of training runs; if a run's folder no longer exists, its rows in the table."""
    records = []
    for row in rows:
        metrics = ROOT / "results" / kind / row["folder"] / "metrics.csv"
        if metrics.exists():
            for each in read_evaluations(metrics):
                record = {"arm": row["arm"], "seed": row["seed"], "step": each.step, "loss": each.loss}
                record |= {"validation_loss": each.validation_loss, "validation_accuracy": each.accuracy}
                records.append(record)
        else:
            records += table(f"{kind}_curves").of(arm=row["arm"], seed=row["seed"])
    return records


def model_of(kind: str, row: Row) -> Any:
    """The trained model of a row."""
    return load_model(ROOT / "results" / kind / row["folder"] / "model.safetensors")


@cache
def test_images() -> Dataset:
    """The test images of Fashion-MNIST."""
    folder = DATA / "fashion-mnist"
    return read_idx(folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz")


def run_all(kind: str, jobs: int | str) -> None:
    """All training runs of the protocol, their curves, and for Mixers the test images."""
    tasks = [
        ({"arm": arm, "seed": seed}, ARMS[kind][arm], learning_rate(kind, arm))
        for seed, arm in product(SEEDS, ARMS[kind])
    ]
    train_all(kind, kind, tasks, jobs)
    rows = table(kind)
    write_table(f"{kind}_curves", curves(kind, rows))
    if kind == "mixer":
        tested = table("mixer_test")  # runs with a row are not evaluated again
        for row in rows:
            key = {"arm": row["arm"], "seed": row["seed"]}
            if not tested.has(**key):
                loss, accuracy = evaluate(model_of(kind, row), test_images())
                tested.add([{**key, "loss": loss, "accuracy": accuracy}])


def find_causes(kind: str, jobs: int | str) -> None:
    """CP blocks with one setting changed; CP blocks and the dense model with other learning rates."""
    tasks = []
    for seed in CAUSE_SEEDS[kind]:
        for arm, changes in (("CP", CAUSES[kind]), ("dense", {"dense": []})):
            rate = learning_rate(kind, arm)
            changed = [(name, change, rate) for name, change in changes.items()]
            start = "" if arm == "CP" else "dense, "
            changed += [(f"{start}learning rate x {factor}", [], factor * rate) for factor in (0.5, 2)]
            tasks += [
                ({"changed": name, "seed": seed}, [*ARMS[kind][arm], *CAUSING[kind], *change], rate)
                for name, change, rate in changed
            ]
    train_all(kind, f"{kind}_causes", tasks, jobs)


def follow(kind: str, jobs: int | str) -> None:
    """Train all expert arms by the protocol with the change in `FOLLOWED`."""
    name = FOLLOWED[kind]
    tasks = [
        ({"arm": f"{arm}, {name}", "seed": seed}, [*settings, *CAUSES[kind][name]], learning_rate(kind, arm))
        for seed, (arm, settings) in product(SEEDS, ARMS[kind].items())
        if arm != "dense"
    ]
    train_all(kind, f"{kind}_followed", tasks, jobs)


def truncated(kind: str) -> None:
    """Evaluate dense models on validation rows, with truncated linear layers in their MLPs."""
    rows = []
    for seed in SEEDS:
        settings = settings_of(kind, ARMS[kind]["dense"], learning_rate(kind, "dense"), seed)
        _, validation = settings.read_data()
        (row,) = table(kind).of(arm="dense", seed=seed)
        model = model_of(kind, row)
        modules = model.named_modules()
        layers = [layer for name, layer in modules if isinstance(layer, torch.nn.Linear) and "mlp" in name]
        for share in SHARES:
            with truncate(layers, share):
                loss, accuracy = evaluate(model, validation, batch_size=64)
            row = {"seed": seed, "share": share, "layers": len(layers)}
            rows.append(row | {"loss": loss, "accuracy": accuracy})
    write_table(f"{kind}_svd", rows)


def write_samples() -> None:
    """Generate a text with each arm's GPT-2 of seed 0, from the same prompt."""
    texts = []
    for row in table("gpt2").of(seed=0):
        model = model_of("gpt2", row)
        tokenizer = Tokenizer(ROOT / "data" / "gpt2-vocabulary", model.config.vocabulary)
        tokens = model.generate(
            torch.tensor([tokenizer.encode(START)]), WRITTEN, temperature=TEMPERATURE, top_k=TOP_K,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        texts.append(f"---- {row['arm']} ----\n{tokenizer.decode(tokens[0].tolist())}\n")
    with whole_file(TABLES / "gpt2_samples.txt") as file:
        file.write("\n".join(texts).encode())


def claims(kind: str) -> list[Row]:
    """Paired differences from the dense models, with their intervals.

    Speed and memory, which depend on the load of the machine, are measured by `speed`.
    """
    rows, tested = [*table(kind), *table(f"{kind}_followed")], table(f"{kind}_test")
    measures: list[tuple[str, Iterable[Row], str]] = [
        ("validation loss, %", rows, "validation_loss"),
        ("validation accuracy, points", rows, "validation_accuracy"),
        ("test loss, %", tested, "loss"),
        ("test accuracy, points", tested, "accuracy"),
        ("parameters, %", rows, "parameters"),
    ]
    records = []
    for measure, of, column in measures:
        is_share = measure.endswith("points")
        values = {(row["arm"], row["seed"]): (100 if is_share else 1) * row[column] for row in of}
        for arm in grouped(of, "arm"):
            pairs = [(values[arm, seed], values["dense", seed]) for seed in SEEDS]
            mean, half = interval([a - b if is_share else 100 * (a / b - 1) for a, b in pairs])
            value = interval([a for a, _ in pairs])[0]
            row = {"measure": measure, "arm": arm, "value": value, "minus dense": mean, "half": half}
            records.append(row | {"seeds": len(pairs)})
    return records


def tried(kind: str) -> list[Row]:
    """The results of `find_causes` as means over seeds."""
    columns = ("learning_rate", "parameters", "validation_loss", "validation_accuracy")
    return means(table(f"{kind}_causes"), "changed", columns)


def print_claims(kind: str) -> None:
    """Print the differences, and the results of other settings if there are any."""
    print(as_text(claims(kind)))
    if table(f"{kind}_causes"):
        print(f"\n{as_text(tried(kind))}")


STEPS: dict[str, dict[str, Any]] = {
    kind: {
        "tune": partial(tune, kind),
        "runs": partial(run_all, kind),
        "causes": partial(find_causes, kind),
        "svd": partial(truncated, kind),
        "claims": partial(print_claims, kind),
    }
    for kind in ARMS
}
STEPS["mixer"]["follow"] = partial(follow, "mixer")
STEPS["gpt2"]["samples"] = write_samples

if __name__ == "__main__":
    command.run("pretraining")
