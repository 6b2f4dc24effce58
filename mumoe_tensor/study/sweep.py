"""The measurements of a study, task by task; finished tasks are not repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from mumoe_tensor.measure import passes
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.study.layers import dense
from mumoe_tensor.study.memory import peaks
from mumoe_tensor.study.quality import heads, judge
from mumoe_tensor.study.results import Measurement, Results
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.subjects import BASELINE, ITEM, SPARSE, Subject, fitted

#: Numbers of experts for which formats are compared by formula.
GRID = tuple(2**k for k in range(3, 15))

#: Batch of the latency of heads.
HEAD_BATCH = 256

#: Called with the seconds that have passed, those of all tasks (estimates), and the text of the next task.
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Task:
    """A group of measurements, made whole or not at all.

    Attributes
    ----------
    key : str
        Marks its results.
    text : str
        Shown as progress.
    seconds : float
        An estimate.
    run : callable
        Makes the measurements.
    """

    key: str
    text: str
    seconds: float
    run: Callable[[], list[Measurement]]


@dataclass(frozen=True)
class Plan:
    """The subjects and tasks of a study.

    Attributes
    ----------
    setting : Setting
    subjects : list of Subject
        The dense layer, then for each number of experts every format and the sparse mixture.
    heads, squares : list of Subject
    unfitted : dict of str to str
        Formats that do not fit their budget, and why.
    tasks : list of Task
    """

    setting: Setting
    subjects: list[Subject]
    heads: list[Subject]
    squares: list[Subject]
    unfitted: dict[str, str]
    tasks: list[Task]


def plan(setting: Setting) -> Plan:
    """Fit every format to its budget and list the measurements. Nothing is run yet.

    Raises
    ------
    ValueError
        If no format fits the budget.
    """
    layer = setting.layer.spec
    baseline = Subject(layer, BASELINE)
    subjects = [baseline]
    unfitted: dict[str, str] = {}
    for experts in setting.experts:
        mixtures, missing = fitted(layer, experts, setting.formats, setting.parameters)
        mixtures.append(Subject(replace(layer, experts=experts), SPARSE, top_k=setting.top_k))
        subjects += [replace(subject, skip=_too_large(subject, setting.memory)) for subject in mixtures]
        unfitted |= {f"{name}, {'x'.join(map(str, experts))} experts": why for name, why in missing.items()}
    if not any(subject.name in setting.formats for subject in subjects):
        raise ValueError(f"some format must fit the budget; none does: {' '.join(unfitted.values())}")
    trained, missing = heads(setting)
    squares = []
    for size in setting.squares:
        squares += [Subject(dense(size, size), BASELINE)]
        of_size, _ = fitted(dense(size, size), (setting.square_experts,), setting.formats)
        squares += [subject for subject in of_size if subject.budget]
    planned = Plan(setting, subjects, trained, squares, unfitted | missing, [])
    planned.tasks.extend(_tasks(planned))
    return planned


def measure(planned: Plan, results: Results, progress: Progress | None = None) -> None:
    """Run every task without results.

    Parameters
    ----------
    results : Results
        Gets the measurements of each task when it ends.
    """
    about = environment()
    done = results.tasks
    left = [task for task in planned.tasks if task.key not in done]
    total, passed = sum(task.seconds for task in left), 0.0
    for task in left:
        if progress is not None:
            progress(passed, total, task.text)
        results.add(task.run(), about)
        passed += task.seconds
    if progress is not None:
        progress(total, total, "done")


def _tasks(planned: Plan) -> Iterator[Task]:
    """The tasks, the most informative first."""
    setting = planned.setting
    yield Task("cost", "costs by formula", 1.0, lambda: list(_costs(planned)))
    runnable = [subject for subject in planned.subjects if not subject.skip]
    main = setting.experts[0]
    for device, subject in product(setting.devices, runnable):
        yield _timing(setting, subject, device, setting.batch, ("forward", "step"))
    for subject, seed in product(planned.heads, range(setting.seeds)):
        yield _training(setting, subject, setting.seed + seed)
    for device, subject in product(setting.devices, planned.heads):
        yield _timing(setting, subject, device, HEAD_BATCH, ("forward",))
    for device, subject in product(setting.devices, runnable):
        if subject.spec.experts in ((), main):
            yield _peak(setting, subject, device)
    for device, batch, subject in product(setting.devices, setting.batches, runnable):
        if subject.spec.experts in ((), main) and batch != setting.batch:
            yield _timing(setting, subject, device, batch, ("forward",))
    for device, subject, batch in product(setting.devices, planned.squares, setting.square_batches):
        yield _timing(setting, subject, device, batch, ("forward",))


def _costs(planned: Plan) -> Iterator[Measurement]:
    """Figures by formula, of all subjects and over the grid of numbers of experts."""
    setting = planned.setting
    grid = []
    for n in GRID:
        if (n,) not in setting.experts:
            mixtures, _ = fitted(setting.layer.spec, (n,), setting.formats, setting.parameters)
            grid += [subject for subject in mixtures if subject.budget]
    everything = dict.fromkeys([*planned.subjects, *planned.heads, *planned.squares, *grid])
    for subject in everything:
        for quantity, value in subject.figures(setting.batch).items():
            yield Measurement.of("cost", subject, quantity, value, batch=setting.batch, note=subject.skip)
    for device, subject in product(setting.devices, planned.subjects):
        seconds = subject.predicted(setting.batch, device)
        yield Measurement.of(
            "cost", subject, "predicted forward", seconds, device=device, batch=setting.batch
        )


def _timing(setting: Setting, subject: Subject, device: str, batch: int, kinds: tuple[str, ...]) -> Task:
    key = f"time {subject.key} {device} {batch}"

    def run() -> list[Measurement]:
        torch.manual_seed(setting.seed)
        x = torch.randn(batch, subject.spec.in_features, device=device, requires_grad=True)
        # The dense layer is measured against itself, and costs one turn only.
        spec = subject.spec
        baseline = Subject(dense(spec.in_features, spec.out_features, spec.hidden), BASELINE)
        chosen = {"this": subject} if subject.role == BASELINE else {"dense": baseline, "this": subject}
        modules = {name: one.build(device) for name, one in chosen.items()}
        rows = []
        for kind in kinds:
            calls = {
                name: passes.step(module.train(), x) if kind == "step" else passes.forward(module.eval(), x)
                for name, module in modules.items()
            }
            first = next(iter(calls))
            limit = setting.seconds if "step" in kinds else setting.seconds / 2
            times = compare(calls, first, rounds=setting.rounds, limit=limit, device=device)
            seconds, ratio = times.spread("this"), times.ratio("this")
            row = Measurement.of(
                key, subject, kind, seconds.median, low=seconds.low, high=seconds.high, ratio=ratio.median,
                ratio_low=ratio.low, ratio_high=ratio.high, repetitions=times.rounds, device=device,
                batch=batch, seed=setting.seed,
            )  # fmt: skip
            rows.append(row)
        return rows

    text = f"time of {subject.title}, {_experts(subject)}batch {batch:,}, {device}"
    return Task(key, text, 0.2 + setting.seconds * (1.3 if len(kinds) > 1 else 0.4), run)


def _peak(setting: Setting, subject: Subject, device: str) -> Task:
    key = f"peak {subject.key} {device} {setting.batch}"

    def run() -> list[Measurement]:
        values: tuple[int | None, int | None] = (None, None)
        note = ""
        try:
            values = peaks(subject, setting.batch, device)
        except OSError as error:
            note = str(error)
        return [
            Measurement.of(key, subject, quantity, value, device=device, batch=setting.batch, note=note)
            for quantity, value in zip(("forward peak", "step peak"), values, strict=True)
        ]

    return Task(key, f"peak memory of {subject.title}, {_experts(subject)}{device}", 3.0, run)


def _training(setting: Setting, subject: Subject, seed: int) -> Task:
    key = f"train {subject.key} {subject.budget} seed {seed}"

    def run() -> list[Measurement]:
        figures = judge(setting, subject, seed)
        return [Measurement.of(key, subject, name, value, seed=seed) for name, value in figures.items()]

    text = f"training of {subject.title}, {_experts(subject)}seed {seed}"
    return Task(key, text, 0.03 * setting.epochs, run)


def _experts(subject: Subject) -> str:
    experts = subject.spec.experts
    return f"{'×'.join(map(str, experts))} experts, " if experts else ""


def _too_large(subject: Subject, memory: float) -> str:
    needed = 2 * ITEM * subject.figures(2)["parameters"] / 2**30
    if needed <= memory:
        return ""
    return f"not run: parameters and gradients take {needed:.1f} GiB, the limit is {memory:g} GiB"
