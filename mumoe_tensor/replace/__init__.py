"""Sparse replacements for layers of pretrained models."""

from mumoe_tensor.replace.activations import ActivationRows, Activations
from mumoe_tensor.replace.coefficients import CoefficientRows, Coefficients, collect_coefficients
from mumoe_tensor.replace.evaluation import (
    Bounds,
    DocumentLosses,
    Evaluation,
    Replaced,
    bounds,
    evaluate,
    losses,
    splice,
)
from mumoe_tensor.replace.frontier import run_grid
from mumoe_tensor.replace.grid import Arm, Grid, Place
from mumoe_tensor.replace.language import Windows, load_language_model, read_texts, windows
from mumoe_tensor.replace.layers import MixtureOfDecoders, MixtureOfTransforms, Transcoder
from mumoe_tensor.replace.probing import RULES, Probe, sparse_probe, token_labels
from mumoe_tensor.replace.training import Fit, fit
from mumoe_tensor.replace.usage import ExpertUse, usage

__all__ = [
    "RULES",
    "ActivationRows",
    "Activations",
    "Arm",
    "Bounds",
    "CoefficientRows",
    "Coefficients",
    "DocumentLosses",
    "Evaluation",
    "ExpertUse",
    "Fit",
    "Grid",
    "MixtureOfDecoders",
    "MixtureOfTransforms",
    "Place",
    "Probe",
    "Replaced",
    "Transcoder",
    "Windows",
    "bounds",
    "collect_coefficients",
    "evaluate",
    "fit",
    "load_language_model",
    "losses",
    "read_texts",
    "run_grid",
    "sparse_probe",
    "splice",
    "token_labels",
    "usage",
    "windows",
]
