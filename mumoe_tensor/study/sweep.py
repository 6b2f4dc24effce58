"""The measurements of a study, task by task; finished tasks are not repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from math import prod
from typing import Any

import torch

from mumoe_tensor.decomposition import decompose
from mumoe_tensor.decomposition.joint import weighted_norm
from mumoe_tensor.dense import to_dense
from mumoe_tensor.jobs import side_by_side
from mumoe_tensor.measure import passes
from mumoe_tensor.measure.environment import environment
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.progress import Progress
from mumoe_tensor.study.layers import dense
from mumoe_tensor.study.memory import peaks
from mumoe_tensor.study.quality import heads, train_and_evaluate
from mumoe_tensor.study.results import Measurement, Results
from mumoe_tensor.study.settings import Setting
from mumoe_tensor.study.subjects import BASELINE, ITEM, MIXTURE, SPARSE, Subject, fitted
from mumoe_tensor.study.weights import read_covariance, read_weight

#: Batch size for the latency of heads.
HEAD_BATCH = 256
#: Subjects whose forward pass is predicted to take more seconds, and more than twice the time of the dense
#: layer, are extrapolated from a smaller run.
SLOW = 0.1
#: A fit ends after two consecutive sweeps that each lower its error by a smaller fraction than this.
TOLERANCE = 1e-3


#: A quantity, its value, and further attributes of the measurement.
Figure = tuple[str, float | None, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Measurements of a subject that are recorded together.

    Attributes
    ----------
    key : str
        Identifies its results.
    text : str
        Shown as progress.
    seconds : float
        Estimated duration.
    subject : Subject
    figures : callable
        Makes the measurements.
    alone : bool
        Whether it must run alone, because it is timed.
    """

    key: str
    text: str
    seconds: float
    subject: Subject
    figures: Callable[[], list[Figure]]
    alone: bool = True

    def run(self) -> list[Measurement]:
        """Make the measurements."""
        return [
            Measurement.of(self.key, self.subject, quantity, value, **more)
            for quantity, value, more in self.figures()
        ]


@dataclass(frozen=True)
class Plan:
    """The subjects and tasks of a study.

    Attributes
    ----------
    setting : Setting
    subjects : list of Subject
        The dense layer; then, for each number of experts, every format at every budget, and the sparse
        mixture.
    heads : list of Subject
    unfitted : dict of str to str
        Formats that do not fit their budget, with the reason.
    tasks : list of Task
    """

    setting: Setting
    subjects: list[Subject]
    heads: list[Subject]
    unfitted: dict[str, str]
    tasks: list[Task]

    @property
    def main(self) -> list[Subject]:
        """Subjects with the first number of experts and the first budget, or without experts or a budget."""
        experts, budgets = self.setting.experts[0], (0, self.setting.budgets[0])
        return [s for s in self.subjects if s.spec.experts in ((), experts) and s.budget in budgets]


def plan(setting: Setting) -> Plan:
    """Fit every format to its budgets and list the measurements, without running them.

    Raises
    ------
    ValueError, OSError
        If no format fits a budget, or a file or a device does not exist.
    """
    setting.check_available()
    layer = setting.layer.spec
    subjects = {"": Subject(layer, BASELINE)}
    unfitted: dict[str, str] = {}
    for experts in setting.experts:
        for budget in setting.budgets:
            mixtures, missing = fitted(layer, experts, setting.formats, budget)
            # Two budgets may result in the same rank.
            subjects = {subject.key: subject for subject in mixtures} | subjects
            counts = "x".join(map(str, experts)) or "no"
            unfitted |= {f"{name}, {counts}, {budget:,}": why for name, why in missing.items()}
        if experts:
            sparse = Subject(replace(layer, experts=experts), SPARSE, top_k=setting.top_k)
            subjects[sparse.key] = sparse
    everything = sorted(subjects.values(), key=partial(_place, setting))
    if not any(subject.name in setting.formats for subject in everything):
        raise ValueError(f"some format must fit the budget; none does: {' '.join(unfitted.values())}")
    trained, missing = heads(setting)
    planned = Plan(setting, everything, trained, unfitted | missing, [])
    planned.tasks.extend(_tasks(planned))
    return planned


def _place(setting: Setting, subject: Subject) -> tuple[int, ...]:
    """Sort key: the dense layer first, then by number of experts, budget and format; no budget last."""
    if subject.role == BASELINE:
        return (-1,)
    budgets, is_sparse = [*setting.budgets, 0], subject.role == SPARSE
    format = 0 if is_sparse else setting.formats.index(subject.name)
    return (setting.experts.index(subject.spec.experts), budgets.index(subject.budget), is_sparse, format)


def measure(planned: Plan, results: Results, progress: Progress | None = None, jobs: int | str = 1) -> None:
    """Run every task that has no results.

    Parameters
    ----------
    results : Results
        Receives the measurements of each task when it ends.
    jobs : int or str, default 1
        Processes for tasks that are not timed: training runs, fits and memory peaks.
    """
    about, done = environment(), results.tasks
    left = [task for task in planned.tasks if task.key not in done]
    total, passed = sum(task.seconds for task in left), 0.0
    for alone, group in groupby(left, key=lambda task: task.alone):
        tasks = list(group)
        if progress is not None:
            progress(passed, total, tasks[0].text)
        for count, (number, rows) in enumerate(
            side_by_side([task.run for task in tasks], 1 if alone else jobs), 1
        ):
            results.add(rows, about)
            passed += tasks[number].seconds
            if progress is not None and count < len(tasks):
                progress(passed, total, tasks[count].text)
    if progress is not None:
        progress(total, total, "done")


def _tasks(planned: Plan) -> Iterator[Task]:
    """The tasks, most informative first."""
    setting, subjects = planned.setting, planned.subjects
    for subject in [*subjects, *planned.heads]:
        yield _costs(setting, subject)
    for subject, machine in product(subjects, dict.fromkeys((*setting.devices, *setting.machines))):
        yield _prediction(setting, subject, machine)
    for subject in subjects if setting.weight else ():
        if subject.role == MIXTURE:
            yield _fit(setting, subject)
    for device, subject in product(setting.devices, subjects):
        yield _timing(setting, subject, device, setting.batch, ("forward", "step"))
    for subject, seed in product(planned.heads, range(setting.seeds)):
        yield _training(setting, subject, setting.seed + seed)
    for device, subject in product(setting.devices, subjects):
        yield _peak(setting, subject, device)
    for device, subject in product(setting.devices, planned.heads):
        yield _timing(setting, subject, device, HEAD_BATCH, ("forward",))
    for device, batch, subject in product(setting.devices, setting.batches, planned.main):
        if batch != setting.batch:
            yield _timing(setting, subject, device, batch, ("forward",))


def _costs(setting: Setting, subject: Subject) -> Task:
    def figures() -> list[Figure]:
        batch = setting.batch
        return [(quantity, value, {"batch": batch}) for quantity, value in subject.figures(batch).items()]

    return Task(f"cost {subject.key} {setting.batch}", "costs by formula", 0.01, subject, figures)


def _prediction(setting: Setting, subject: Subject, machine: str) -> Task:
    def figures() -> list[Figure]:
        seconds = subject.predicted(setting.batch, machine)
        return [("predicted forward", seconds, {"device": machine, "batch": setting.batch})]

    key = f"predict {subject.key} {machine} {setting.batch}"
    return Task(key, "predicted times", 0.01, subject, figures)


def _fit(setting: Setting, subject: Subject) -> Task:
    spec = subject.spec
    effort: Any = dict(n_restarts=1, n_iter=setting.sweeps, tolerance=TOLERANCE, seed=setting.seed)

    def figures() -> list[Figure]:
        assert setting.weight is not None
        if max(spec.full_rank, default=0) > max(spec.mode_sizes):
            # Alternating least squares repeatedly solves systems of that size.
            note = "not fitted, as it has a larger rank than any mode has entries"
            return [("weight error", None, {"note": note})]
        weight = read_weight(setting.weight, setting.transposed).reshape(spec.mode_sizes)
        plain, error = decompose(weight, spec.format, spec.full_rank, **effort)
        errors = {"weight error": error}
        if setting.inputs is not None:
            covariance = read_covariance(setting.inputs, spec.in_features)
            _, best = decompose(weight, spec.format, spec.full_rank, input_covariance=covariance, **effort)
            rest = to_dense(plain).astype(float) - weight
            norm = weighted_norm(weight.astype(float), covariance) or 1
            plain_error = weighted_norm(rest, covariance) / norm
            errors |= {"output error": best, "output error, plain fit": plain_error}
        return [(quantity, value, {"seed": setting.seed}) for quantity, value in errors.items()]

    text = f"fit of {subject.title}, rank {spec.full_rank}"
    seconds = 1e-5 * spec.in_features * spec.out_features
    return Task(f"fit {subject.key}", text, seconds, subject, figures, alone=False)


def _timing(setting: Setting, subject: Subject, device: str, batch: int, kinds: tuple[str, ...]) -> Task:
    def figures() -> list[Figure]:
        torch.manual_seed(setting.seed)
        spec = subject.spec
        x = torch.randn(batch, spec.in_features, device=device, requires_grad=True)
        run_one, few = smaller(subject, setting, batch, device)
        scale = subject.predicted(batch, device) / run_one.predicted(few, device)
        inputs = {"dense": x, "this": x[:few].detach().requires_grad_()}
        # The dense layer is measured against itself, and takes only one turn per round.
        baseline = Subject(dense(spec.in_features, spec.out_features, spec.hidden, spec.bias), BASELINE)
        chosen = {"this": subject} if subject.role == BASELINE else {"dense": baseline, "this": run_one}
        modules = {name: one.build(device) for name, one in chosen.items()}
        more = {"device": device, "batch": batch, "seed": setting.seed}
        more["note"] = _estimated(subject, run_one, batch, few)
        made: list[Figure] = []
        for kind in kinds:
            calls = {
                name: passes.step(module.train(), inputs[name])
                if kind == "step"
                else passes.forward(module.eval(), inputs[name])
                for name, module in modules.items()
            }
            limit = setting.seconds if "step" in kinds else setting.seconds / 2
            times = compare(calls, next(iter(calls)), rounds=setting.rounds, limit=limit, device=device)
            seconds, low, high = (scale * part for part in times.spread("this"))
            ratios = [scale * part for part in times.ratio("this")]
            spread = dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
            spread |= {"low": low, "high": high, "repetitions": times.rounds}
            made.append((kind, seconds, more | spread))
        return made

    text = f"time of {subject.title}, {_experts(subject)}batch {batch:,}, {device}"
    seconds = 0.2 + setting.seconds * (1.3 if len(kinds) > 1 else 0.4)
    return Task(f"time {subject.key} {device} {batch}", text, seconds, subject, figures)


def _peak(setting: Setting, subject: Subject, device: str) -> Task:
    batch = setting.batch

    def figures() -> list[Figure]:
        run_one, few = smaller(subject, setting, batch, device)
        # Add the memory of the missing inputs or parameters, with gradients and saved activations in a step.
        parameters, run_parameters = (ITEM * s.figures(few)["parameters"] for s in (subject, run_one))
        kept = few * (subject.figures(few)["saved"] - run_one.figures(few)["saved"])
        note = _estimated(subject, run_one, batch, few)
        values: list[float | None] = [None, None]
        try:
            values = [
                copies * parameters + (peak - copies * run_parameters + more) * batch / few
                for peak, copies, more in zip(peaks(run_one, few, device), (1, 2), (0, kept), strict=True)
            ]
        except OSError as error:
            note = str(error)
        more = {"device": device, "batch": batch, "note": note}
        return [("forward peak", values[0], more), ("step peak", values[1], more)]

    text = f"peak memory of {subject.title}, {_experts(subject)}{device}"
    return Task(f"peak {subject.key} {device} {batch}", text, 3.0, subject, figures, alone=False)


def _training(setting: Setting, subject: Subject, seed: int) -> Task:
    def figures() -> list[Figure]:
        judged, rows = train_and_evaluate(setting, subject, seed)
        return [(name, value, {"seed": seed, "repetitions": rows}) for name, value in judged.items()]

    text = f"training of {subject.title}, {_experts(subject)}seed {seed}"
    key = f"train {subject.key} {subject.budget} seed {seed}"
    return Task(key, text, 0.03 * setting.epochs, subject, figures, alone=False)


def smaller(subject: Subject, setting: Setting, batch: int, device: str) -> tuple[Subject, int]:
    """A smaller subject to run instead of one that is too large or slow, and its number of inputs.

    Mixtures of dense experts get fewer experts, in one level; other subjects get a smaller batch. Saved
    activations, parameters and gradients must fit into the setting's memory, and the predicted time of the
    forward pass must be at most `SLOW` seconds, or twice that of the dense layer.
    """
    dense_layer = Subject(setting.layer.spec, BASELINE)
    is_factorized = subject.role == MIXTURE and len(subject.spec.format.declaration(1)) > 1

    def fits(one: Subject, count: int) -> bool:
        figures, seconds = one.figures(count), max(SLOW, 2 * dense_layer.predicted(batch, device))
        held = 2 * ITEM * figures["parameters"] + count * figures["saved"]
        return held <= setting.memory * 2**30 and one.predicted(count, device) <= seconds

    one, count = subject, batch
    while is_factorized and count > 3 and not fits(one, count):
        count //= 2
    while subject.role != BASELINE and not is_factorized and not fits(one, batch):
        if prod(one.spec.experts) <= one.top_k:
            break
        one = replace(one, spec=replace(one.spec, experts=(max(prod(one.spec.experts) // 2, one.top_k),)))
    return one, count


def _estimated(subject: Subject, run: Subject, batch: int, count: int) -> str:
    if run is not subject:
        return f"extrapolated from {run.spec.experts[0]:,} experts"
    return "" if count == batch else f"extrapolated from {count:,} inputs"


def _experts(subject: Subject) -> str:
    experts = subject.spec.experts
    return f"{'×'.join(map(str, experts))} experts, " if experts else ""
