"""Quality of heads trained on real data at a parameter budget, and the use of their experts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from mumoe_tensor.analysis import Usage, ablation_effects, polysemanticity, watch_coefficients
from mumoe_tensor.configs.study import DIGITS, NO_DATA
from mumoe_tensor.models.heads import centring
from mumoe_tensor.spec import as_budget
from mumoe_tensor.study.layers import LAYERS, dense
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.subjects import BASELINE, SPARSE, Subject, fitted
from mumoe_tensor.training import Dataset, TrainConfig, digits, evaluate, read_npz, split, train

#: Fraction of the rows for validation.
VALIDATION = 0.2
#: Maximum number of experts in a level for polysemanticity, which removes each expert once.
MOST_EXPERTS = 512


@cache
def data_of(data: str) -> tuple[Dataset, Dataset]:
    """Training and validation rows of a study's data, with flat, standardized inputs."""
    rows = digits() if data == DIGITS else read_npz(Path(data))
    training, validation = split(rows, VALIDATION, seed=0)
    flat = training.x.flatten(1)
    mean, scale = centring(flat)
    training, validation = (
        Dataset((part.x.flatten(1) - mean) / scale, part.y) for part in (training, validation)
    )
    return training, validation


def heads(setting: Setting) -> tuple[list[Subject], dict[str, str]]:
    """The heads that a study trains, the dense one first, and the reason for each format that is left out.

    Raises
    ------
    ValueError
        If the data does not match the layer or the batch size, or no format fits a budget.
    """
    if setting.data == NO_DATA:
        return [], {}
    training, validation = data_of(setting.data)
    layer, features = setting.layer, training.x.shape[1]
    takes = layer.spec.in_features
    if setting.data != DIGITS and layer not in LAYERS.values() and takes != features:
        raise ValueError(
            f"the layer must have as many inputs as the data; in_features is {takes:,}, but "
            f"{setting.data} has {features:,} features."
        )
    if not 2 <= setting.batch_size <= len(training) and setting.batch_size != Setting.batch_size:
        raise ValueError(
            f"batch_size must be at least 2, for the batch norm of a step, and at most the {len(training):,} "
            f"rows for training; got {setting.batch_size:,}."
        )
    classes = max(training.classes, validation.classes)
    head = dense(features, classes, setting.head_hidden or None)
    subjects = [Subject(head, BASELINE)]
    unfitted: dict[str, str] = {}
    for experts in setting.head_experts:
        for parameters in setting.head_parameters:
            mixtures, missing = fitted(head, experts, setting.head_formats, parameters)
            subjects += [subject for subject in mixtures if subject not in subjects]
            budget, counts = as_budget(parameters, head.dense_parameters), "x".join(map(str, experts))
            unfitted |= {f"{name} head, {counts}, {budget:,}": why for name, why in missing.items()}
        subjects.append(Subject(replace(head, experts=experts), SPARSE, top_k=setting.top_k))
    if unfitted and not any(subject.budget for subject in subjects):
        raise ValueError(
            "some head of experts must fit its budget; a larger budget (--head-parameters 4x), fewer experts "
            f"(--head-experts) or a hidden layer (--head-hidden) may help. {' '.join(unfitted.values())}"
        )
    return subjects, unfitted


def train_and_evaluate(setting: Setting, subject: Subject, seed: int) -> tuple[dict[str, float], int]:
    """Train a head and evaluate it; returns quantities as in `UNITS`, and the number of validation rows."""
    training, validation = data_of(setting.data)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = subject.build()
        options = {name: getattr(setting, name) for name in ("epochs", "batch_size", "learning_rate")}
        config = TrainConfig(**options, seed=seed)
        epochs = train(head, training, validation, config.for_rows(len(training)))
    loss, accuracy = evaluate(head, validation)
    seconds = sum(epoch.seconds for epoch in epochs)
    figures = {"accuracy": accuracy, "loss": loss, "training time": seconds}
    if subject.name != BASELINE:
        figures |= specialisation(head, validation, seed)
    return figures, len(validation)


@torch.no_grad()
def specialisation(head: nn.Module, data: Dataset, seed: int) -> dict[str, float]:
    """The use of a head's experts, averaged over levels, and their specialisation.

    Polysemanticity is that of the first level, with the trained gate and with a random gate; it is left out
    if the level has more than `MOST_EXPERTS` experts.
    """
    seen: list[torch.Tensor] = []
    with watch_coefficients(head, lambda name, coefficients: seen.extend(coefficients)):
        head(data.x)
    usages = [Usage(a.shape[-1]) for a in seen]
    for usage, a in zip(usages, seen, strict=True):
        usage.update(a)
    levels = [usage.statistics() for usage in usages]
    figures = {
        "active experts": sum(level.active for level in levels) / len(levels),
        "dead experts": sum(level.dead / len(level.mean) for level in levels) / len(levels),
        "largest share": max(level.largest_share for level in levels),
    }
    if len(levels[0].mean) <= MOST_EXPERTS:
        for name, random_seed in (("polysemanticity", None), ("polysemanticity, random gate", seed)):
            effects = ablation_effects(
                head, head, [(data.x, data.y)], int(data.y.max()) + 1, random_seed=random_seed
            )
            figures[name] = float(polysemanticity(effects).nanmean())
    return figures
