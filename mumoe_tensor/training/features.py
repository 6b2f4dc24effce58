"""Features of images, computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mumoe_tensor.training.data import Dataset


@torch.inference_mode()
def extract(
    backbone: nn.Module,
    data: Dataset,
    *,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """What a network makes of images, as it is in evaluation mode.

    Parameters
    ----------
    backbone : Module
        Maps inputs of shape (rows, ...) to features of shape (rows, features). Keeps its mode.
    data : Dataset
    batch_size : int, default 100
    progress : callable, optional
        Called with the number of rows done and of all.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If the features are not of that shape.
    """
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    found = []
    try:
        for done, rows in enumerate(data.x.split(batch_size)):
            found.append(backbone(rows.to(device)).cpu())
            if progress is not None:
                progress(min((done + 1) * batch_size, len(data)), len(data))
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    if found[0].ndim != 2:
        raise ValueError(
            f"a backbone must give features of shape (rows, features), got {tuple(found[0].shape)}."
        )
    # (Out of inference mode: a head is trained on them.)
    return Dataset(torch.cat(found).clone(), data.y)


def write_npz(data: Dataset, path: str | Path) -> None:
    """Write inputs and labels as `read_npz` reads them, whole or not at all.

    Parameters
    ----------
    data : Dataset
    path : str or Path
    """
    # (Only here: the study imports this room.)
    from mumoe_tensor.study.files import whole_file

    with whole_file(Path(path)) as file:
        np.savez(file, x=data.x.numpy(), y=data.y.numpy())
