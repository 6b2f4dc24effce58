"""Training of a head on features, or of a head with the network below it, and the folder that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mumoe_tensor.files import alone_in, replacing, whole_file
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.models.heads import Head, save_head
from mumoe_tensor.nn.weights import write_tensors
from mumoe_tensor.training.config import TrainConfig
from mumoe_tensor.training.data import Dataset, read_images, read_npz, split
from mumoe_tensor.training.features import extract
from mumoe_tensor.training.folder import HEAD, read_config
from mumoe_tensor.training.log import Evaluation, read_evaluations, write_evaluations
from mumoe_tensor.training.memory import check_memory, made, parameters_of
from mumoe_tensor.training.trainer import train

#: What a run leaves.
RESULTS = ("config.json", "metrics.csv", "backbone.safetensors", "head.safetensors")


@dataclass(frozen=True)
class HeadSetting:
    """Everything that a run of `run_head` depends on.

    Attributes
    ----------
    inputs : str
        An ``.npz`` file with x and y, features as `read_npz` reads them or images as `read_images`; or with
        `labels` a file of images in IDX.
    labels : str or None
    backbone, weights : str or None
        Where inputs are images: the network below the head, see `load_backbone`.
    size : int
        Height and width that images are scaled to.
    train_backbone : bool
        Train the network too, not the head alone.
    head : dict
        Arguments of `.models.Head` but `in_features` and `classes`.
    validation : float
        Share of the rows that are kept for validation.
    training : TrainConfig
        See `.TrainConfig.for_rows`.

    Raises
    ------
    ValueError
        If choices do not fit together.
    """

    inputs: str
    head: dict[str, Any]
    training: TrainConfig
    labels: str | None = None
    backbone: str | None = None
    weights: str | None = None
    size: int = 64
    train_backbone: bool = False
    validation: float = 0.2

    def __post_init__(self) -> None:
        if (self.backbone is None) != (self.weights is None):
            raise ValueError(
                "a backbone is told by its name and a file of weights, got "
                f"backbone={self.backbone!r} and weights={self.weights!r}."
            )
        if self.backbone is None and (self.train_backbone or self.labels is not None):
            raise ValueError("images need a backbone below the head; without one inputs are features.")
        if self.size < 1:
            raise ValueError(f"the size of images must be positive, got {self.size}.")

    def read_data(self) -> Dataset:
        """Features, or where there is a backbone images, with their labels.

        Raises
        ------
        ValueError
            See `read_npz` and `read_images`.
        """
        return read_npz(self.inputs) if self.backbone is None else read_images(self.inputs, self.labels)


def train_head(
    head: Head, data: Dataset, validation: Dataset, config: TrainConfig, *, progress: bool = False
) -> list[Evaluation]:
    """Centre a head on features and train it.

    Parameters
    ----------
    head : Head
    data, validation : Dataset
        Features of shape (rows, features).
    config : TrainConfig
    progress : bool, default False

    Returns
    -------
    list of Evaluation
    """
    head.centre_on(data.x)
    return train(head, data, validation, config, progress=progress)


def fine_tune(
    backbone: nn.Module,
    head: Head,
    data: Dataset,
    validation: Dataset,
    config: TrainConfig,
    *,
    progress: bool = False,
) -> list[Evaluation]:
    """Train a head and the network below it, together.

    The head is centred on the features that the network has at first.

    Parameters
    ----------
    backbone : Module
        Maps inputs of shape (rows, ...) to features of shape (rows, features).
    head : Head
    data, validation : Dataset
        Of inputs of the backbone.
    config : TrainConfig
    progress : bool, default False

    Returns
    -------
    list of Evaluation
    """
    head.centre_on(extract(backbone, data, progress=progress).x)
    return train(nn.Sequential(backbone, head), data, validation, config, progress=progress)


def run_head(
    setting: HeadSetting,
    folder: Path,
    *,
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the head of a setting and leave it in a folder.

    ``config.json`` is the setting with the solved rank, ``metrics.csv`` has a line an epoch, and
    ``head.safetensors`` is for `load_head`. A trained backbone is in ``backbone.safetensors``. They appear,
    and take the place of an older run's, once all are whole; where they are, the same setting does nothing
    again.

    Parameters
    ----------
    setting : HeadSetting
    folder : Path
    fresh : bool, default False
        Train again what is done, or was done with another setting.
    progress : bool, default False
        Show bars with the time left (needs rich).

    Returns
    -------
    dict
        ``accuracy`` and ``validation_loss`` of the best epoch, its number, ``parameters``, ``rank``, and
        ``trained``: whether it was trained just now.

    Raises
    ------
    ValueError
        If the folder has a run of another setting, or data and setting do not fit together.
    OSError
        If another process writes into the folder, or the results cannot be written.
    """
    if not fresh and (done := _done(setting, folder)) is not None:
        return done
    data = setting.read_data()
    classes = data.classes
    if classes < 2:
        raise ValueError(f"labels must be of two classes or more; those of {setting.inputs} are all 0.")
    backbone = None
    if setting.backbone is not None and setting.weights is not None:
        backbone = load_backbone(setting.backbone, setting.weights, setting.size)
        if not setting.train_backbone:
            data = extract(backbone, data, progress=progress)
    elif data.x.ndim != 2:
        data = Dataset(data.x.flatten(1), data.y)
    training, validation = split(data, setting.validation, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(setting.training.seed)
        width = (
            extract(backbone, training.rows(torch.arange(1))).x.shape[1]
            if backbone is not None and setting.train_backbone
            else data.x.shape[1]
        )
        make = partial(Head, width, classes, **setting.head)
        with torch.device("meta"):
            check_memory(parameters_of(make))
        head = made(make)
    config = setting.training.for_rows(len(training))
    about = {
        "parameters": sum(p.numel() for p in head.parameters()),
        "rank": head.config.get("rank"),
        "hidden": head.config["hidden"],
    }
    with alone_in(folder):
        # (Another process may have finished one while the data were read.)
        if not fresh and (done := _done(setting, folder)) is not None:
            return done
        if backbone is not None and setting.train_backbone:
            epochs = fine_tune(backbone, head, training, validation, config, progress=progress)
        else:
            epochs = train_head(head, training, validation, config, progress=progress)
        with replacing(folder, RESULTS) as new:
            with whole_file(new / "config.json") as file:
                file.write(json.dumps({"setting": asdict(setting), "head": about}, indent=2).encode())
            write_evaluations(epochs, new / "metrics.csv")
            if backbone is not None and setting.train_backbone:
                write_tensors(new / "backbone.safetensors", backbone.state_dict(), {})
            save_head(head, new / "head.safetensors")
    return {**_best(epochs), **about, "trained": True}


def _done(setting: HeadSetting, folder: Path) -> dict[str, Any] | None:
    """What `run_head` returns of a run that is done; raises if it is one of another setting."""
    if not (folder / "config.json").exists():
        return None
    recorded = read_config(folder / "config.json", HEAD)
    if not (folder / "head.safetensors").exists():
        return None
    if recorded["setting"] != json.loads(json.dumps(asdict(setting))):
        raise ValueError(f"{folder} has a run of another setting: give another folder, or --fresh.")
    return {**_best(read_evaluations(folder / "metrics.csv")), **recorded["head"], "trained": False}


def _best(epochs: list[Evaluation]) -> dict[str, Any]:
    best = [epoch for epoch in epochs if epoch.is_best][-1]
    return {"accuracy": best.accuracy, "validation_loss": best.validation_loss, "epoch": best.epoch}
