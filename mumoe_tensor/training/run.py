"""A run: settings become a trained model, and a folder that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mumoe_tensor.files import NEW, alone_in, remove, replacing, whole_file
from mumoe_tensor.models.saved import save_model
from mumoe_tensor.training.checkpoint import Checkpoints, model_state
from mumoe_tensor.training.folder import MODEL, read_config
from mumoe_tensor.training.log import Evaluation, read_evaluations
from mumoe_tensor.training.processes import processes
from mumoe_tensor.training.settings import Settings
from mumoe_tensor.training.trainer import FREE, train

#: The tables of settings.
PARTS = ("data", "model", "train")
#: What a run leaves.
RESULTS = ("config.json", "metrics.csv", "tensorboard", "checkpoints", "model.safetensors")


def run(
    settings: Settings,
    folder: Path,
    *,
    fresh: bool = False,
    from_step: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the model of some settings and leave it in a folder.

    ``config.json`` has the settings, and the parameters and ranks of the model; ``metrics.csv`` a line an
    evaluation; ``tensorboard/`` the curves; ``checkpoints/`` what the same call goes on from after an
    interruption. ``model.safetensors``, for `load_model`, is written last, so where it is the run is done,
    and the same settings do nothing again. Of several processes only the first one writes.

    What is trained anew stands in a hidden folder, ``.new``, until it takes the place of a run that is done
    or begun. Interrupted, the same call goes on there, and a call without `fresh` with the older run.

    Parameters
    ----------
    settings : MixerRun or GPT2Run
    folder : Path
    fresh : bool, default False
        Train again what is done, begun, or was done with other settings.
    from_step : int, optional
        Go on from the checkpoint of this step, not from the last one.
    progress : bool, default False
        Show a bar with the time left (needs rich).

    Returns
    -------
    dict
        ``parameters``; ``ranks`` by their names; of the evaluation that the model is of, ``accuracy`` and
        ``validation_loss``; ``steps``, ``seconds`` of the training; ``trained``: whether it was trained now.

    Raises
    ------
    ValueError
        If the folder has a run of other settings, or one that is done where a step to go on from is given,
        or data and model do not fit together.
    FloatingPointError, DamagedCheckpoint
        See `train`.
    OSError
        See `train`; or if another process trains in the folder.
    """
    own = processes()
    told: dict[str, Any] = json.loads(json.dumps({"kind": settings.kind, **asdict(settings)}))
    if fresh and from_step is not None:
        raise ValueError(f"what is trained anew has no step to go on from, got from_step={from_step}.")
    if not fresh:
        done = _done(settings, folder, told, from_step)
        if done is not None:
            return done
    training, validation = settings.read_data()
    with torch.random.fork_rng():
        torch.manual_seed(settings.train.seed)
        model = settings.make_model().to(own.device)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "ranks": _ranks(model)}

    def go_on(place: Path) -> dict[str, Any]:
        if own.is_main_process:
            with whole_file(place / "config.json") as file:
                file.write(json.dumps({"settings": told, "model": about}, indent=2).encode())
        own.wait_for_everyone()
        evaluations = train(
            model, training, validation, settings.train, folder=place, from_step=from_step, progress=progress
        )
        # Trained by several processes, the model may be wrapped, and have a part of each weight.
        state = model_state(model)
        if own.is_main_process:
            whole: Any = settings.make_model("meta")
            whole.load_state_dict(state, assign=True)
            save_model(whole, place / "model.safetensors")
        own.wait_for_everyone()
        return {**about, **_figures(settings, evaluations), "trained": True}

    is_beside = fresh and any((folder / name).exists() for name in RESULTS)
    own.wait_for_everyone()
    if not own.is_main_process:
        return go_on(folder / NEW if is_beside else folder)
    with alone_in(folder, "checkpoints"):
        if is_beside:
            with replacing(folder, RESULTS, lambda new: _is_begun(new, told)) as new:
                return go_on(new)
        with _nothing_for_nothing(folder):
            return go_on(folder)


def _done(settings: Settings, folder: Path, told: dict[str, Any], from_step: int | None) -> Any:
    """What `run` returns of a run that is done; raises if it is one of other settings."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if not config.exists():
        return None
    known = read_config(config, MODEL)
    difference = _difference(known["settings"], told)
    # One that came to nothing keeps no other from its folder.
    if difference and (weights.exists() or Checkpoints(folder / "checkpoints").steps):
        raise ValueError(
            f"{config} is of a run of other settings ({difference}): give another folder, or --fresh."
        )
    if not weights.exists():
        return None
    if from_step is not None:
        raise ValueError(f"the run in {folder} is done, there is no step to go on from; see --fresh.")
    evaluations = read_evaluations(folder / "metrics.csv")
    return {**known["model"], **_figures(settings, evaluations), "trained": False}


def _is_begun(folder: Path, told: dict[str, Any]) -> bool:
    """Whether a folder has a checkpoint of a run of these settings."""
    if not Checkpoints(folder / "checkpoints").steps:
        return False
    try:
        known = read_config(folder / "config.json", MODEL)
    except (OSError, ValueError):
        return False
    return _difference(known["settings"], told) is None


@contextmanager
def _nothing_for_nothing(folder: Path) -> Iterator[None]:
    """Leave nothing of a run that was begun here, and stopped before its first checkpoint."""
    before = [name for name in RESULTS if (folder / name).exists()]
    try:
        yield
    except BaseException:
        if not before and not Checkpoints(folder / "checkpoints").steps:
            for name in RESULTS:
                remove(folder / name)
        raise


def _ranks(model: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = asdict(model.config)  # type: ignore[call-overload]
    ranks = {name: value for name, value in config.items() if name.endswith("rank")}
    return {name: None if value is None else list(value) for name, value in ranks.items()}


def _figures(settings: Settings, evaluations: list[Evaluation]) -> dict[str, Any]:
    best = [e for e in evaluations if e.is_best] if settings.train.keep == "best" else evaluations
    return {
        "accuracy": best[-1].accuracy,
        "validation_loss": best[-1].validation_loss,
        "steps": evaluations[-1].step,
        "seconds": sum(e.seconds for e in evaluations),
    }


def _difference(known: dict[str, Any], told: dict[str, Any]) -> str | None:
    """Words for the first setting that is another one and makes a difference."""
    flat = [
        {"kind": given.get("kind")}
        | {f"{part}.{name}": value for part in PARTS for name, value in dict(given.get(part, {})).items()}
        for given in (known, told)
    ]
    free = {f"train.{name}" for name in FREE}
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        there, here = (values.get(name) for values in flat)
        if there != here and name not in free:
            return f"{name} is {there!r} there, {here!r} here"
    return None
