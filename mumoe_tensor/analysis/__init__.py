"""What experts do: their coefficients, how they are used, what they know, what a model is without them."""

from mumoe_tensor.analysis.coefficients import watch_coefficients
from mumoe_tensor.analysis.interventions import ablate, random_gate
from mumoe_tensor.analysis.specialization import (
    Labels,
    LabelStatistics,
    ablation_effects,
    polysemanticity,
)
from mumoe_tensor.analysis.usage import Usage, UsageStatistics

__all__ = [
    "LabelStatistics",
    "Labels",
    "Usage",
    "UsageStatistics",
    "ablate",
    "ablation_effects",
    "polysemanticity",
    "random_gate",
    "watch_coefficients",
]
