"""Heads on Tiny-ImageNet; the protocol is ``docs/experiments/tiny-imagenet.md``.

    python -m paper_figures.experiments.tiny_imagenet features   compute features of the images
    python -m paper_figures.experiments.tiny_imagenet tune       choose learning rates on validation rows
    python -m paper_figures.experiments.tiny_imagenet test       all results on test rows
    python -m paper_figures.experiments.tiny_imagenet claims     the differences that the claims are about

Reads ``data/tiny-imagenet``, with the folders train and val of its archive, and weights that `make data`
fetches. After an interruption, the same command resumes, except for the first. ``--jobs`` is the number of
parallel training runs, each on one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

import mumoe_tensor as mt
from mumoe_tensor.files import whole_file
from mumoe_tensor.ledger import Row
from mumoe_tensor.models import Head
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.readers import read_text
from mumoe_tensor.training import Dataset, TrainConfig, evaluate, read_npz, split, write_npz
from mumoe_tensor.training.head import train_head
from mumoe_tensor.training.images import LabelledFile, class_folders
from paper_figures.experiments import command
from paper_figures.experiments.embeddings import embed
from paper_figures.experiments.heads import coefficients, removal, use_of_experts
from paper_figures.experiments.tables import DATA, TABLES, difference, keep, table, tuned_rate

FOLDER, CLASSES = DATA / "tiny-imagenet", 200
VALIDATION = 0.1
#: Dense references for heads of equal size: a linear layer, and blocks of two layers.
LINEAR, TWICE, LARGE = 70_600, 141_200, 2_000_000
HIDDEN = {LINEAR: None, TWICE: 255, LARGE: 3616}
FORMATS: dict[str, tuple[Any, int]] = {
    "cp": ("cp", LINEAR),
    "tr": ("tr", LINEAR),
    "btt": ("btt", LINEAR),
    "shared low rank + cp": (mt.sum_of(mt.shared("lowrank"), "cp"), LINEAR),
    "hadamard": ("hadamard", LINEAR),  # has no rank; its parameters are in the table
    "shared dense + cp": ("shared-expert", TWICE),
    "cp, large": ("cp", LARGE),
}
ONE_LEVEL, TWO_LEVELS = ((8,), (32,), (128,)), ((8, 8), (16, 16), (32, 32), (64, 64))
MANY = ((256,), (1024,), (4096,))
#: Gates and norms to compare, all with CP of 128 experts.
GATES, NORMS, GATE_AT = ("entmax15", "softmax", "topk"), ("batch", "layer", "none"), (128,)
ACTIVE = 8
NULLS = ("random", "nearest_centres")
SEEDS, TUNING_SEED, TUNED_AT = range(5), 100, {LINEAR: (32,), TWICE: (32,), LARGE: (256,)}
LEARNING_RATES = (0.001, 0.003, 0.01)


@dataclass(frozen=True)
class Run:
    """One training run; without a format, of a dense head with this number of parameters."""

    format: str
    experts: tuple[int, ...] = ()
    gate: str = "entmax15"
    gate_norm: str = "batch"
    parameters: int = LINEAR
    seed: int = 0

    @property
    def key(self) -> Row:
        """The columns that identify the run."""
        return {
            "format": self.format, "experts": "x".join(map(str, self.experts)) or "none", "gate": self.gate,
            "gate_norm": self.gate_norm, "budget": self.parameters, "seed": self.seed,
        }  # fmt: skip

    @property
    def tuned_as(self) -> Run:
        """The run whose learning rate this run uses."""
        experts = TUNED_AT[self.parameters] if self.experts else ()
        return Run(self.format, experts, parameters=self.parameters, seed=TUNING_SEED)

    def build(self, data: Dataset) -> Head:
        """The head, initialized with the seed; a gate with centres is fitted to the data."""
        torch.manual_seed(self.seed)
        width = data.x.shape[1]
        if not self.experts:
            return Head(width, CLASSES, HIDDEN[self.parameters], format="linear")
        format, budget = FORMATS[self.format]
        gate: Any = self.gate if self.gate in GATES[:2] else {"name": self.gate, "k": ACTIVE}
        options: Any = {"format": format, "experts": self.experts, "gate": gate, "gate_norm": self.gate_norm}
        if mt.get_format(format).bonds(len(self.experts)):  # else it has no rank to fit
            options["parameters"] = budget
        head = Head(width, CLASSES, **options)
        if self.gate == "nearest_centres":
            head.centre_on(data.x)
            block: Any = head.body
            block.gate.fit((data.x - head.mean) / head.scale)
        return head


def runs() -> list[Run]:
    """All training runs of the protocol."""
    runs = [Run("dense", parameters=budget) for budget in HIDDEN]
    runs += [
        Run(format, experts, parameters=budget)
        for format, (_, budget) in FORMATS.items()
        for experts in (MANY if budget == LARGE else ONE_LEVEL + TWO_LEVELS)
    ]
    runs += [Run("cp", GATE_AT, gate, norm) for gate in GATES for norm in NORMS]
    runs += [Run("cp", experts, gate, "none") for gate in NULLS for experts in ONE_LEVEL]
    return [replace(run, seed=seed) for seed in SEEDS for run in dict.fromkeys(runs)]


# ---- data -------------------------------------------------------------------------------------------------


def images(part: str) -> list[LabelledFile]:
    """Training images in class folders, or test images with labels from their file."""
    files, classes = class_folders(FOLDER / "train")
    if part == "test":
        lines = read_text(FOLDER / "val" / "val_annotations.txt").splitlines()
        names = [line.split("\t")[:2] for line in lines]
        files = [(FOLDER / "val" / "images" / name, classes.index(label)) for name, label in names]
    return files


def class_names() -> list[str]:
    """The first word of each class name, in the order of the labels."""
    words = dict(line.split("\t", 1) for line in read_text(FOLDER / "words.txt").splitlines())
    return [words[name].split(",")[0] for name in class_folders(FOLDER / "train")[1]]


def make_features() -> None:
    """Compute features, unless they exist."""
    for part in ("training", "test"):
        path = DATA / f"tiny-imagenet-{part}.npz"
        if not path.exists():
            write_npz(embed(images(part)), path)


@cache
def parts() -> tuple[Dataset, Dataset]:
    """Features of training and of validation rows."""
    return split(read_npz(DATA / "tiny-imagenet-training.npz"), VALIDATION, seed=0)


@cache
def test_rows() -> Dataset:
    """Features of the test rows."""
    return read_npz(DATA / "tiny-imagenet-test.npz")


# ---- steps ------------------------------------------------------------------------------------------------


def trained(run: Run, learning_rate: float) -> tuple[Head, Row]:
    """A trained head, and the columns that describe its training."""
    torch.set_num_threads(1)
    training, validation = parts()
    head = run.build(training)
    config = TrainConfig(epochs=8, batch_size=512, learning_rate=learning_rate, seed=run.seed)
    epochs = train_head(head, training, validation, config)
    return head, {
        **run.key, "learning_rate": learning_rate, "parameters": num_parameters(head),
        "epoch": max(e.epoch for e in epochs if e.is_best),
        "seconds": round(sum(e.seconds for e in epochs), 1),
    }  # fmt: skip


def tune(run: Run, learning_rate: float) -> Row:
    """Accuracy on validation rows at one learning rate."""
    head, row = trained(run, learning_rate)
    loss, accuracy = evaluate(head, parts()[1])
    return {**row, "accuracy": accuracy, "loss": loss}


def test(run: Run, learning_rate: float) -> Row:
    """Metrics on test rows."""
    head, row = trained(run, learning_rate)
    data = test_rows()
    loss, accuracy = evaluate(head, data)
    row |= {"accuracy": accuracy, "loss": loss}
    if run.experts:
        row |= use_of_experts(head, data)
    if run.format == "cp" and len(run.experts) == 1:
        row |= removal(head, data, CLASSES, run.seed)
    if run == Run("cp", GATE_AT):
        keep_map(head, data)
    columns = ("active", "dead", "entropy", "polysemanticity", "polysemanticity_random")
    return dict.fromkeys(columns) | row


def keep_map(head: Head, data: Dataset) -> None:
    """Store each expert's mean coefficient over the images of each class, with the names of the classes."""
    (a,) = coefficients(head, data)
    of_class = torch.stack([a[data.y == label].mean(0) for label in range(CLASSES)])
    with whole_file(TABLES / "tiny_imagenet_map.npz") as file:
        np.savez_compressed(file, coefficients=of_class.numpy(), classes=np.array(class_names()))


def tune_all(jobs: int | str) -> None:
    """Try every learning rate of every kind of head."""
    tuned = dict.fromkeys(run.tuned_as for run in runs())
    tasks = [(run.key | {"learning_rate": rate}, (run, rate)) for run in tuned for rate in LEARNING_RATES]
    keep("tiny_imagenet_tuning", tasks, tune, jobs)


def learning_rate(run: Run) -> float:
    """The rate with the highest validation accuracy."""
    return tuned_rate(table("tiny_imagenet_tuning"), run.tuned_as.key, LEARNING_RATES)


def test_all(jobs: int | str) -> None:
    """Train all runs with the rates of `tune_all`, and evaluate them on the test rows."""
    keep("tiny_imagenet", [(run.key, (run, learning_rate(run))) for run in runs()], test, jobs)


def claims() -> list[Row]:
    """The paired differences that the claims of the protocol are about: mean and 95 % interval."""
    rows = table("tiny_imagenet")
    records: list[Row] = []

    def values(run: Run, column: str) -> dict[int, float]:
        key = {name: value for name, value in run.key.items() if name != "seed"}
        return {row["seed"]: row[column] for row in rows.of(**key)}

    def compare(
        claim: int, text: str, one: dict[int, float], other: dict[int, float], unit: float = 1
    ) -> None:
        records.append({"claim": claim, "difference": text, **difference(one, other, unit)})

    for run in runs():
        if run.seed or not run.experts or (run.gate, run.gate_norm) != ("entmax15", "batch"):
            continue
        dense = values(Run("dense", parameters=run.parameters), "accuracy")
        text = f"accuracy in %, {run.format} of {run.key['experts']} experts - dense"
        compare(1, text, values(run, "accuracy"), dense, 100)
    most, least = Run("cp", ONE_LEVEL[-1]), Run("cp", ONE_LEVEL[0])
    text = f"polysemanticity, {most.key['experts']} experts - {least.key['experts']}"
    compare(2, text, values(most, "polysemanticity"), values(least, "polysemanticity"))
    for experts in ONE_LEVEL:
        run = Run("cp", experts)
        trained_gate = values(run, "polysemanticity")
        dealt = values(run, "polysemanticity_random")
        compare(2, f"polysemanticity of {experts[0]} experts, trained - dealt at random", trained_gate, dealt)
        for null in NULLS:
            without = values(replace(run, gate=null, gate_norm="none"), "polysemanticity")
            compare(
                2, f"polysemanticity of {experts[0]} experts, trained - {null} gate", trained_gate, without
            )
    for norm in NORMS:
        base = Run("cp", GATE_AT, gate_norm=norm)
        for gate in GATES[1:]:
            other = replace(base, gate=gate)
            for column, unit in (("polysemanticity", 1), ("accuracy", 100)):
                text = f"{column}{' in %' * (unit > 1)}, norm {norm}, entmax15 - {gate}"
                compare(3, text, values(base, column), values(other, column), unit)
    for norm in NORMS[:2]:
        for column in ("entropy", "dead"):
            with_norm, without = (values(Run("cp", GATE_AT, gate_norm=x), column) for x in (norm, "none"))
            compare(4, f"{column}, entmax15, norm {norm} - none", with_norm, without)
    return records


STEPS = {"features": make_features, "tune": tune_all, "test": test_all, "claims": claims}

if __name__ == "__main__":
    command.run("tiny_imagenet")
