"""A run: train a model from settings, and write it to a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mumoe_tensor.configs.training import completed
from mumoe_tensor.files import NEW, alone_in, remove, replacing, whole_file
from mumoe_tensor.readers import checked, read_json, reading
from mumoe_tensor.training.checkpoint import Checkpoints, model_state
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.log import Evaluation, read_evaluations
from mumoe_tensor.training.processes import processes
from mumoe_tensor.training.settings import Settings, settings_of
from mumoe_tensor.training.trainer import FREE, train

#: Keys of settings whose value is a `TrainConfig`.
TRAINING = ("train", "training")
#: Files of a run.
RESULTS = (
    "config.json", "metrics.csv", "tensorboard", "checkpoints", "backbone.safetensors", "head.safetensors",
    "model.safetensors",
)  # fmt: skip


def run(
    settings: Settings | HeadSetting,
    folder: Path,
    *,
    fresh: bool = False,
    from_step: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a model from settings, and write it to a folder.

    ``config.json`` contains the settings, the parameter count and the ranks, ``metrics.csv`` a line for
    each evaluation, ``tensorboard/`` the curves, and ``checkpoints/`` the state from which the same call
    resumes after an interruption. ``model.safetensors``, for `load_model`, or ``head.safetensors``, for
    `load_head`, is written last and marks a finished run: another call with the same settings trains nothing.
    With several processes, only the first writes.

    With `fresh`, the new run is written to a hidden folder, ``.new``, and replaces the old run when it is
    finished. If it is interrupted, the same call resumes it; a call without `fresh` resumes the old run.

    Parameters
    ----------
    settings : MixerRun, GPT2Run or HeadSetting
    folder : Path
    fresh : bool, default False
        Train from the start, even if the folder has a run, finished or not, of these or other settings.
    from_step : int, optional
        Resume from the checkpoint of this step instead of the last one.
    progress : bool, default False
        Show a progress bar (needs rich).

    Returns
    -------
    dict
        ``parameters``; ``ranks``, by name, or for a head ``rank`` and ``hidden``; ``accuracy``,
        ``validation_loss`` and ``epoch`` of the evaluation whose weights the model has; ``steps`` and
        ``seconds`` of the training; and ``trained``, whether this call trained it.

    Raises
    ------
    ValueError
        If the folder has a run of other settings, the run is finished but `from_step` is given, or the data
        does not match the model.
    FloatingPointError, DamagedCheckpoint
        See `train`.
    OSError
        See `train`; also if another process is training in the folder.
    """
    own = processes()
    described: dict[str, Any] = json.loads(json.dumps({"kind": settings.kind, **asdict(settings)}))
    if fresh and from_step is not None:
        raise ValueError(f"fresh=True and from_step cannot be combined, got from_step={from_step}.")
    with alone_in(folder, "checkpoints") if own.is_main_process else nullcontext():
        own.wait_for_everyone()
        if not fresh and (figures := _done(settings, folder, described, from_step)) is not None:
            return figures
        model, training, validation, config = settings.job(progress=progress)
        model.to(own.device)
        about = settings.about(model)
        is_beside = fresh and any((folder / name).exists() for name in RESULTS)
        own.wait_for_everyone()
        place: AbstractContextManager[Path]
        if not own.is_main_process:
            place = nullcontext(folder / NEW if is_beside else folder)
        elif is_beside:
            place = replacing(folder, RESULTS, partial(_is_begun, described=described))
        else:
            place = _nothing_for_nothing(folder)
        with place as out:
            if own.is_main_process and not _is_begun(out, described):
                with whole_file(out / "config.json") as file:
                    file.write(json.dumps({"settings": described, "model": about}, indent=2).encode())
            own.wait_for_everyone()
            evaluations = train(
                model, training, validation, config, folder=out, from_step=from_step, progress=progress
            )
            # With several processes, the model may be wrapped and hold only a shard of each weight.
            state = model_state(model)
            if own.is_main_process:
                settings.save(model, state, out)
            own.wait_for_everyone()
            return {**about, **_figures(settings, evaluations), "trained": True}


def _done(
    settings: Settings | HeadSetting, folder: Path, described: dict[str, Any], from_step: int | None
) -> Any:
    """The result of `run` for a finished run; raises if the run had other settings."""
    config = folder / "config.json"
    if not config.exists():
        return None
    written = read_config(config)
    difference = _difference(written["settings"], described)
    # A run without a checkpoint does not block its folder.
    is_done = any((folder / name).exists() for name in ("head.safetensors", "model.safetensors"))
    if difference and (is_done or Checkpoints(folder / "checkpoints").steps):
        raise ValueError(
            f"{config} is from a run with other settings ({difference}); choose another folder, or --fresh."
        )
    if not is_done:
        return None
    if from_step is not None:
        raise ValueError(f"the run in {folder} is finished and cannot resume from a step; see --fresh.")
    evaluations = read_evaluations(folder / "metrics.csv")
    return {**written["model"], **_figures(settings, evaluations), "trained": False}


def _is_begun(folder: Path, described: dict[str, Any]) -> bool:
    """Whether a folder has a checkpoint of a run with these settings."""
    if not Checkpoints(folder / "checkpoints").steps:
        return False
    try:
        written = read_config(folder / "config.json")
    except (OSError, ValueError):
        return False
    return _difference(written["settings"], described) is None


@contextmanager
def _nothing_for_nothing(folder: Path) -> Iterator[Path]:
    """The folder; remove the files of a new run that stops before its first checkpoint."""
    before = [name for name in RESULTS if (folder / name).exists()]
    try:
        yield folder
    except BaseException:
        if not before and not Checkpoints(folder / "checkpoints").steps:
            for name in RESULTS:
                remove(folder / name)
        raise


def _figures(settings: Settings | HeadSetting, evaluations: list[Evaluation]) -> dict[str, Any]:
    best = [e for e in evaluations if e.is_best] if settings.train.keep == "best" else evaluations
    return {
        "accuracy": best[-1].accuracy,
        "validation_loss": best[-1].validation_loss,
        "epoch": best[-1].epoch,
        "steps": evaluations[-1].step,
        "seconds": sum(e.seconds for e in evaluations),
    }


def _difference(written: dict[str, Any], described: dict[str, Any]) -> str | None:
    """A phrase for the first setting that differs and affects the result."""
    flat: list[dict[str, Any]] = [{}, {}]
    for values, given in zip(flat, (written, described), strict=True):
        for part, value in given.items():
            entries = value if isinstance(value, dict) else {}
            if part in TRAINING:
                entries = completed(entries)
            values |= {f"{part}.{name}": entry for name, entry in entries.items()} or {part: value}
    free = {f"{part}.{name}" for part in TRAINING for name in FREE}
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        there, here = (values.get(name) for values in flat)
        if there != here and name not in free:
            return f"{name} is {there!r} there, {here!r} here"
    return None


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read a run's config.json: the ``settings``, with their ``kind``, and the size of the ``model``.

    Raises
    ------
    ValueError
        If the file is not one.
    """
    config = read_json(path)
    with reading(path):
        if set(config) == {"setting", "head"} and isinstance(config["setting"], dict):
            # Earlier versions wrote heads in this form.
            config = {"settings": {"kind": "head", **config["setting"]}, "model": config["head"]}
        if set(config) != {"settings", "model"} or not all(isinstance(v, dict) for v in config.values()):
            raise ValueError(f"a run has the keys settings and model; this one has {sorted(config)}.")
    data = config["settings"].get("data")
    if isinstance(data, dict) and "inputs" in data:
        # Version 0.1 did not scale the images of .npz files, and always scaled others.
        data.setdefault("scale", not str(data["inputs"]).endswith(".npz"))
    return config


def read_run(folder: str | Path) -> tuple[Settings | HeadSetting, nn.Module]:
    """Read the settings and the trained model of a run.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    MixerRun, GPT2Run or HeadSetting
    Module
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        If the folder has no finished run, or one of its files is corrupt.
    """
    config = Path(folder) / "config.json"
    _need(config)
    recorded = dict(read_config(config)["settings"])
    with reading(config):
        if recorded.get("kind") == HeadSetting.kind:
            del recorded["kind"]
            settings: Settings | HeadSetting = checked(HeadSetting, recorded)
        else:
            settings = settings_of(recorded)
    _need(config.with_name(settings.result))
    return settings, settings.load(Path(folder))


def _need(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path.parent} must contain a finished run; it has no {path.name}.")
