"""Heads on Fashion-MNIST; the protocol is ``docs/experiments/heads.md``.

    python -m paper_figures.experiments.heads features    compute features of training and validation images
    python -m paper_figures.experiments.heads tune        choose learning rates on validation rows
    python -m paper_figures.experiments.heads causes      try other settings on validation rows, afterwards
    python -m paper_figures.experiments.heads test        all results on test rows
    python -m paper_figures.experiments.heads claims      the differences that the claims are about

Needs `make data`. After an interruption, the same command resumes, except for the first. ``--jobs`` is the
number of parallel training runs, each on one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor import files
from mumoe_tensor.analysis import TopInputs, Usage, ablation_effects, polysemanticity, watch_coefficients
from mumoe_tensor.ledger import Row
from mumoe_tensor.measure.environment import environment_text
from mumoe_tensor.models import Head, load_backbone
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.training import Dataset, TrainConfig, evaluate, extract, read_idx, read_npz, write_npz
from mumoe_tensor.training.head import train_head
from mumoe_tensor.training.log import Evaluation
from paper_figures.common import table as as_text
from paper_figures.experiments import command, tables
from paper_figures.experiments.tables import (
    DATA,
    TABLES,
    difference,
    go_through,
    keep,
    means,
    table,
    tuned_rate,
)

TRAINING, VALIDATION = 12_000, 6_000
HIDDEN, SINGLE_RANK = 512, 64
#: Ranks of Tucker. By default, both layers would have the output rank 3, which suits 10 classes.
TUCKER_RANK = (8, None, 64)
FORMATS = ("cp", "tr", "tucker", "hadamard")
MATCHED = ((8,), (32,), (128,), (256,))
LEVELS = ((16, 16), (32, 32))
SINGLE = (8, 16, 32, 64, 128, 256, 512, 1024)
GATE_AT, LOOKED_AT = 128, (32, 256)
SEEDS, TUNING_SEED = range(5), 100
LEARNING_RATES = (0.001, 0.003, 0.01)
#: Maximum number of experts to remove; if there are more, this many are drawn at random.
MOST_REMOVED = 128
#: Changes of one setting at a time, for CP blocks with 32 experts; the protocol's settings come first.
CAUSES: dict[str, dict[str, Any]] = {
    "as in the protocol": {},
    "dense MLP": {"head": {"format": "linear", "parameters": None}},
    "learning rate 0.0003": {"training": {"learning_rate": 0.0003}},
    "weight decay 0.3": {"training": {"weight_decay": 0.3}},
    "layer norm of the logits": {"head": {"gate_norm": "layer"}},
    "no norm of the logits": {"head": {"gate_norm": "none"}},
    "published initialisation": {"head": {"init": "published"}},
    "half the parameters": {"head": {"parameters": 84_741}},
    "a quarter of the parameters": {"head": {"parameters": 42_370}},
}
CAUSE_SEEDS = range(100, 103)
#: Number of experts whose top inputs are shown, and number of inputs for each.
SHOWN, IMAGES = 10, 8


@dataclass(frozen=True)
class Run:
    """One training."""

    kind: str
    format: str
    experts: tuple[int, ...] = ()
    gate: str = "entmax15"
    gate_norm: str = "batch"
    seed: int = 0

    @property
    def key(self) -> Row:
        """The columns that identify the run."""
        return {
            "kind": self.kind, "format": self.format, "experts": "x".join(map(str, self.experts)) or "none",
            "gate": self.gate, "gate_norm": self.gate_norm, "seed": self.seed,
        }  # fmt: skip

    @property
    def tuned_as(self) -> Run:
        """The run whose learning rate this run uses."""
        experts = () if self.format == "linear" else (32,) if self.kind == "matched" else (GATE_AT,)
        return Run(self.kind, self.format, experts, seed=TUNING_SEED)

    def build(self, features: int, classes: int) -> Head:
        """The head, initialized with the seed."""
        options: Any = {"format": self.format, "hidden": HIDDEN if self.kind == "matched" else None}
        if self.format != "linear":
            options |= {"experts": self.experts, "gate": self.gate, "gate_norm": self.gate_norm}
            matched = {"rank": TUCKER_RANK if self.format == "tucker" else None, "parameters": "match"}
            options |= {"rank": SINGLE_RANK} if self.kind == "single" else matched
        torch.manual_seed(self.seed)
        return Head(features, classes, **options)


def runs() -> list[Run]:
    """All training runs of the protocol."""
    runs = [Run("single", "linear"), Run("matched", "linear")]
    runs += [Run("matched", *each) for each in product(FORMATS, MATCHED)]
    runs += [Run("matched", *each) for each in product(FORMATS[:2], LEVELS)]
    runs += [Run("single", "cp", (n,)) for n in SINGLE]
    gates = product(("entmax15", "softmax"), ("batch", "layer", "none"))
    runs += [Run("single", "cp", (GATE_AT,), *each) for each in gates]
    return [replace(run, seed=seed) for seed in SEEDS for run in dict.fromkeys(runs)]


@cache
def parts() -> tuple[Dataset, Dataset]:
    """Features of training and of validation rows."""
    data = read_npz(DATA / "heads-training.npz")
    rows = torch.arange(len(data))
    return data.rows(rows[:TRAINING]), data.rows(rows[TRAINING:])


@cache
def test_rows() -> Dataset:
    """Features of the test rows."""
    return read_npz(DATA / "heads-test.npz")


def images(part: str) -> Dataset:
    """Images of Fashion-MNIST: those for training and validation, or ``"t10k"``."""
    folder = DATA / "fashion-mnist"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
    if part == "t10k":
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.rows(order[: TRAINING + VALIDATION])


def make_features(part: str, path: Path) -> None:
    """Compute features, unless they exist."""
    if not path.exists():
        (weights,) = (DATA / "efficientnet-lite0").glob("*.pth")
        write_npz(extract(load_backbone("efficientnet-lite0", weights), images(part)), path)


def fit(head: Head, rows: Dataset | None = None, **options: Any) -> tuple[Row, list[Evaluation]]:
    """Train a head on one thread; its results on rows, by default for validation, and all evaluations."""
    torch.set_num_threads(1)
    training, validation = parts()
    config = TrainConfig(**{"epochs": 10, "batch_size": 256, **options})
    epochs = train_head(head, training, validation, config)
    loss, accuracy = evaluate(head, rows or validation)
    best = max(epoch.epoch for epoch in epochs if epoch.is_best)
    row = {"parameters": num_parameters(head), "accuracy": accuracy, "loss": loss, "epoch": best}
    return row, epochs


def trained(
    run: Run, learning_rate: float, rows: Dataset | None = None
) -> tuple[Head, Row, list[Evaluation]]:
    """The head of a run, its results on rows, and the evaluations of its training."""
    head = run.build(parts()[0].x.shape[1], 10)
    row, epochs = fit(head, rows, learning_rate=learning_rate, seed=run.seed)
    return head, {**run.key, "learning_rate": learning_rate, **row}, epochs


def tune(run: Run, learning_rate: float) -> Row:
    """Accuracy on validation rows at one learning rate."""
    return trained(run, learning_rate)[1]


def test(run: Run, learning_rate: float) -> tuple[Row, list[Row], dict[str, Any]]:
    """Metrics on test rows; if requested, also loads of experts and top inputs of some experts."""
    data = test_rows()
    head, row, epochs = trained(run, learning_rate, data)
    del row["epoch"]
    row |= dict.fromkeys(("active", "dead", "entropy", "polysemanticity", "polysemanticity_random"))
    row["seconds"] = round(sum(epoch.seconds for epoch in epochs), 2)
    loads: list[Row] = []
    top: dict[str, Any] = {}
    if run.format != "linear":
        row |= use_of_experts(head, data)
        if run.kind == "single":
            row |= removal(head, data, 10, run.seed)
    if run == Run("single", "cp", run.experts, seed=run.seed) and run.experts[0] in LOOKED_AT:
        (n,), (a,) = run.experts, coefficients(head, data)
        sorted_loads = usage_of(a).load.sort(descending=True).values.tolist()
        loads = [
            {"experts": n, "seed": run.seed, "place": place, "load": load}
            for place, load in enumerate(sorted_loads, 1)
        ]
        if run.seed == 0:
            of_inputs = TopInputs(n, IMAGES)
            of_inputs.update(a)
            top = {f"indices_{n}": of_inputs.indices[:SHOWN].numpy()}
    return row, loads, top


@torch.no_grad()
def coefficients(head: Head, data: Dataset) -> list[Tensor]:
    """The coefficients of each level, of shape (rows, experts)."""
    seen: list[Tensor] = []
    with watch_coefficients(head, lambda name, a: seen.extend(a)):
        head(data.x)
    return seen


def usage_of(a: Tensor) -> Any:
    """Statistics of the use of experts, from their coefficients."""
    usage = Usage(a.shape[-1])
    usage.update(a)
    return usage.statistics()


def use_of_experts(head: Head, data: Dataset) -> Row:
    """Shares of active and of dead experts and entropy of their use, averaged over levels."""
    levels = [usage_of(a) for a in coefficients(head, data)]
    return {
        "active": float(np.mean([level.active for level in levels])),
        "dead": sum(level.dead for level in levels) / sum(head.config["experts"]),
        "entropy": float(np.mean([level.entropy for level in levels])),
    }


def removal(head: Head, data: Dataset, classes: int, seed: int) -> Row:
    """Polysemanticity of the experts of one level, and with coefficients permuted among experts at random."""
    (n,) = head.config["experts"]
    removed = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:MOST_REMOVED].tolist()
    values = {}
    for column, random_seed in (("polysemanticity", None), ("polysemanticity_random", seed)):
        effects = ablation_effects(
            head, head, [(data.x, data.y)], classes, experts=removed, random_seed=random_seed
        )
        values[column] = float(polysemanticity(effects).nanmean())
    return values


def tune_all(jobs: int | str) -> None:
    """Try every learning rate of every kind of head."""
    tuned = dict.fromkeys(run.tuned_as for run in runs())
    tasks = [(run.key | {"learning_rate": rate}, (run, rate)) for run in tuned for rate in LEARNING_RATES]
    keep("heads_tuning", tasks, tune, jobs)


def learning_rate(run: Run) -> float:
    """The rate with the highest validation accuracy."""
    return tuned_rate(table("heads_tuning"), run.tuned_as.key, LEARNING_RATES)


def test_all(jobs: int | str) -> None:
    """Train all runs with the rates of `tune_all`, and evaluate them on the test rows."""
    tasks = [(run, learning_rate(run)) for run in runs()]
    make_features("t10k", DATA / "heads-test.npz")
    rows, loads = table("heads"), table("heads_load")
    where = environment_text()
    left = [task for task in tasks if not rows.has(**task[0].key)]
    for row, load, top in go_through(left, test, jobs):
        # The row is written last: if it exists, so do the others.
        if load:
            loads.add(load)
        if top:
            keep_images(top)
        rows.add([row | {"measured": where}])


def try_cause(name: str, seed: int) -> Row:
    """Validation accuracy of a matched CP block of 32 experts, with one setting changed."""
    changed = CAUSES[name]
    options = {"hidden": HIDDEN, "experts": 32, "parameters": "match"} | changed.get("head", {})
    rate = learning_rate(Run("matched", options.get("format", "cp"), (32,)))
    torch.manual_seed(seed)
    head = Head(parts()[0].x.shape[1], 10, **options)
    row, epochs = fit(head, **{"learning_rate": rate, "seed": seed, **changed.get("training", {})})
    end = {"training_loss_at_the_end": epochs[-1].loss, "accuracy_at_the_end": epochs[-1].accuracy}
    return {"cause": name, "seed": seed, **row, **end}


def find_causes(jobs: int | str) -> None:
    """Search, on validation rows, for causes of the difference between blocks of experts and the MLP."""
    cases = product(CAUSES, CAUSE_SEEDS)
    keep(
        "heads_causes",
        [({"cause": name, "seed": seed}, (name, seed)) for name, seed in cases],
        try_cause,
        jobs,
    )


def claims(name: str = "heads") -> list[Row]:
    """The paired differences that the claims of the protocol are about: mean and 95 % interval.

    Also the differences in loss between blocks and the MLP, which no claim is about.
    """
    rows, records = table(name), []

    def values(column: str, kind: str, format: str = "cp", **key: Any) -> dict[int, float]:
        columns = {"kind": kind, "format": format, "gate": "entmax15", "gate_norm": "batch"} | key
        return {row["seed"]: row[column] for row in rows.of(**columns)}

    def compare(
        claim: int | str, text: str, one: dict[int, float], other: dict[int, float], unit: float = 1
    ) -> None:
        records.append({"claim": claim, "difference": text, **difference(one, other, unit)})

    def blocks(claim: int | str, column: str, text: str, unit: float = 1) -> None:
        mlp = values(column, "matched", "linear")
        for format, (n,) in product(FORMATS, MATCHED):
            mixture = values(column, "matched", format, experts=n)
            compare(claim, f"{text}, {format} of {n} experts - MLP", mixture, mlp, unit)

    blocks(1, "accuracy", "accuracy in %", 100)
    most, least = (values("polysemanticity", "single", experts=n) for n in (SINGLE[-1], SINGLE[0]))
    compare(2, f"polysemanticity, {SINGLE[-1]} experts - {SINGLE[0]}", most, least)
    for n in SINGLE:
        one, other = (values(f"polysemanticity{end}", "single", experts=n) for end in ("", "_random"))
        compare(2, f"polysemanticity of {n} experts, trained gate - random gate", one, other)
    of_gates = partial(values, kind="single", experts=GATE_AT)
    for norm, (column, unit) in product(
        ("none", "layer", "batch"), (("polysemanticity", 1), ("accuracy", 100))
    ):
        one, other = (of_gates(column, gate=gate, gate_norm=norm) for gate in ("entmax15", "softmax"))
        compare(3, f"{column}{' in %' * (unit > 1)}, norm {norm}, entmax15 - softmax", one, other, unit)
    for norm, column in product(("layer", "batch"), ("entropy", "dead")):
        one, other = (of_gates(column, gate_norm=each) for each in (norm, "none"))
        compare(4, f"{column}, entmax15, norm {norm} - none", one, other)
    for format, levels in product(FORMATS[:2], LEVELS):
        text = "x".join(map(str, levels))
        one, other = (values("accuracy", "matched", format, experts=each) for each in (text, 256))
        compare(5, f"accuracy in %, {format} of {text} - 256", one, other, 100)
    blocks("no", "loss", "loss")
    return records


def print_claims(table: str = "heads") -> None:
    """Print the differences, and means over seeds for the causes and for CP layers.

    Parameters
    ----------
    table : {"heads", "heads_repeated"}
    """
    causes, rows = tables.table("heads_causes"), tables.table(table)
    single = rows.of(kind="single", format="cp", gate="entmax15", gate_norm="batch")
    for shown in (
        claims(table),
        means(causes, "cause", ("parameters", "accuracy", "accuracy_at_the_end")),
        means(single, "experts", ("dead", "polysemanticity", "polysemanticity_random")),
    ):
        print(as_text(shown), end="\n\n")


def keep_images(top: dict[str, Any]) -> None:
    """Store the images of the top inputs with their labels and indices."""
    path = TABLES / "heads_top_inputs.npz"
    arrays = dict(np.load(path)) if path.exists() else {}
    data = images("t10k")
    for name, indices in top.items():
        n = name.removeprefix("indices_")
        pixels = (data.x[indices.clip(0)] * 255).round().to(torch.uint8).numpy()
        pixels[indices < 0] = 255
        labels = np.where(indices < 0, -1, data.y[indices.clip(0)].numpy())
        arrays |= {name: indices, f"images_{n}": pixels, f"labels_{n}": labels}
    with files.whole_file(path) as file:
        np.savez_compressed(file, **arrays)


STEPS = {
    "features": lambda: make_features("train", DATA / "heads-training.npz"),
    "tune": tune_all,
    "test": test_all,
    "causes": find_causes,
    "claims": print_claims,
}

if __name__ == "__main__":
    command.run("heads")
