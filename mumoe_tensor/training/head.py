"""Training a head on features, or a head together with its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mumoe_tensor.configs.head import HeadConfig
from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.models.heads import Head, load_head, save_head
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.nn.weights import write_tensors
from mumoe_tensor.readers import reading
from mumoe_tensor.training.data import Dataset, read_images, read_npz, split
from mumoe_tensor.training.features import extract
from mumoe_tensor.training.images import ImageFiles, Images, Scaled, class_folders
from mumoe_tensor.training.job import Job, made, parameters_of
from mumoe_tensor.training.log import Evaluation
from mumoe_tensor.training.trainer import train


@dataclass(frozen=True)
class HeadSetting(HeadConfig):
    """Settings of a head, its data (see `.HeadConfig`) and its training; `.run.run` trains it.

    Attributes
    ----------
    inputs : str
        An ``.npz`` file with x and y: features, see `read_npz`, or images, see `read_images`. With `labels`,
        an IDX file of images. Or a folder with a subfolder of images for each class.
    head : dict
        Arguments of `.models.Head` except `in_features` and `classes`.
    training : TrainConfig
        See `.TrainConfig.for_rows`.
    """

    kind: ClassVar[str] = "head"
    result: ClassVar[str] = "head.safetensors"
    inputs: str
    head: dict[str, Any]
    training: TrainConfig

    def read_data(self) -> Images:
        """The features or, with a backbone, images, with their labels.

        Raises
        ------
        ValueError
            See `read_npz`, `read_images` and `class_folders`.
        """
        if self.backbone is None:
            return read_npz(self.inputs)
        if Path(self.inputs).is_dir():
            return ImageFiles(class_folders(self.inputs, self.labels)[0], Scaled(self.size))
        return read_images(self.inputs, self.labels)

    @property
    def train(self) -> TrainConfig:
        """The training settings."""
        return self.training

    def job(self, *, progress: bool = False) -> Job:
        """Read the data and make the head, centred on the features and initialized with the seed.

        Raises
        ------
        ValueError
            If the data does not match the settings.
        """
        data = self.read_data()
        classes = data.classes
        if classes < 2:
            raise ValueError(f"labels must have at least two classes; those of {self.inputs} are all 0.")
        backbone = None
        if self.backbone is not None and self.weights is not None:
            backbone = load_backbone(self.backbone, self.weights, self.size)
            if not self.train_backbone:
                data, backbone = extract(backbone, data, progress=progress), None
        elif isinstance(data, Dataset):
            data = Dataset(data.x.flatten(1), data.y)
        training, validation = split(data, self.validation, seed=0)
        features = extract(backbone or nn.Identity(), training, progress=progress).x
        make = partial(Head, features.shape[1], classes, **self.head)
        head = made(make, self.training.seed, parameters_of(make))
        head.centre_on(features)
        model = head if backbone is None else nn.Sequential(backbone, head)
        return Job(model, training, validation, self.training.for_rows(len(training)))

    def about(self, model: Any) -> dict[str, Any]:
        """Parameter count, rank and hidden size of the head."""
        head = model[1] if self.train_backbone else model
        return {
            "parameters": num_parameters(head),
            "rank": head.config.get("rank"),
            "hidden": head.config["hidden"],
        }

    def save(self, model: Any, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained head, after the backbone if that was trained too."""
        head = model
        if self.train_backbone:
            _, head = model
            backbone, state = (
                {name[2:]: value for name, value in state.items() if name.startswith(part)}
                for part in ("0.", "1.")
            )
            write_tensors(folder / "backbone.safetensors", backbone, {})
        with torch.device("meta"):
            whole = Head(**head.config)
        whole.load_state_dict(state, assign=True)
        save_head(whole, folder / self.result)

    def load(self, folder: Path) -> Head:
        """Read the trained head; raises a ValueError if it does not match the settings."""
        head = load_head(folder / self.result)
        with reading(folder / self.result):
            for name, asked in self.head.items():
                there = head.config.get(name, asked)
                if name in ("format", "gate", "gate_norm", "init") and there != asked:
                    raise ValueError(
                        f"the head must match config.json; {name} is {there!r} in the head, {asked!r} "
                        "in the config."
                    )
        return head


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
    """Train a head and its backbone together.

    The head is centred on the features of the initial backbone.

    Parameters
    ----------
    backbone : Module
        Maps inputs of shape (rows, ...) to features of shape (rows, features).
    head : Head
    data, validation : Dataset
        Inputs of the backbone, with labels.
    config : TrainConfig
    progress : bool, default False

    Returns
    -------
    list of Evaluation
    """
    head.centre_on(extract(backbone, data, progress=progress).x)
    return train(nn.Sequential(backbone, head), data, validation, config, progress=progress)
