"""Heads trained together with their backbone, on few images: see ``docs/experiments/heads.md``.

    python -m paper_figures.experiments.fine_tuning runs      all training runs, on validation rows
    python -m paper_figures.experiments.fine_tuning claims    the differences that the claims are about

After an interruption, the same command resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mumoe_tensor.interval import interval
from mumoe_tensor.models import Head, load_backbone
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.training import Dataset, TrainConfig, evaluate, extract
from mumoe_tensor.training.head import fine_tune, train_head
from paper_figures.common import Row
from paper_figures.experiments import command
from paper_figures.experiments.heads import HIDDEN, TRAINING, images
from paper_figures.experiments.tables import DATA, keep, table, tuned_rate

TABLE = "heads_fine_tuning"
ROWS, VALIDATED, BATCH = 400, 2_000, 50
EXPERTS = 32
FORMATS = ("linear", "cp")
#: Passes over the rows, and candidate learning rates, with the network frozen and trained.
EPOCHS = {"frozen": 40, "trained": 5}
RATES = {"frozen": (0.001, 0.003, 0.01), "trained": (0.0003, 0.001, 0.003)}
SEEDS, TUNING_SEED = range(3), 100
#: Momentum of batch norm, torch's default. The network's default, 0.01, suits many more steps.
MOMENTUM = 0.1


@dataclass(frozen=True)
class Case:
    """One training."""

    network: str
    format: str
    seed: int
    learning_rate: float

    @property
    def key(self) -> Row:
        """The columns that identify the case."""
        return {
            "network": self.network, "format": self.format, "seed": self.seed,
            "learning_rate": self.learning_rate,
        }  # fmt: skip


def network() -> nn.Module:
    """EfficientNet-Lite0, prepared for training."""
    (weights,) = (DATA / "efficientnet-lite0").glob("*.pth")
    backbone = load_backbone("efficientnet-lite0", weights)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return backbone


def parts() -> tuple[Dataset, Dataset]:
    """Training and validation images: the first of those in the experiment with a frozen network."""
    data = images("train")
    return data.rows(torch.arange(ROWS)), data.rows(TRAINING + torch.arange(VALIDATED))


def fit(case: Case) -> Row:
    """Train a head, with or without the network; return its final accuracy on validation rows."""
    torch.set_num_threads(1)
    training, validation = parts()
    backbone = network()
    torch.manual_seed(case.seed)
    options: dict[str, Any] = {} if case.format == "linear" else {"experts": EXPERTS, "parameters": "match"}
    head = Head(
        extract(backbone, training.rows(torch.arange(1))).x.shape[1],
        10,
        HIDDEN,
        format=case.format,
        **options,
    )
    config = TrainConfig(
        epochs=EPOCHS[case.network], batch_size=BATCH, learning_rate=case.learning_rate, seed=case.seed,
        keep="last", evaluate_every=EPOCHS[case.network] * (ROWS // BATCH), evaluation_batch_size=200,
    )  # fmt: skip
    if case.network == "trained":
        *_, last = fine_tune(backbone, head, training, validation, config)
    else:
        training, validation = extract(backbone, training), extract(backbone, validation)
        *_, last = train_head(head, training, validation, config)
    model = nn.Sequential(backbone, head) if case.network == "trained" else head
    return {
        **case.key, "parameters": num_parameters(head), "accuracy": last.accuracy,
        "loss": last.validation_loss, "training_accuracy": evaluate(model, training, batch_size=200)[1],
        "seconds": round(last.seconds, 1),
    }  # fmt: skip


def rate(network: str, format: str) -> float:
    """The learning rate with the highest validation accuracy."""
    key = {"network": network, "format": format, "seed": TUNING_SEED}
    return tuned_rate(table(TABLE), key, RATES[network])


def fine_tune_all(jobs: int | str) -> None:
    """Try the learning rates, then train each kind of head with its best rate."""
    kinds = [(network, format) for network in EPOCHS for format in FORMATS]
    do(jobs, [Case(*kind, TUNING_SEED, each) for kind in kinds for each in RATES[kind[0]]])
    do(jobs, [Case(*kind, seed, rate(*kind)) for seed in SEEDS for kind in kinds])


def do(jobs: int | str, cases: list[Case]) -> None:
    """Run the cases that are not in the table yet."""
    keep(TABLE, [(case.key, (case,)) for case in cases], fit, jobs)


def differences() -> list[Row]:
    """The paired differences that the claims are about: mean in % and half-width of the 95 % interval."""
    rows = [row for row in table(TABLE) if row["seed"] in SEEDS]
    accuracy = {
        (network, format): [100 * row["accuracy"] for row in sorted(rows, key=lambda row: row["seed"])
                            if (row["network"], row["format"]) == (network, format)]
        for network in EPOCHS for format in FORMATS
    }  # fmt: skip

    def minus(one: list[float], other: list[float]) -> list[float]:
        return [a - b for a, b in zip(one, other, strict=True)]

    gap = {network: minus(accuracy[network, "cp"], accuracy[network, "linear"]) for network in EPOCHS}
    wanted = {f"accuracy, {network}, {format}": accuracy[network, format] for network, format in accuracy}
    wanted |= {
        f"1: trained - frozen, {format}": minus(accuracy["trained", format], accuracy["frozen", format])
        for format in FORMATS
    }
    wanted |= {f"cp - MLP, {network}": gap[network] for network in EPOCHS}
    wanted["2: (cp - MLP, trained) - (cp - MLP, frozen)"] = minus(gap["trained"], gap["frozen"])
    records = []
    for text, values in wanted.items():
        mean, half = interval(values)
        records.append(
            {"in %": text.replace("linear", "MLP"), "mean": mean, "half": half, "seeds": len(values)}
        )
    return records


STEPS = {"runs": fine_tune_all, "claims": differences}

if __name__ == "__main__":
    command.run("fine_tuning")
