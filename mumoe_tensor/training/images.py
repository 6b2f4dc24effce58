"""Labelled images to train on: arrays in one file, or folders with one file per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.selections import Selection, read_selection
from mumoe_tensor.training.data import Dataset, read_images, read_npz, split

#: Means and standard deviations of ImageNet's colour channels, on a scale from 0 to 1, for normalization.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Validation images are resized to this multiple of the input size before their centre is cropped.
MARGIN = 256 / 224

#: An image file and its class index.
LabelledFile = tuple[Path, int]


@dataclass(frozen=True)
class ImageData:
    """The location of images, and the choice of those for validation.

    Attributes
    ----------
    inputs : str
        An ``.npz`` file with x and y, see `read_images`. With `labels`, an IDX file of images. Or a folder
        with a subfolder of images for each class, see `class_folders` (needs torchvision).
    labels : str or None
        An IDX file of labels.
    validation : float or str
        Fraction of the images, drawn at random; or, if `inputs` is a folder, another folder with the same
        classes.
    seed : int
        Seed of that draw.
    augment : tuple of two int, or None
        Only for a folder: the number of RandAugment operations (Cubuk et al., 2020) applied to an image, and
        their magnitude, from 0 to 30. Training images from a folder are always randomly cropped and flipped.
    scale : bool
        Only for an ``.npz`` file: False takes any finite values unscaled, such as standardized images.
    """

    inputs: str
    labels: str | None = None
    validation: float | str = 0.1
    seed: int = 0
    augment: tuple[int, int] | None = None
    scale: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.validation, str) and not 0 < self.validation < 1:
            raise ValueError(f"validation must be a fraction between 0 and 1, got {self.validation}.")
        if self.augment is not None and (self.augment[0] < 1 or not 0 <= self.augment[1] <= 30):
            raise ValueError(
                f"augment must be a number of operations and a magnitude from 0 to 30, got {self.augment}."
            )
        if not self.scale and self.labels is not None:
            raise ValueError("scale=False can only be used with an .npz file; IDX images are always scaled.")

    def read(self, size: int) -> tuple[Images, Images]:
        """Read images for training and for validation, of shape (rows, channels, height, width).

        Parameters
        ----------
        size : int
            Height and width of the transformed images of a folder.

        Raises
        ------
        ValueError
            If the attributes are inconsistent, or as in `read_images` and `split`.
        FileNotFoundError
            If `inputs` does not exist.
        ImportError
            If `inputs` is a folder and torchvision is not installed.
        """
        if Path(self.inputs).is_dir():
            return self._folders(size)
        if not Path(self.inputs).exists():
            raise FileNotFoundError(
                f"{self.inputs} does not exist; `mumoe-tensor data` fetches images into data/."
            )
        if isinstance(self.validation, str) or self.augment is not None:
            raise ValueError(
                "a validation folder and augment can only be used with a folder of images; for a file, "
                f"validation must be a fraction of the images; got the inputs {self.inputs}."
            )
        data = read_images(self.inputs, self.labels) if self.scale else read_npz(self.inputs)
        if data.x.ndim not in (3, 4):
            raise ValueError(
                "images must have shape (rows, height, width) or (rows, channels, height, width); those of "
                f"{self.inputs} have shape {tuple(data.x.shape)}."
            )
        if data.x.ndim == 3:
            data = Dataset(data.x[:, None], data.y)
        return split(data, self.validation, seed=self.seed)

    def _folders(self, size: int) -> tuple[Images, Images]:
        files, classes = class_folders(self.inputs, self.labels)
        training = ImageFiles(files, _training_transform(size, self.augment))
        if isinstance(self.validation, str):
            files, others = class_folders(self.validation)
            if others != classes:
                raise ValueError(
                    f"both folders must have the same classes; {self.inputs} has {len(classes)}, "
                    f"{self.validation} has {len(others)}, and some are in only one of the two."
                )
            validation = ImageFiles(files, training.transform)
        else:
            training, validation = split(training, self.validation, seed=self.seed)
        return training, replace(validation, transform=_validation_transform(size))


def class_folders(folder: str | Path, labels: str | None = None) -> tuple[list[LabelledFile], list[str]]:
    """List the images of a folder with a subfolder for each class, sorted by path.

    Parameters
    ----------
    folder : str or Path
        The label of an image is the index of its subfolder in order of name. Subfolders are searched
        recursively.
    labels : str, optional
        Must be None: the subfolders are the labels.

    Returns
    -------
    list of (Path, int)
        Files and their labels.
    list of str
        Names of the classes.

    Raises
    ------
    ValueError
        If there are no subfolders, one has no images, or `labels` is given.
    """
    if labels is not None:
        raise ValueError(
            f"labels must be None for a folder of images, whose subfolders are the classes; got {labels} for "
            f"{folder}."
        )
    from PIL import Image

    kinds = Image.registered_extensions()
    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [
        sorted(path for path in Path(folder, name).rglob("*") if path.suffix.lower() in kinds)
        for name in classes
    ]
    empty = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if empty or not classes:
        raise ValueError(f"{folder} must have a subfolder of images for each class; {empty} has no images.")
    return [(path, label) for label, paths in enumerate(files) for path in paths], classes


@dataclass(frozen=True)
class ImageFiles:
    """Image files, read and transformed on demand.

    Attributes
    ----------
    files : sequence of (Path, int)
        Files and their labels.
    transform : callable
        Maps a PIL image to a tensor of shape (3, height, width). May draw from torch's global random numbers.
    """

    files: Sequence[LabelledFile]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def y(self) -> Tensor:
        """Labels, of shape (len(self),)."""
        return torch.tensor([label for _, label in self.files])

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return 1 + max(label for _, label in self.files)

    def rows(self, index: Selection) -> ImageFiles:
        """Some of the images.

        Parameters
        ----------
        index : sequence of int, slice, or mask of shape (len(self),)
            A row may occur more than once.
        """
        numbers = read_selection(index, len(self), "rows", repeats=True)
        return replace(self, files=[self.files[i] for i in numbers])

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """Read and transform selected images.

        Parameters
        ----------
        rows : sequence of int, or mask of shape (len(self),)
            A row may occur more than once.

        Returns
        -------
        Tensor of float32 of shape (n, 3, height, width), Tensor of int64 of shape (n,)
        """
        from PIL import Image

        chosen = self.rows(rows)
        x = []
        for path, _ in chosen.files:
            with Image.open(path) as image:
                x.append(self.transform(image.convert("RGB")))
        return torch.stack(x), chosen.y


@dataclass(frozen=True)
class Scaled:
    """A transform that resizes an image without cropping, with colours from 0 to 1.

    Attributes
    ----------
    size : int
        Height and width.
    """

    size: int

    def __call__(self, image: Any) -> Tensor:
        """A tensor of shape (3, size, size)."""
        pixels = np.asarray(image.resize((self.size, self.size)), np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)


Images = Dataset | ImageFiles


def _training_transform(size: int, augment: tuple[int, int] | None) -> Any:
    from torchvision import transforms as t

    drawn = [] if augment is None else [t.RandAugment(*augment)]
    ending = (t.ToTensor(), t.Normalize(MEAN, DEVIATION))
    return t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *drawn, *ending])


def _validation_transform(size: int) -> Any:
    from torchvision import transforms as t

    return t.Compose(
        [t.Resize(round(MARGIN * size)), t.CenterCrop(size), t.ToTensor(), t.Normalize(MEAN, DEVIATION)]
    )
