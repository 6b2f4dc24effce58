"""Images with classes to train on: in files that are read whole, or one file each in folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.selections import Selection, read_selection
from mumoe_tensor.training.data import Dataset, read_images, read_npz, split

#: Means and standard deviations of ImageNet's colours, from 0 to 1, that inputs are normalised by.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Of images for validation, how much larger they are before their middle is cut out.
MARGIN = 256 / 224


@dataclass(frozen=True)
class ImageData:
    """Where images are, and which are for validation.

    Attributes
    ----------
    inputs : str
        An ``.npz`` file with x and y as `read_images` reads it; with `labels` a file of images in IDX; or a
        folder with a folder of images for each class (needs torchvision).
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
            raise FileNotFoundError(f"there are no images {self.inputs}; `make data` fetches some into data.")
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
        from torchvision.datasets import ImageFolder

        if self.labels is not None:
            raise ValueError(f"the folders of {self.inputs} are its labels; got others in {self.labels}.")
        folder = ImageFolder(self.inputs)
        files, held = folder.samples, []
        if isinstance(self.validation, str):
            other = ImageFolder(self.validation)
            if other.classes != folder.classes:
                raise ValueError(
                    f"both folders must have the same classes; {self.inputs} has {len(folder.classes)}, "
                    f"{self.validation} has {len(other.classes)}, and some only one of them."
                )
            held = other.samples
        else:
            rows = Dataset(torch.arange(len(files)), torch.tensor([label for _, label in files]))
            training, validation = split(rows, self.validation, seed=self.seed)
            files, held = [files[i] for i in training.x], [files[i] for i in validation.x]
        classes = len(folder.classes)
        return (
            ImageFiles(files, classes, _training_transform(size, self.augment)),
            ImageFiles(held, classes, _validation_transform(size)),
        )


class ImageFiles:
    """Images in a file each, that are read and transformed when they are needed.

    Parameters
    ----------
    files : sequence of (str, int)
        Paths and labels.
    classes : int
    transform : callable
        Of a picture to a tensor of shape (channels, height, width). Draws from torch's random numbers.
    """

    def __init__(self, files: Sequence[tuple[str, int]], classes: int, transform: Any):
        self._files, self.classes, self._transform = files, classes, transform

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """Some of the images.

        Parameters
        ----------
        rows : sequence of int, or mask of shape (len(self),)
            A row may occur more than once.

        Returns
        -------
        Tensor of float32 of shape (n, 3, height, width), Tensor of int64 of shape (n,)
        """
        chosen = [self._files[i] for i in read_selection(rows, len(self), "rows", repeats=True)]

        from torchvision.datasets.folder import pil_loader

        x = torch.stack([self._transform(pil_loader(path)) for path, _ in chosen])
        return x, torch.tensor([label for _, label in chosen])


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
