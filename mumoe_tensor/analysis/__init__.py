"""Analysis of experts: usage, specialisation, contributions, ablation and editing."""

from mumoe_tensor.analysis.attribution import attribute
from mumoe_tensor.analysis.editing import edit_bias, mean_coefficients, remove_edit
from mumoe_tensor.analysis.fairness import Fairness, fairness
from mumoe_tensor.analysis.interventions import ablate, keep_only, random_gate, scale
from mumoe_tensor.analysis.losses import loss_effects
from mumoe_tensor.analysis.specialization import (
    Labels,
    LabelStatistics,
    ablation_effects,
    polysemanticity,
)
from mumoe_tensor.analysis.top_inputs import TopInputs
from mumoe_tensor.analysis.truncation import truncate
from mumoe_tensor.analysis.usage import Usage, UsageStatistics
from mumoe_tensor.nn.watch import watch_coefficients

__all__ = [
    "Fairness",
    "LabelStatistics",
    "Labels",
    "TopInputs",
    "Usage",
    "UsageStatistics",
    "ablate",
    "ablation_effects",
    "attribute",
    "edit_bias",
    "fairness",
    "keep_only",
    "loss_effects",
    "mean_coefficients",
    "polysemanticity",
    "random_gate",
    "remove_edit",
    "scale",
    "truncate",
    "watch_coefficients",
]
