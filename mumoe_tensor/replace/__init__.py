"""Sparse replacement of layers of pretrained models."""

from mumoe_tensor.replace.layers import MixtureOfDecoders, MixtureOfTransforms, Transcoder

__all__ = [
    "MixtureOfDecoders",
    "MixtureOfTransforms",
    "Transcoder",
]
