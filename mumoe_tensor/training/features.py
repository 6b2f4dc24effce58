"""Features of images, computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from mumoe_tensor.files import whole_file
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.progress import progress_bar
from mumoe_tensor.training.data import Dataset
from mumoe_tensor.training.images import Images


@torch.no_grad()
def extract(
    backbone: nn.Module,
    data: Images,
    *,
    batch_size: int = 100,
    progress: bool = False,
) -> Dataset:
    """Features of images, computed with the network in evaluation mode.

    Parameters
    ----------
    backbone : Module
        Maps inputs of shape (rows, ...) to features of shape (rows, features). Its mode is restored.
    data : Dataset or ImageFiles
    batch_size : int, default 100
    progress : bool, default False
        Show a progress bar (needs rich).

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If the features have another shape.
    """
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    features = []
    batches = torch.arange(len(data)).split(batch_size)
    with evaluating(backbone), progress_bar("features", progress) as update:
        for done, rows in enumerate(batches, 1):
            x, _ = data.batch(rows)
            features.append(backbone(x.to(device)).cpu())
            update(done, len(batches), "features")
    if features[0].ndim != 2:
        raise ValueError(
            f"a backbone must return features of shape (rows, features), got {tuple(features[0].shape)}."
        )
    return Dataset(torch.cat(features), data.y)


def write_npz(data: Dataset, path: str | Path) -> None:
    """Write inputs and labels atomically, in the format of `read_npz`.

    Parameters
    ----------
    data : Dataset
    path : str or Path
    """
    with whole_file(Path(path)) as file:
        np.savez(file, x=data.x.numpy(), y=data.y.numpy())
