"""The setting of small studies, and measurements that are set instead of taken."""

from __future__ import annotations

from typing import Any

from mumoe_tensor import study as studies
from mumoe_tensor.formats import formats
from mumoe_tensor.study import sweep as sweeps
from mumoe_tensor.study.results import Measurement
from mumoe_tensor.study.subjects import BASELINE

SMALL: dict[str, Any] = {
    "layer": studies.Layer("Tiny", 24, 20, hidden=40, experts=4),
    "experts": [4, (3, 2)],
    "batch": 8,
    "batches": (1, 4),
    "parameters": ["match"],
    "seconds": 1e-3,
    "rounds": 3,
    "head_experts": [3, 4],
    "head_hidden": 32,
    "head_parameters": ["match"],
    "seeds": 2,
    "epochs": 1,
    "devices": ["cpu"],
    "seed": 3,
}
#: Of the study that is run: formats of each kind.
MEASURED = SMALL | {"formats": ["cp", "hadamard", "dense", "btt"], "head_experts": [3], "batches": (1,)}
#: One of few tasks.
SHORT = SMALL | {"experts": [4], "batches": (1,), "data": "none"}
#: Ratios of the made-up study.
RATIOS = dict.fromkeys(formats(), 1.2) | {"cp": 0.9, "tr": 1.5, "tt": 2.0, "tucker": 3.0}
RATIOS |= {"dense": 8.0, "sparse": 4.0}
ACCURACIES = {"baseline": 0.90, "cp": 0.95, "tr": 0.80}


def measurements(planned: studies.Plan) -> list[Measurement]:
    """Costs as computed, everything else as set."""
    return [row for task in planned.tasks for row in MADE[task.key.split()[0]](planned, task)]


def _subject_of(planned: studies.Plan, key: str) -> studies.Subject:
    everything = [*planned.subjects, *planned.heads]
    return max((s for s in everything if f" {s.key} " in key), key=lambda s: len(s.key))


def _times(planned: studies.Plan, task: sweeps.Task) -> list[Measurement]:
    subject, batch = _subject_of(planned, task.key), int(task.key.split()[-1])
    ratio = RATIOS.get(subject.name, 1.0)
    known = {"device": "cpu", "batch": batch, "ratio": ratio, "ratio_low": 0.9 * ratio}
    known |= {"ratio_high": 1.2 * ratio, "low": 0.9e-3 * ratio, "high": 1.2e-3 * ratio}
    return [
        Measurement.of(task.key, subject, quantity, 1e-3 * ratio, **known)
        for quantity in (("forward", "step") if batch == SMALL["batch"] else ("forward",))
    ]


def _peaks(planned: studies.Plan, task: sweeps.Task) -> list[Measurement]:
    subject = _subject_of(planned, task.key)
    value = int(2**20 * RATIOS.get(subject.name, 1.0))
    return [
        Measurement.of(task.key, subject, quantity, value, device="cpu", batch=SMALL["batch"])
        for quantity in ("forward peak", "step peak")
    ]


def _trained(planned: studies.Plan, task: sweeps.Task) -> list[Measurement]:
    subject, seed = _subject_of(planned, task.key), int(task.key.split()[-1])
    accuracy = ACCURACIES.get(subject.name, 0.5) + 0.01 * (seed - SMALL["seed"])
    figures = {"accuracy": accuracy}
    if subject.name != BASELINE:
        figures |= {"active experts": 0.5, "dead experts": 0.25}
        figures |= {"polysemanticity": 0.3, "polysemanticity, random gate": 0.6}
    return [
        Measurement.of(task.key, subject, name, value, seed=seed, repetitions=360)
        for name, value in figures.items()
    ]


def _as_computed(planned: studies.Plan, task: sweeps.Task) -> list[Measurement]:
    return task.run()


MADE = {"cost": _as_computed, "predict": _as_computed, "time": _times, "peak": _peaks, "train": _trained}
