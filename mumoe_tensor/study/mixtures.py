"""The sparse mixture of experts for comparison."""

from __future__ import annotations

from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor, nn

from mumoe_tensor.gates import top_k
from mumoe_tensor.nn import ExpertGate
from mumoe_tensor.spec import LayerSpec


class SparseMixture(nn.Module):
    """A mixture of dense experts in which each input uses only the k experts with the largest logits.

    The coefficients are the softmax over these logits (Shazeer et al., 2017). Inputs are grouped by expert,
    so that every active expert is one matrix product. There is no load-balancing loss.

    Parameters
    ----------
    spec : LayerSpec
        Spec with linear experts, or MLPs with GELU; the levels multiply to one number of experts.
    k : int
        Active experts per input.

    Attributes
    ----------
    gate : ExpertGate
    weights, biases : ParameterList
        Shapes (experts, in, out) and (experts, out), one entry per layer.
    """

    def __init__(self, spec: LayerSpec, k: int, *, device: torch.device | str | None = None):
        super().__init__()
        experts, in_features = prod(spec.experts), spec.in_features
        self.gate = ExpertGate(
            in_features, (experts,), gate=partial(top_k, k=k), gate_norm="none", device=device
        )
        # Zero weights would send all inputs to the same experts.
        nn.init.normal_(self.gate.weight, std=1 / sqrt(in_features))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer in spec.layers:
            bound = 1 / sqrt(layer.in_features)  # as in nn.Linear
            for parameters, shape in (
                (self.weights, (experts, layer.in_features, layer.out_features)),
                (self.biases, (experts, layer.out_features)),
            ):
                parameters.append(nn.Parameter(torch.empty(shape, device=device).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs of shape (..., in) to outputs of shape (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        (coefficients,) = self.gate(rows)
        expert, row = coefficients.detach().t().nonzero().unbind(1)
        counts = torch.bincount(expert, minlength=coefficients.shape[1]).tolist()
        groups = rows[row].split(counts)
        # Indexing one slice at a time would allocate a gradient of the full size for each.
        layers = [
            list(zip(weight.unbind(), bias.unbind(), strict=True))
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        outputs = []
        for n, group in enumerate(groups):
            if counts[n]:
                for k, layer in enumerate(layers):
                    weight, bias = layer[n]
                    group = torch.addmm(bias, nn.functional.gelu(group) if k else group, weight)
                outputs.append(group)
        weighted = torch.cat(outputs) * coefficients[row, expert, None]
        y = weighted.new_zeros(len(rows), weighted.shape[1]).index_add(0, row, weighted)
        return y.reshape(*x.shape[:-1], -1)
