"""Sparse replacement of layers of pretrained models."""

from mumoe_tensor.replace.evaluation import (
    Bounds,
    DocumentLosses,
    Evaluation,
    bounds,
    evaluate,
    losses,
    splice,
)
from mumoe_tensor.replace.layers import MixtureOfDecoders, MixtureOfTransforms, Transcoder

__all__ = [
    "Bounds",
    "DocumentLosses",
    "Evaluation",
    "MixtureOfDecoders",
    "MixtureOfTransforms",
    "Transcoder",
    "bounds",
    "evaluate",
    "losses",
    "splice",
]
