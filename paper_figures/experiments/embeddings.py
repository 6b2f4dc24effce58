"""Image features from EfficientNet-Lite2, whose weights `make data` fetches."""

from __future__ import annotations

import torch

from mumoe_tensor.models import load_backbone
from mumoe_tensor.training import Dataset, extract
from mumoe_tensor.training.images import ImageFiles, LabelledFile, Scaled
from paper_figures.experiments.tables import DATA

#: Height and width to which images are resized.
SIZE = 128


def embed(files: list[LabelledFile]) -> Dataset:
    """Features of shape (images, 352) in float32, computed in bfloat16, with the labels of the files."""
    (weights,) = (DATA / "efficientnet-lite2").glob("*.pth")
    network = load_backbone("efficientnet-lite2", weights, SIZE)
    # Like bfloat16, faster on a CPU; torch declares no overload for it.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        features = extract(network, ImageFiles(files, Scaled(SIZE)), progress=True)
    return Dataset(features.x.float(), features.y)
