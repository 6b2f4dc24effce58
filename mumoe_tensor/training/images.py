"""Images with classes to train on: in files that are read whole, or one file each in folders."""

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

#: Means and standard deviations of ImageNet's colours, from 0 to 1, that inputs are normalised by.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Of images for validation, how much larger they are before their middle is cut out.
MARGIN = 256 / 224

#: A file with an image, and the number of its class.
LabelledFile = tuple[Path, int]


@dataclass(frozen=True)
class ImageData:
    """Where images are, and which are for validation.

    Attributes
    ----------
    inputs : str
        An ``.npz`` file with x and y as `read_images` reads it; with `labels` a file of images in IDX; or a
        folder with a folder of images for each class, see `class_folders` (needs torchvision).
    labels : str or None
        Labels in IDX.
    validation : float or str
        Share of the images, drawn at random; or, beside a folder, another folder with the same classes.
    seed : int
        Of that draw.
    augment : tuple of two int, or None
        For a folder: how many operations of RandAugment (Cubuk et al., 2020) an image goes through, and how
        strong they are, from 0 to 30. An image of a folder is cropped and flipped at random in any case.
    scale : bool
        For an ``.npz`` file: False takes any finite numbers as they are, such as standardised images.
    """

    inputs: str
    labels: str | None = None
    validation: float | str = 0.1
    seed: int = 0
    augment: tuple[int, int] | None = None
    scale: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.validation, str) and not 0 < self.validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1, got {self.validation}.")
        if self.augment is not None and (self.augment[0] < 1 or not 0 <= self.augment[1] <= 30):
            raise ValueError(
                f"augment must be a number of operations and a strength from 0 to 30, got {self.augment}."
            )
        if not self.scale and self.labels is not None:
            raise ValueError("scale=False is for an .npz file; images in IDX are always scaled.")

    def read(self, size: int) -> tuple[Images, Images]:
        """Images for training and for validation, of shape (rows, channels, height, width).

        Parameters
        ----------
        size : int
            Height and width that images of a folder are brought to.

        Raises
        ------
        ValueError
            If choices do not fit together, or see `read_images` and `split`.
        FileNotFoundError
            If there are no such inputs.
        ImportError
            If inputs are a folder and torchvision is not installed.
        """
        if Path(self.inputs).is_dir():
            return self._folders(size)
        if not Path(self.inputs).exists():
            raise FileNotFoundError(
                f"there are no images {self.inputs}; `mumoe-tensor data` fetches some into data."
            )
        if isinstance(self.validation, str) or self.augment is not None:
            raise ValueError(
                "a folder for validation and augment are for a folder of images; of a file a share is for "
                f"validation; got the inputs {self.inputs}."
            )
        data = read_images(self.inputs, self.labels) if self.scale else read_npz(self.inputs)
        if data.x.ndim not in (3, 4):
            raise ValueError(
                "images must be of shape (rows, height, width) or (rows, channels, height, width); those of "
                f"{self.inputs} are of shape {tuple(data.x.shape)}."
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
                    f"{self.validation} has {len(others)}, and some only one of them."
                )
            validation = ImageFiles(files, training.transform)
        else:
            training, validation = split(training, self.validation, seed=self.seed)
        return training, replace(validation, transform=_validation_transform(size))


def class_folders(folder: str | Path, labels: str | None = None) -> tuple[list[LabelledFile], list[str]]:
    """Images in a folder for each class, in the order of their paths.

    Parameters
    ----------
    folder : str or Path
        Labels are the numbers of its folders in the order of their names. Images may lie in folders below.
    labels : str, optional
        Is refused: the folders are the labels.

    Returns
    -------
    list of (Path, int)
        Files and their labels.
    list of str
        Names of the classes.

    Raises
    ------
    ValueError
        If there are no folders, one has no images, or there is a file of labels.
    """
    if labels is not None:
        raise ValueError(f"the folders of {folder} are its labels; got others in {labels}.")
    from PIL import Image

    kinds = Image.registered_extensions()
    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [
        sorted(path for path in Path(folder, name).rglob("*") if path.suffix.lower() in kinds)
        for name in classes
    ]
    empty = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if empty or not classes:
        raise ValueError(f"{folder} must have a folder of images for each class; got none in {empty}.")
    return [(path, label) for label, paths in enumerate(files) for path in paths], classes


@dataclass(frozen=True)
class ImageFiles:
    """Images in a file each, that are read and transformed when they are needed.

    Attributes
    ----------
    files : sequence of (Path, int)
        With labels.
    transform : callable
        Of a picture of PIL to a tensor of shape (3, height, width). Draws from torch's random numbers.
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
        """Some of the images, read and transformed.

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
    """A transform of pictures to one size, without cropping, and to colours from 0 to 1.

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
    return t.Compose(
        [
            t.RandomResizedCrop(size),
            t.RandomHorizontalFlip(),
            *drawn,
            t.ToTensor(),
            t.Normalize(MEAN, DEVIATION),
        ]
    )


def _validation_transform(size: int) -> Any:
    from torchvision import transforms as t

    return t.Compose(
        [t.Resize(round(MARGIN * size)), t.CenterCrop(size), t.ToTensor(), t.Normalize(MEAN, DEVIATION)]
    )
