"""Train and evaluate the runs of a grid, and add each to a table."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, replace
from functools import cached_property, lru_cache, partial
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mumoe_tensor.files import alone_in, whole_file
from mumoe_tensor.jobs import side_by_side
from mumoe_tensor.ledger import Ledger, Row
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.nn.watch import module_of
from mumoe_tensor.progress import Progress
from mumoe_tensor.readers import read_json
from mumoe_tensor.replace.activations import Activations
from mumoe_tensor.replace.evaluation import Bounds, bounds, evaluate
from mumoe_tensor.replace.grid import FRONTIER, TUNING, Grid, Run
from mumoe_tensor.replace.language import Windows, load_language_model, read_texts, windows
from mumoe_tensor.replace.place import SavedPlace, save_in_place
from mumoe_tensor.replace.shards import MANIFEST
from mumoe_tensor.replace.training import Fit, fit

PARTS = ("training", "validation", "test")
#: Settings of a grid that a later call may extend.
GROWING = ("places", "arms")


def run_grid(
    model: str | Path,
    texts: Sequence[str | Path],
    grid: Grid,
    folder: str | Path,
    *,
    jobs: int | str = 1,
    progress: Progress | None = None,
) -> list[Row]:
    """Train and evaluate every layer of a grid, with one row per run in a table.

    ``frontier.csv`` contains the results, ``tuning.csv`` the runs that choose learning rates, and ``layers/``
    the layers, each in a folder that `mumoe_tensor.nn.load` and ``mumoe-tensor inspect`` read. After an
    interruption, the same call resumes. Runs with a row are not repeated, and activations are collected only
    if a run needs them.

    Parameters
    ----------
    model : str or Path
        See `.load_language_model`.
    texts : sequence of str or Path
        Paths of texts for training, validation and test; see `.read_texts`.
    grid : Grid
        A later call may add places, seeds and arms, and change arms without rows. If it adds places, the
        activations of all places are collected again.
    folder : str or Path
    jobs : int or str, default 1
        Number of parallel runs. If greater than one, each run is a process with one thread; see
        `.side_by_side`.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    list of dict
        The rows of ``frontier.csv``. ``ce`` is the cross entropy of the test texts, in nats per token, with
        the layer in place. ``rise`` is its increase over the intact model, ``half`` the half-width of the 95
        % interval of the rise over documents, and ``rise_zeroed`` the rise with the module's outputs replaced
        by zeros.

    Raises
    ------
    ValueError
        If the folder has results of another grid, model or texts, or a layer cannot be made.
    """
    job = _Job(Path(model), tuple(map(Path, texts)), grid, Path(folder))
    with alone_in(job.folder):
        tuning = Ledger(job.folder / "tuning.csv", TUNING)
        frontier = Ledger(job.folder / "frontier.csv", FRONTIER)
        job.check({row["arm"] for table in (tuning, frontier) for row in table})
        _go_through(job, "tune", [*grid.tuning_runs()], tuning, jobs, progress)
        chosen = [grid.chosen(run, tuning) for run in grid.runs()]
        _go_through(job, "test", chosen, frontier, jobs, progress)
    return list(frontier)


class _Job:
    """The data shared by all runs. A process reads the model and the texts once, when it needs them."""

    def __init__(self, model: Path, texts: tuple[Path, ...], grid: Grid, folder: Path):
        if len(texts) != len(PARTS):
            raise ValueError(f"texts must have paths for {', '.join(PARTS)}, got {len(texts)} path(s).")
        self.grid, self.folder, self._source, self._paths = grid, folder, model, texts
        self._bounds: dict[str, Bounds] = {}
        self._limits: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process reads the model and the texts itself.
        return {name: value for name, value in vars(self).items() if name not in ("_language", "_windows")}

    @cached_property
    def _language(self) -> tuple[nn.Module, Any]:
        return load_language_model(self._source)

    @cached_property
    def _windows(self) -> dict[str, Windows]:
        tokenizer, context = self._language[1], self.grid.context
        parts = {
            part: windows(read_texts(path), tokenizer, context)
            for part, path in zip(PARTS, self._paths, strict=True)
        }
        if len(set(parts["test"].documents)) < 2:
            raise ValueError(
                f"an interval over documents needs at least two with {context} tokens; {self._paths[2]} has "
                "one."
            )
        return parts

    def check(self, done: Set[str]) -> None:
        """Check that the folder has results of the same grid, and that texts and layers can be made.

        Then write the settings that the results depend on. Arms may change as long as they have no results.

        Parameters
        ----------
        done : set of str
            Arms that have rows.
        """
        sources = {"model": str(self._source), "texts": [str(path) for path in self._paths]}
        now = json.loads(json.dumps(sources | asdict(self.grid)))
        path = self.folder / "grid.json"
        before = read_json(path) if path.exists() else {}
        arms = before.get("arms", {})
        others = [name for name in now["arms"] if now["arms"][name] != arms.get(name, now["arms"][name])]
        if before:
            changed = [name for name in now if name not in GROWING and now[name] != before.get(name)]
            changed += [name for name in others if name in done]
            if changed:
                raise ValueError(
                    f"a folder must contain the results of one grid; {', '.join(changed)} differ from those "
                    f"in {path}: choose another folder."
                )
        now["arms"] = arms | now["arms"]  # arms of earlier calls have rows too
        if before == now:
            return
        model, _ = self._language
        assert self._windows
        for run in {(run.module, run.arm): run for run in self.grid.runs()}.values():
            self._make(run, model)
        if others:  # their unfinished runs have other settings
            shutil.rmtree(self.folder / "runs", ignore_errors=True)
        with whole_file(path) as file:
            file.write(json.dumps(now, indent=2).encode())

    def _make(self, run: Run, model: nn.Module) -> Any:
        """The untrained layer, initialised with the run's seed."""
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            try:
                block = module_of(model, run.module)
                return self.grid.arms[run.arm].make(block, run.k, self.grid.parameters)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{run.arm} cannot be made for {run.module}: {error}") from error

    def collect(self, progress: Progress | None) -> None:
        """Write the activations of all places, unless they exist."""
        places = [place.module for place in self.grid.places]
        for part in PARTS[:2]:
            texts, store = self._windows[part].tokens, self._store(part)
            there = read_json(store / MANIFEST)["modules"] if (store / MANIFEST).exists() else []
            if not {*places} <= {*there}:  # one pass collects all places
                shutil.rmtree(store, ignore_errors=True)
                there = places
            Activations.collect(self._language[0], there, texts, store, progress=progress)

    def _store(self, part: str) -> Path:
        return self.folder / "activations" / part

    def _limit(self, module: str) -> float:
        """The largest output norm of a module that a layer replaces."""
        if self.grid.massive is None:
            return inf
        if module not in self._limits:
            rows = Activations(self._store(PARTS[0]))[module]
            self._limits[module] = self.grid.massive * rows.median_norm
        return self._limits[module]

    def tune(self, run: Run) -> Row:
        """Return a row of tuning.csv; its error is infinite if training diverges."""
        seconds: float | None = None
        try:
            layer, fitted, seconds = self._trained(run, self.folder / "runs" / run.name)
            measured = {"nmse": fitted.nmse, "active": fitted.active or 0.0, "dead": len(fitted.dead)}
        except FloatingPointError:
            layer = self._make(run, self._language[0])
            measured = {"nmse": inf, "active": inf, "dead": 0}
        shutil.rmtree(self.folder / "runs" / run.name)
        return {**run.key, **_sizes(layer), **measured, "seconds": seconds}

    def test(self, run: Run) -> Row:
        """Return a row of frontier.csv, and save the layer."""
        layer, _, seconds = self._trained(run, self.folder / "runs" / run.name)
        model, (texts, documents) = self._language[0], self._windows["test"]
        limit = self._limit(run.module)
        if run.module not in self._bounds:
            self._bounds[run.module] = bounds(model, run.module, texts, limit=limit)
        result = evaluate(model, run.module, layer, texts, bounds=self._bounds[run.module], limit=limit)
        rise, half = result.of_documents(documents).interval()
        place = SavedPlace(
            str(self._source.resolve()),
            run.module,
            str(self._paths[2].resolve()),
            self.grid.context,
            limit if isfinite(limit) else None,
        )
        save_in_place(layer, place, self.folder / "layers" / run.name)
        shutil.rmtree(self.folder / "runs" / run.name)
        measured = {"nmse": result.nmse, "active": result.active or 0.0, "dead": len(result.dead)}
        return {
            **run.key, **_sizes(layer), **measured, "relative_error": result.relative_error, "ce": result.ce,
            "rise": rise, "half": half, "rise_zeroed": result.ce_zeroed - result.ce_intact,
            "seconds": seconds,
        }  # fmt: skip

    def _trained(self, run: Run, folder: Path) -> tuple[Any, Fit, float]:
        """Train a layer; an interrupted training run resumes in its folder."""
        training, validation = (
            Activations(self._store(part))[run.module].below(self._limit(run.module)) for part in PARTS[:2]
        )
        layer = self._make(run, self._language[0])
        config = replace(self.grid.train, learning_rate=run.learning_rate, seed=run.seed)
        try:
            fitted = fit(layer, training, config, validation=validation, folder=folder, penalty=run.penalty)
        except FloatingPointError as error:
            raise FloatingPointError(f"{run.name}: {error}") from error
        return layer, fitted, sum(evaluation.seconds for evaluation in fitted.evaluations)


def _sizes(layer: Any) -> Row:
    return {
        "parameters": num_parameters(layer),
        "experts": prod(layer.num_experts) if layer.num_experts else 0,
    }


def _go_through(
    job: _Job, stage: str, runs: Sequence[Run], table: Ledger, jobs: int | str, progress: Progress | None
) -> None:
    """Make the runs that are missing in the table."""
    left = [run for run in runs if not table.has(run=run.name)]
    tell = progress or (lambda done, total, text: None)
    if left:
        job.collect(progress)
    for count, (run, row) in enumerate(_rows(job, stage, left, jobs), len(runs) - len(left) + 1):
        table.add([row])
        tell(count, len(runs), run.name)


def _rows(job: _Job, stage: str, runs: Sequence[Run], jobs: int | str) -> Iterator[tuple[Run, Row]]:
    work = getattr(job, stage) if jobs == 1 else partial(_do, pickle.dumps(job), stage)
    for number, row in side_by_side([partial(work, run) for run in runs], jobs):
        yield runs[number], row


def _do(job: bytes, stage: str, run: Run) -> Row:
    return getattr(_received(job), stage)(run)


@lru_cache(maxsize=1)
def _received(job: bytes) -> _Job:
    """In a worker process: the job, which reads the model once for all of its runs."""
    torch.set_num_threads(1)
    return pickle.loads(job)
