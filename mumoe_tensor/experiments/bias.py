"""Correction of a model's errors on a subpopulation by expert biases, compared with other methods.

The protocol is in ``docs/experiments/bias.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import nan
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis import edit_bias, fairness, mean_coefficients, remove_edit
from mumoe_tensor.configs.bias import Recipe
from mumoe_tensor.interval import interval
from mumoe_tensor.jobs import side_by_side
from mumoe_tensor.ledger import Ledger, Row
from mumoe_tensor.nn import MuMoE
from mumoe_tensor.nn.weights import load_tensors, read_weights, write_tensors
from mumoe_tensor.progress import Progress
from mumoe_tensor.readers import reading
from mumoe_tensor.training import Dataset, TrainConfig, train
from mumoe_tensor.training.attributes import Population, Task

#: Metrics of every model and correction; along a curve, only the first three.
METRICS = ("accuracy", "target", "worst", "deviation", "equal_opportunity")
COLUMNS: dict[str, type] = {
    "run": str, "task": str, "method": str, "seed": int, "split": str, "setting": str, "value": float,
    "chosen": int, "members": int, "loss": float, **dict.fromkeys(METRICS, float),
}  # fmt: skip
#: Models to train, and for each correction the model it corrects.
ARCHITECTURES = ("linear", "high-rank linear", "mumoe")
DEBIASED = ("oversampling", "adversarial")
MODELS = (*ARCHITECTURES, *DEBIASED)
CORRECTIONS = {
    "edit": "mumoe",
    "threshold": "mumoe",
    "linear threshold": "linear",
    "group threshold": "mumoe",
}
METHODS = (*MODELS, *CORRECTIONS)
#: Seed of the runs that choose settings.
TUNING_SEED = 100
#: Largest loss of accuracy in the trade-off area, and the number of grid steps up to it.
LARGEST_LOSS, STEPS = 0.25, 250
#: Differences that the claims are about: the metric and two methods.
COMPARED = (
    ("target", "edit", "mumoe"),
    ("worst", "edit", "mumoe"),
    ("area", "edit", "threshold"),
    ("area", "edit", "linear threshold"),
    ("worst", "edit", "threshold"),
    ("worst", "edit", "oversampling"),
    ("worst", "edit", "adversarial"),
)


class Experiment:
    """One task: train models and choose settings on validation rows, then read the test rows once.

    Parameters
    ----------
    task : Task
    recipe : Recipe
    folder : Path
        Receives ``results.csv`` and the trained models. Runs with results in it are not repeated.
    """

    def __init__(self, task: Task, recipe: Recipe, folder: Path):
        self.task, self.recipe, self.folder = task, recipe, folder
        self.ledger = Ledger(folder / "results.csv", COLUMNS)

    def validate(self, progress: Progress | None = None, jobs: int | str = 1) -> None:
        """Choose settings, train every model with every seed, and evaluate them on validation rows.

        Parameters
        ----------
        progress : callable, optional
        jobs : int or str, default 1
            Number of parallel training runs; see `.side_by_side`.
        """
        # Debiased models start from the settings of the other models.
        for runs in (self._tuning(ARCHITECTURES), self._tuning(DEBIASED), self._seeds("validation")):
            self._do([*runs], progress, jobs)

    def test(self, progress: Progress | None = None, jobs: int | str = 1) -> None:
        """Evaluate all models and corrections on test rows, with the settings chosen on validation rows.

        Raises
        ------
        ValueError
            If `validate` has not finished.
        """
        if missing := [
            run for run, _ in self._seeds("validation") if not self.ledger.has(run=self._key(run))
        ]:
            raise ValueError(f"validation must be finished before test; {missing[0]!r} has no results yet.")
        self._do([*self._seeds("test")], progress, jobs)

    def rows(self, split: str) -> list[Row]:
        """The result rows of this task, for the seeds of the recipe.

        Parameters
        ----------
        split : str
            ``"validation"`` or ``"test"``.
        """
        rows = self.ledger.of(task=self.task.name, split=split)
        return [row for row in rows if row["seed"] < self.recipe.seeds]

    # ---- runs ---------------------------------------------------------------------------------------------

    def _do(
        self, runs: Sequence[tuple[str, Callable[[], list[Row]]]], progress: Progress | None, jobs: int | str
    ) -> None:
        left = [(run, call) for run, call in runs if not self.ledger.has(run=self._key(run))]
        results = side_by_side([call for _, call in left], jobs)
        for done, (number, rows) in enumerate(results, 1 + len(runs) - len(left)):
            run, _ = left[number]
            self.ledger.add({"run": self._key(run), **row} for row in rows)
            if progress is not None:
                progress(done, len(runs), run)

    def _key(self, run: str) -> str:
        return f"{self.task.name}: {run}"

    def _grid(self, method: str) -> tuple[str, Sequence[float]]:
        """The setting of a method that is chosen, and its candidate values."""
        if method in ARCHITECTURES:
            return "learning rate", self.recipe.learning_rates
        debiased = {
            "oversampling": ("repetitions", self.recipe.repetitions),
            "adversarial": ("alpha", self.recipe.alphas),
        }
        return debiased[method]

    def _tuning(self, methods: Sequence[str]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        """The runs by which the settings of these methods are chosen."""
        for method in methods:
            setting, values = self._grid(method)
            for value in values:
                yield f"{method}, {setting} {value:g}", partial(self._tuned, method, setting, value)

    def _tuned(self, method: str, setting: str, value: float) -> list[Row]:
        model, loss = self._trained(method, TUNING_SEED, value)
        logits = logits_of(model, self.task.validation.x)
        return [self._row(method, TUNING_SEED, "tuning", setting, value, loss, logits)]

    def _seeds(self, split: str) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        for seed, method in product(range(self.recipe.seeds), MODELS):
            yield f"{method}, seed {seed}, {split}", partial(self._judged, method, seed, split)

    def _chosen(self, method: str) -> float:
        rows = self.ledger.of(task=self.task.name, method=method, split="tuning")
        if method in ARCHITECTURES:
            return float(min(rows, key=lambda row: row["loss"])["value"])
        return best(rows)

    def _trained(self, method: str, seed: int, value: float) -> tuple[nn.Module, float]:
        """A model and its validation loss; NaN for a model that was trained on another loss."""
        if method == "adversarial":
            linear, _ = self._trained("linear", seed, self._chosen("linear"))
            return debiased(self.task, linear, value, seed, self.recipe), nan
        if method == "oversampling":
            return fit(self.task, "mumoe", self._chosen("mumoe"), seed, self.recipe, repetitions=int(value))
        return fit(self.task, method, value, seed, self.recipe)

    def _judged(self, method: str, seed: int, split: str) -> list[Row]:
        """Result rows for the model with this seed, uncorrected and with each correction, on a split."""
        value = self._chosen(method)
        path = self.folder / "models" / f"{self._key(f'{method} {seed}').replace(' ', '-')}.safetensors"
        loss = nan
        if split == "validation":
            model, loss = self._trained(method, seed, value)
            write_tensors(path, model.state_dict(), {})
        else:
            # Version 0.1 wrote .pt.
            path = path if path.exists() else path.with_suffix(".pt")
            model, tensors = self._built(method), read_weights(path)
            with reading(path):
                load_tensors(model, tensors)
        rows: Population = getattr(self.task, split)
        logits = logits_of(model, rows.x)
        records = [self._row(method, seed, split, self._grid(method)[0], value, loss, logits)]
        corrections = [name for name, corrected in CORRECTIONS.items() if corrected == method]
        for name in sorted(corrections):
            direction = direction_of(name, self.task, model, rows)
            curve = []
            for s in self.recipe.strengths:
                figures = rates(self.task, rows, moved(self.task, logits, s * direction))
                curve.append(self._named(name, seed, split, "strength", s, figures) | {"chosen": 0})
            strength = best(curve)
            if split == "test":
                key = {"task": self.task.name, "method": name, "seed": seed, "split": "validation"}
                (row,) = self.ledger.of(**key, chosen=1)
                strength = row["value"]
            corrected = moved(self.task, logits, strength * direction)
            chosen = self._row(name, seed, split, "strength", strength, nan, corrected)
            records += [chosen if row["value"] == strength else row for row in curve]
        return records

    def _built(self, method: str) -> nn.Module:
        features, outputs = self.task.training.x.shape[1], self.task.training.y.shape[1]
        if method == "adversarial":
            return nn.Linear(features, 1)
        architecture = method if method in ARCHITECTURES else "mumoe"
        return build(architecture, features, outputs, self.recipe)

    def _row(
        self, method: str, seed: int, split: str, setting: str, value: float, loss: float, logits: Tensor
    ) -> Row:
        """All metrics of a model, or of a correction at its chosen strength."""
        rows: Population = self.task.test if split == "test" else self.task.validation
        predictions = (logit_of(self.task, logits) > 0).long()
        scores = fairness(predictions, self.task.labels(rows), rows.group, self.task.target)
        figures = {"loss": loss, **{name: getattr(scores, name) for name in METRICS}}
        return self._named(method, seed, split, setting, value, figures)

    def _named(
        self, method: str, seed: int, split: str, setting: str, value: float, figures: dict[str, float]
    ) -> Row:
        rows: Population = self.task.test if split == "test" else self.task.validation
        return {
            "task": self.task.name, "method": method, "seed": seed, "split": split, "setting": setting,
            "value": float(value), "chosen": 1, "members": int(self.task.members(rows).sum()),
            **{name: round(figures.get(name, nan), 5) for name in ("loss", *METRICS)},
        }  # fmt: skip


# ---- models -----------------------------------------------------------------------------------------------


def build(architecture: str, features: int, outputs: int, recipe: Recipe) -> nn.Module:
    """An untrained model of an architecture."""
    if architecture == "linear":
        return nn.Linear(features, outputs)
    if architecture == "high-rank linear":
        return nn.Sequential(nn.Linear(features, recipe.hidden), nn.Linear(recipe.hidden, outputs))
    return MuMoE(features, outputs, recipe.experts, "cp", recipe.rank, batch_hint=recipe.batch_size)


def fit(
    task: Task, architecture: str, learning_rate: float, seed: int, recipe: Recipe, repetitions: int = 1
) -> tuple[nn.Module, float]:
    """Train a model, repeating the rows of the subpopulation; return it and its lowest validation loss."""
    training = task.training
    if repetitions > 1:
        members = task.members(training)
        counts = torch.where(members, repetitions, 1)
        training = training.rows(torch.repeat_interleave(torch.arange(len(training)), counts))
    # A `Dataset` has one label per row: the index of the row, with which the loss looks up its labels.
    labels = torch.cat([training.y, task.validation.y]).float()
    numbers = torch.arange(len(labels))
    data = Dataset(training.x, numbers[: len(training)])
    validation = Dataset(task.validation.x, numbers[len(training) :])

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels[rows])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(architecture, training.x.shape[1], labels.shape[1], recipe)
    config = TrainConfig(recipe.epochs, recipe.batch_size, learning_rate, seed=seed)
    history = train(model, data, validation, config, loss=loss)
    return model, min(epoch.validation_loss for epoch in history)


def debiased(task: Task, linear: nn.Module, alpha: float, seed: int, recipe: Recipe) -> nn.Linear:
    """The task's output of a linear model, trained further against an adversary (fairlearn)."""
    from fairlearn.adversarial import AdversarialFairnessClassifier

    training = task.training
    with torch.random.fork_rng():
        model = nn.Linear(training.x.shape[1], 1)
        with torch.no_grad():
            for own, given in zip(model.parameters(), linear.parameters(), strict=True):
                own.copy_(given[[task.output]])
        AdversarialFairnessClassifier(
            backend="torch",
            predictor_model=nn.Sequential(model, nn.Sigmoid()),
            adversary_model=[],
            constraints="equalized_odds",
            learning_rate=0.01,
            alpha=alpha,
            epochs=4,
            batch_size=recipe.batch_size,
            shuffle=True,
            random_state=seed,
        ).fit(training.x.numpy(), task.labels(training).numpy(), sensitive_features=training.group.numpy())
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of all rows, of shape (rows, outputs)."""
    return torch.cat([model(part) for part in x.split(8192)])


# ---- corrections ------------------------------------------------------------------------------------------


def direction_of(correction: str, task: Task, model: nn.Module, rows: Population) -> Tensor:
    """The amounts that a correction of strength 1 adds to the logits of the task, of shape (rows,).

    All have the same scale: the logit of the subpopulation's training rows moves by 1 on average.
    """
    label, group = task.target
    toward = 2 * label - 1
    if correction == "edit":
        members = task.training.x[task.members(task.training)]
        means = mean_coefficients(model, model, members.split(8192))
        before = logits_of(model, rows.x)
        edit_bias(model, "subpopulation", means, task.output, toward / float(means[0].square().sum()))
        after = logits_of(model, rows.x)
        remove_edit(model, "subpopulation")
        return (after - before)[:, task.output]
    if correction == "group threshold":
        return toward * (rows.group == group).float()
    return torch.full((len(rows),), float(toward))


def logit_of(task: Task, logits: Tensor) -> Tensor:
    """The logits of the task, of shape (rows,). They are the only logits of a debiased model."""
    return logits[:, task.output if logits.shape[1] > 1 else 0]


def rates(task: Task, rows: Population, logits: Tensor) -> dict[str, float]:
    """Accuracies on all rows, on the target subpopulation and on the worst subpopulation.

    The same values as `fairness`, which is too slow for a curve.
    """
    labels = task.labels(rows)
    right = (logit_of(task, logits) > 0).long() == labels
    members = {
        (label, group): right[(labels == label) & (rows.group == group)]
        for label in (0, 1)
        for group in (0, 1)
    }
    accuracies = {key: float(of.double().mean()) for key, of in members.items() if len(of)}
    return {
        "accuracy": float(right.double().mean()),
        "target": accuracies[task.target],
        "worst": min(accuracies.values()),
    }


def moved(task: Task, logits: Tensor, by: Tensor) -> Tensor:
    """A copy of the logits with the task's logits corrected."""
    logits = logits.clone()
    logits[:, task.output] += by
    return logits


def best(rows: Sequence[Row]) -> float:
    """The value with the highest accuracy on the worst subpopulation; the smallest of equals."""
    return float(max(rows, key=lambda row: (row["worst"], -row["value"]))["value"])


# ---- results ----------------------------------------------------------------------------------------------


def area(curve: Sequence[Row], reference: float) -> float:
    """The mean, over accuracy losses, of the highest worst-subpopulation accuracy at no greater loss.

    `curve` has one row per strength. `reference` is the accuracy from which losses are measured.
    """
    losses = (LARGEST_LOSS * step / STEPS for step in range(STEPS + 1))
    # With a tolerance, since the loss of the uncorrected model is 0 only up to rounding.
    return mean(
        max((row["worst"] for row in curve if row["accuracy"] >= reference - loss - 1e-9), default=0.0)
        for loss in losses
    )


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and half-width of the 95 % interval over seeds, by method and metric, for one task and split."""
    records = []
    for method in METHODS:
        figures = by_seed(rows, method)
        row: Row = {"method": method}
        for name, values in figures.items():
            row[name], row[f"{name}_half"] = interval(values)
        row["members"] = rows[0]["members"]
        row["target_sampling"] = 1.96 * (row["target"] * (1 - row["target"]) / row["members"]) ** 0.5
        records.append(row)
    return records


def comparisons(rows: Sequence[Row]) -> list[Row]:
    """Paired differences for the claims, with 95 % intervals over seeds, for one task and split."""
    records = []
    for metric, one, other in COMPARED:
        pairs = zip(by_seed(rows, one)[metric], by_seed(rows, other)[metric], strict=True)
        difference, half = interval([a - b for a, b in pairs])
        records.append({"metric": metric, "of": one, "minus": other, "difference": difference, "half": half})
    return records


def by_seed(rows: Sequence[Row], method: str) -> dict[str, list[float]]:
    """Metrics of a method at its chosen setting, one per seed; for a correction also the trade-off area."""
    of_method = [row for row in rows if row["method"] == method]
    chosen = sorted((row for row in of_method if row["chosen"]), key=lambda row: row["seed"])
    figures = {name: [row[name] for row in chosen] for name in ("value", *METRICS)}
    if method in CORRECTIONS:
        reference = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "mumoe"}
        figures["area"] = [
            area([row for row in of_method if row["seed"] == seed], reference[seed])
            for seed in sorted(reference)
        ]
    return figures
