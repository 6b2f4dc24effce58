"""Sparse replacement of layers of pretrained models."""

from mumoe_tensor.replace.activations import ActivationRows, Activations
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
from mumoe_tensor.replace.probing import RULES, Probe, sparse_probe, token_labels
from mumoe_tensor.replace.training import ExpertUse, Fit, fit, usage

__all__ = [
    "RULES",
    "ActivationRows",
    "Activations",
    "Bounds",
    "DocumentLosses",
    "Evaluation",
    "ExpertUse",
    "Fit",
    "MixtureOfDecoders",
    "MixtureOfTransforms",
    "Probe",
    "Transcoder",
    "bounds",
    "evaluate",
    "fit",
    "losses",
    "sparse_probe",
    "splice",
    "token_labels",
    "usage",
]
