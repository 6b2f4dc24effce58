"""Heads trained together with their backbone, on few images: see ``docs/experiments/heads.md``.

    python -m paper_figures.experiments.fine_tuning runs      all training runs, on validation rows
    python -m paper_figures.experiments.fine_tuning claims    the differences that the claims are about

After an interruption, the same command resumes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from mumoe_tensor.interval import interval
from mumoe_tensor.ledger import Row
from mumoe_tensor.models import Head, load_backbone
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.training import Dataset, TrainConfig, evaluate, extract
from mumoe_tensor.training.head import fine_tune, train_head
from paper_figures.experiments import command
from paper_figures.experiments.heads import HIDDEN, TRAINING, images
from paper_figures.experiments.tables import DATA, grouped, keep, table, tuned_rate

TABLE = "heads_fine_tuning"
ROWS, VALIDATED, BATCH = 400, 2_000, 50
EXPERTS = 32
FORMATS = ("linear", "cp")
#: Passes over the rows, and candidate learning rates, with the network frozen and trained.
EPOCHS = {"frozen": 40, "trained": 5}
RATES = {"frozen": (0.001, 0.003, 0.01), "trained": (0.0003, 0.001, 0.003)}
SEEDS, TUNING_SEED = range(3), 100
KINDS = tuple(product(EPOCHS, FORMATS))
#: Momentum of batch norm, torch's default. The network's default, 0.01, suits many more steps.
MOMENTUM = 0.1


def load_network() -> nn.Module:
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


def fit(network: str, format: str, seed: int, learning_rate: float) -> Row:
    """Train a head, with or without the network; return its final accuracy on validation rows."""
    torch.set_num_threads(1)
    training, validation = parts()
    backbone, is_trained = load_network(), network == "trained"
    features, data = extract(backbone, training), training
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if format == "linear" else {"experts": EXPERTS, "parameters": "match"}
    head = Head(features.x.shape[1], 10, HIDDEN, format=format, **options)
    config = TrainConfig(
        epochs=EPOCHS[network], batch_size=BATCH, learning_rate=learning_rate, seed=seed,
        keep="last", evaluate_every=EPOCHS[network] * (ROWS // BATCH), evaluation_batch_size=200,
    )  # fmt: skip
    if is_trained:
        *_, last = fine_tune(backbone, head, training, validation, config)
    else:
        data = features
        *_, last = train_head(head, features, extract(backbone, validation), config)
    model = nn.Sequential(backbone, head) if is_trained else head
    return {
        "network": network, "format": format, "seed": seed, "learning_rate": learning_rate,
        "parameters": num_parameters(head), "accuracy": last.accuracy, "loss": last.validation_loss,
        "training_accuracy": evaluate(model, data, batch_size=200)[1], "seconds": round(last.seconds, 1),
    }  # fmt: skip


def rate(network: str, format: str) -> float:
    """The learning rate with the highest validation accuracy."""
    key = {"network": network, "format": format, "seed": TUNING_SEED}
    return tuned_rate(table(TABLE), key, RATES[network])


def fine_tune_all(jobs: int | str) -> None:
    """Try the learning rates, then train each kind of head with its best rate."""

    def run(cases: list[tuple[str, str, int, float]]) -> None:
        columns = ("network", "format", "seed", "learning_rate")
        keep(TABLE, [(dict(zip(columns, case, strict=True)), case) for case in cases], fit, jobs)

    run([(*kind, TUNING_SEED, each) for kind in KINDS for each in RATES[kind[0]]])
    run([(*kind, seed, rate(*kind)) for seed in SEEDS for kind in KINDS])


def differences() -> list[Row]:
    """The paired differences that the claims are about: mean in % and half-width of the 95 % interval."""
    rows = sorted((row for row in table(TABLE) if row["seed"] in SEEDS), key=lambda row: row["seed"])
    accuracy = {
        kind: np.array([100 * row["accuracy"] for row in group])
        for kind, group in grouped(rows, "network", "format").items()
    }
    gap = {network: accuracy[network, "cp"] - accuracy[network, "linear"] for network in EPOCHS}
    wanted = {f"accuracy, {network}, {format}": accuracy[network, format] for network, format in KINDS}
    wanted |= {
        f"1: trained - frozen, {format}": accuracy["trained", format] - accuracy["frozen", format]
        for format in FORMATS
    }
    wanted |= {f"cp - MLP, {network}": gap[network] for network in EPOCHS}
    wanted["2: (cp - MLP, trained) - (cp - MLP, frozen)"] = gap["trained"] - gap["frozen"]
    records = []
    for text, values in wanted.items():
        mean, half = interval(values.tolist())
        text = text.replace("linear", "MLP")
        records.append({"in %": text, "mean": mean, "half": half, "seeds": len(values)})
    return records


STEPS = {"runs": fine_tune_all, "claims": differences}

if __name__ == "__main__":
    command.run("fine_tuning")
