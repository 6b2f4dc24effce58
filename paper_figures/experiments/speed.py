"""Speed and memory of training steps of the experiments' Mixers and GPT-2s.

    python -m paper_figures.experiments.speed mixer    (or gpt2)

A step is zero_grad, forward, loss, backward, clipping and AdamW, on one batch of the experiment's size. For
speed, the models take turns in one process; memory is measured in one process per model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import torch

from benchmarks.harness import MIB, Report, about_text, quartiles, threads
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.memory import growth, in_fresh_process
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.training.settings import MixerRun, read_settings
from mumoe_tensor.training.trainer import cross_entropy
from paper_figures.experiments import command
from paper_figures.experiments.pretraining import ARMS

ROUNDS, SECONDS = 31, 120.0
UNIT = {"mixer": "images", "gpt2": "tokens"}


def make(kind: str, arm: str) -> tuple[Callable[[], float], int, int]:
    """A function that makes a step of an arm and returns the loss; its batch size; the parameter count."""
    settings = read_settings(kind, None, ARMS[kind][arm])
    torch.manual_seed(0)
    model = settings.make_model()
    config, rows = settings.train, settings.train.batch_size
    if isinstance(settings, MixerRun):
        side = settings.model.image_size
        x: Any = torch.rand(rows, settings.model.channels, side, side)
        y = torch.randint(settings.model.classes, (rows,))
    else:
        x, y = torch.randint(settings.model.vocabulary, (2, rows, settings.model.context))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or inf)
        optimizer.step()
        return loss.item()

    return step, y.numel(), num_parameters(model)


def peak(kind: str, arm: str) -> int:
    """Bytes by which this process grows with its model, its optimizer and some steps."""
    torch.set_num_threads(1)
    # First run a small model, so that libraries are loaded and allocate their buffers.
    small = torch.nn.Linear(8, 8)
    cross_entropy(small(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)).backward()
    torch.optim.AdamW(small.parameters()).step()

    def run() -> None:
        step, *_ = make(kind, arm)
        for _ in range(3):
            step()

    return growth(run)


def measure(kind: str) -> Report:
    """Speed and memory of all arms of an experiment."""
    made = {arm: make(kind, arm) for arm in ARMS[kind]}
    timings = compare({arm: step for arm, (step, *_) in made.items()}, "dense", rounds=ROUNDS, limit=SECONDS)
    peaks = {arm: in_fresh_process("paper_figures.experiments.speed:peak", kind, arm) for arm in made}
    rows = []
    for arm, (_, inputs, parameters) in made.items():
        row = {"model": arm, "parameters": parameters}
        row[f"{UNIT[kind]} a second"] = inputs / timings.spread(arm).median
        row |= quartiles(timings.ratio(arm), "time of a step / dense", "q1", "q3")
        rows.append(row | {"peak MiB": peaks[arm] / MIB})
    return Report(
        kind,
        f"Training steps of {kind}, {timings.rounds} rounds",
        dict(zip(rows[0], ("", ",d", ",.0f", ".2f", ".2f", ".2f", ",.0f"), strict=True)),
        rows,
        [f"{UNIT[kind]} a second: of the median step. Peak: growth of a process by model, AdamW and steps."],
    )


def show(kind: str) -> None:
    """Measure and print."""
    with threads(1) as used:
        print(about_text(environment() | {"threads": used}), f"{measure(kind)}", sep="\n\n")


STEPS = {kind: partial(show, kind) for kind in ARMS}

if __name__ == "__main__":
    command.run("speed")
