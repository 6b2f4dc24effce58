"""What a study measures: each format at the parameters of a dense layer, its cost and its real forward."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from math import pi, sqrt
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np

import mumoe_tensor
from mumoe_tensor.backend import Array
from mumoe_tensor.budget import fit_rank
from mumoe_tensor.contraction.plan import ITEMSIZE
from mumoe_tensor.cost import Cost, cost, dense_parameters
from mumoe_tensor.formats.base import Format, as_positive, check_modes, get_format
from mumoe_tensor.formats.base import formats as registered
from mumoe_tensor.gates import entmax15
from mumoe_tensor.multilinear import multilinear_moe
from mumoe_tensor.study.layers import Layer, get_layer
from mumoe_tensor.tensors import FactorizedTensor

#: Name of the dense layer itself among the rows.
BASELINE = "baseline"
DTYPE = "float32"
BATCH, QUICK_BATCH = 1024, 32
REPETITIONS, QUICK_REPETITIONS = 25, 3
#: Rounds that are timed even if the time for them has passed.
FEWEST_REPETITIONS = 3

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Subject:
    """One thing to be measured: the dense layer, or a mixture in one format.

    Attributes
    ----------
    name : str
        The format's, or ``"baseline"``.
    title : str
    format : Format
        Format of the weights; the dense layer is the dense format without a level of experts.
    rank : tuple of int
    fitted : bool
        Whether the rank was fitted to the budget. What has no rank costs what it costs.
    cost : Cost
    skip : str
        Why the forward is not run; empty if it is.
    """

    name: str
    title: str
    format: Format
    rank: tuple[int, ...]
    fitted: bool
    cost: Cost
    skip: str = ""


@dataclass(frozen=True)
class Sweep:
    """Everything that will be measured, with its figures; made by `prepare`.

    Attributes
    ----------
    layer : Layer
    experts : tuple of int
    budget : int
        Parameters the ranks were fitted to, gate included.
    batch : int
    repetitions : int
    seconds : float
    seed : int
    subjects : tuple of Subject
        The dense layer first.
    unfitted : dict
        Formats that cannot be had for the budget, and why.
    """

    layer: Layer
    experts: tuple[int, ...]
    budget: int
    batch: int
    repetitions: int
    seconds: float
    seed: int
    subjects: tuple[Subject, ...]
    unfitted: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The setting in one line."""
        levels = " × ".join(f"{n:,}" for n in self.experts) or "no"
        return f"{self.layer}; {levels} experts, batch {self.batch:,}, {DTYPE}"


@dataclass(frozen=True)
class Row:
    """Figures of one subject, and its forward pass on one backend.

    Memory is in bytes, time in seconds. `seconds` is a median, `seconds_q1` and `seconds_q3` are quartiles,
    and the ratios are these over the dense layer's median on the same backend. Where nothing was run
    `backend` is empty, the times are None and `note` says why.
    """

    name: str
    title: str
    rank: str
    fitted: bool
    parameters: int
    gate_parameters: int
    flops: int
    peak_bytes: int
    saved_bytes: int
    max_expert_rank: int
    backend: str = ""
    repetitions: int = 0
    seconds: float | None = None
    seconds_q1: float | None = None
    seconds_q3: float | None = None
    time_ratio: float | None = None
    time_ratio_q1: float | None = None
    time_ratio_q3: float | None = None
    note: str = ""

    @property
    def ratios(self) -> tuple[float, float, float] | None:
        """Lower quartile, median and upper quartile of the time over the dense layer's median."""
        if self.time_ratio_q1 is None or self.time_ratio is None or self.time_ratio_q3 is None:
            return None
        return self.time_ratio_q1, self.time_ratio, self.time_ratio_q3


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes
    ----------
    sweep : Sweep
    rows : tuple of Row
        One for each subject and backend, the dense layer's first.
    environment : dict
        Machine and its load before anything ran, versions and commit.
    skipped : dict
        Backends that were not there, and why.
    """

    sweep: Sweep
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    skipped: dict[str, str]

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends the forward was run on."""
        return tuple(dict.fromkeys(row.backend for row in self.rows if row.backend))

    def of(self, name: str) -> dict[str, Row]:
        """Rows of one subject by backend; figures that no backend changes are the same in each."""
        return {row.backend: row for row in self.rows if row.name == name}


def prepare(
    layer: str | Layer = "gpt2-mlp",
    *,
    experts: int | Sequence[int] | None = None,
    formats: Iterable[str] | None = None,
    parameters: int | Literal["match"] = "match",
    batch: int | None = None,
    repetitions: int | None = None,
    seconds: float = 30.0,
    memory: float = 2.0,
    seed: int = 0,
    quick: bool = False,
) -> Sweep:
    """Fit every format to the budget and work out what it costs. Nothing is run yet.

    Parameters
    ----------
    layer : str or Layer, default "gpt2-mlp"
        A name in `LAYERS`, or sizes of one's own.
    experts : int or sequence of int, optional
        Number of experts, one number a level. By default that of the layer.
    formats : iterable of str, optional
        Names of formats; all registered ones by default.
    parameters : int or "match", default "match"
        The budget with gate and bias; ``"match"`` for the parameters of the dense layer with its bias.
    batch : int, optional
        Inputs of one forward pass: 1024, or 32 with `quick`.
    repetitions : int, optional
        Timed rounds: 25, or 3 with `quick`.
    seconds : float, default 30
        On each backend no further round starts once this time has passed and three are done.
    memory : float, default 2
        A forward that needs more GiB than this for parameters and intermediates is not run.
    seed : int, default 0
    quick : bool, default False
        A small batch and few repetitions, to see that all works.

    Returns
    -------
    Sweep

    Raises
    ------
    ValueError, TypeError
        If a name is unknown, a size is not a positive integer, or no format fits the budget.
    """
    layer = get_layer(layer)
    levels = check_modes(layer.experts if experts is None else experts, 1, 1)[:-2]
    chosen = [get_format(name) for name in dict.fromkeys(registered() if formats is None else formats)]
    if not chosen:
        raise ValueError("a study needs at least one format, got none.")
    batch = as_positive((QUICK_BATCH if quick else BATCH) if batch is None else batch, "batch")
    rounds = (QUICK_REPETITIONS if quick else REPETITIONS) if repetitions is None else repetitions
    rounds = as_positive(rounds, "repetitions")
    for name, value in (("seconds", seconds), ("memory", memory)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    sizes: dict[str, Any] = {
        "in_features": layer.in_features,
        "hidden": layer.hidden,
        "out_features": layer.out_features,
        "bias": True,
    }
    if parameters == "match":
        budget = dense_parameters(layer.in_features, layer.out_features, layer.hidden, bias=True)
    else:
        budget = as_positive(parameters, "parameters")
    mixture = {**sizes, "experts": levels, "gate": True}
    subjects = [_baseline(layer, cost("dense", experts=(), batch=batch, dtype=DTYPE, **sizes))]
    unfitted = {}
    for format in chosen:
        fitted = bool(format.bonds(len(levels)))
        rank: tuple[int, ...] = ()
        if fitted:
            try:
                solved = fit_rank(format, parameters=budget, rounding="nearest", **mixture)
            except ValueError as error:
                unfitted[format.name] = str(error)
                continue
            rank = (solved,) if isinstance(solved, int) else solved
        figures = cost(format, rank=rank, batch=batch, dtype=DTYPE, **mixture)
        title = f"{format.title} mixture" if len(format.declaration(len(levels))) == 1 else format.title
        skip = _too_large(figures, memory)
        subjects.append(Subject(format.name, title, format, rank, fitted, figures, skip))
    if len(subjects) == 1:
        raise ValueError(f"some format must fit the budget; none does: {' '.join(unfitted.values())}")
    return Sweep(layer, levels, budget, batch, rounds, seconds, seed, tuple(subjects), unfitted)


def measure(sweep: Sweep, progress: Progress | None = None) -> Study:
    """Run and time the forward pass of every subject on NumPy and, if it is installed, on torch.

    A mixture's forward is what `Cost` counts: the gate (its product and entmax15), then the multilinear
    layers, with GELU between two. The dense layer has the backend's own products. All subjects run in one
    process, one after another in rounds whose order rotates, after one round of warm-up.

    Parameters
    ----------
    sweep : Sweep
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    Study
    """
    surroundings = environment()
    backends, skipped = _backends()
    runnable = [subject for subject in sweep.subjects if not subject.skip]
    z, gates = _inputs(sweep)
    weights = {subject.name: _weights(sweep, subject) for subject in runnable}
    steps = len(runnable) * (sweep.repetitions + 1)
    timed = {}
    for k, backend in enumerate(backends):

        def tick(done: int, name: str, first: int = k * steps, of: str = backend.name) -> None:
            if progress is not None:
                progress(first + done, steps * len(backends), f"{of}, {name}")

        forwards = {
            subject.name: forward_pass(backend, subject, weights[subject.name], gates, z)
            for subject in runnable
        }
        with backend.context():
            timed[backend.name] = _interleaved(forwards, sweep.repetitions, sweep.seconds, tick)
    rows = []
    for subject in sweep.subjects:
        if subject.skip:
            rows.append(Row(**_figures(subject), note=subject.skip))
            continue
        for name, seconds in timed.items():
            times = _spread(seconds[subject.name], seconds[BASELINE])
            rows.append(Row(**_figures(subject), backend=name, **times))
    return Study(sweep, tuple(rows), surroundings, skipped)


def environment() -> dict[str, Any]:
    """Machine, its load at this moment, versions and commit; None for what is not there."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "mumoe_tensor": mumoe_tensor.__version__,
        **{package: _version(package) for package in ("numpy", "torch", "tensorly")},
        "commit": _commit(),
    }


@dataclass(frozen=True)
class _Backend:
    """What the timed blocks need from a backend."""

    name: str
    array: Callable[[np.ndarray], Array]
    linear: Callable[[Array, Array, Array], Array]
    gelu: Callable[[Array], Array]
    context: Callable[[], AbstractContextManager[Any]]


def _numpy_linear(z: Array, matrix: Array, bias: Array) -> Array:
    y = z @ matrix
    y += bias
    return y


def _numpy_gelu(x: Array) -> Array:
    """GELU with tanh, as GPT-2 has it; in place where it can be, for memory traffic is what it costs."""
    y = x * x
    y *= x
    y *= 0.044715
    y += x
    y *= sqrt(2 / pi)
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= 0.5
    return y


def _backends() -> tuple[list[_Backend], dict[str, str]]:
    """The backends that are installed, and why others are left out."""
    found = [_Backend("numpy", lambda array: array, _numpy_linear, _numpy_gelu, nullcontext)]
    if find_spec("torch") is None:
        return found, {"torch": "not installed; pip install 'mumoe_tensor[torch]'"}
    import torch

    found.append(
        _Backend(
            "torch",
            torch.from_numpy,
            lambda z, matrix, bias: torch.addmm(bias, z, matrix),
            lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            torch.no_grad,
        )
    )
    return found, {}


def _inputs(sweep: Sweep) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs, and gates that give logits of variance one."""
    rng = np.random.default_rng(sweep.seed)
    i = sweep.layer.in_features
    z = rng.standard_normal((sweep.batch, i)).astype(DTYPE)
    return z, [(rng.standard_normal((i, n)) / sqrt(i)).astype(DTYPE) for n in sweep.experts]


def _weights(sweep: Sweep, subject: Subject) -> list[FactorizedTensor]:
    sizes = sweep.layer.sizes
    like = np.empty(0, DTYPE)
    return [
        FactorizedTensor.random(
            subject.format,
            experts=() if subject.name == BASELINE else sweep.experts,
            in_features=inner,
            out_features=outer,
            rank=subject.rank,
            bias=True,
            like=like,
            seed=sweep.seed + k,
        )
        for k, (inner, outer) in enumerate(pairwise(sizes))
    ]


def forward_pass(
    backend: _Backend,
    subject: Subject,
    weights: list[FactorizedTensor],
    gates: list[np.ndarray],
    inputs: np.ndarray,
) -> Callable[[], Array]:
    """Bind the forward pass of a subject to its arrays: what is timed, and nothing else."""
    z = backend.array(inputs)
    factors = [[backend.array(factor) for factor in weight.arrays] for weight in weights]
    if subject.name == BASELINE:
        layers = [(matrix[:-1], matrix[-1]) for (matrix,) in factors]

        def dense() -> Array:
            (matrix, bias), *rest = layers
            y = backend.linear(z, matrix, bias)
            for matrix, bias in rest:
                y = backend.linear(backend.gelu(y), matrix, bias)
            return y

        return dense
    factorized = [FactorizedTensor(subject.format, arrays) for arrays in factors]
    gate_matrices = [backend.array(gate) for gate in gates]

    def mixture() -> Array:
        coefficients = [entmax15(z @ gate) for gate in gate_matrices]
        first, *rest = factorized
        y = multilinear_moe(first, z, coefficients, bias=True)
        for weight in rest:
            y = multilinear_moe(weight, backend.gelu(y), coefficients, bias=True)
        return y

    return mixture


def _interleaved(
    forwards: dict[str, Callable[[], Array]],
    repetitions: int,
    seconds: float,
    tick: Callable[[int, str], None],
) -> dict[str, list[float]]:
    """Time all functions in rounds, each round starting with another one, after a round of warm-up."""
    names = list(forwards)
    times: dict[str, list[float]] = {name: [] for name in names}
    done, begin = 0, perf_counter()
    for turn in range(repetitions + 1):
        if turn > FEWEST_REPETITIONS and perf_counter() - begin > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = perf_counter()
            forwards[name]()
            times[name].append(perf_counter() - start)
            done += 1
            tick(done, name)
    return {name: measured[1:] for name, measured in times.items()}


def _spread(times: list[float], baseline: list[float]) -> dict[str, Any]:
    q1, median, q3 = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    reference = float(np.median(baseline))
    return {
        "repetitions": len(times),
        "seconds": median,
        "seconds_q1": q1,
        "seconds_q3": q3,
        "time_ratio": median / reference,
        "time_ratio_q1": q1 / reference,
        "time_ratio_q3": q3 / reference,
    }


def _figures(subject: Subject) -> dict[str, Any]:
    figures = subject.cost
    return {
        "name": subject.name,
        "title": subject.title,
        "rank": " ".join(map(str, subject.rank)),
        "fitted": subject.fitted,
        "parameters": figures.parameters,
        "gate_parameters": figures.gate_parameters,
        "flops": figures.flops,
        "peak_bytes": figures.peak,
        "saved_bytes": figures.saved,
        "max_expert_rank": figures.max_expert_rank,
    }


def _baseline(layer: Layer, figures: Cost) -> Subject:
    title = layer.kind[0].upper() + layer.kind[1:]
    return Subject(BASELINE, title, get_format("dense"), (), False, figures)


def _too_large(figures: Cost, memory: float) -> str:
    needed = (figures.parameters * ITEMSIZE[DTYPE] + figures.peak) / 2**30
    if needed <= memory:
        return ""
    return f"not run: needs {needed:.1f} GiB for parameters and intermediates, the limit is {memory:g} GiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return f"{platform.system()} {platform.machine()} {model}".strip()


def _commit() -> str | None:
    """Commit of the checkout this package lies in, ``-dirty`` if it was changed; None if it lies in none."""
    folder = Path(mumoe_tensor.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie in an environment within somebody else's checkout.
        if git("rev-parse", "--show-prefix") != f"{folder.name}/":
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
