"""The sparse mixture of experts that layers are compared with."""

from __future__ import annotations

from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor, nn

from mumoe_tensor.gates import top_k
from mumoe_tensor.nn import ExpertGate
from mumoe_tensor.spec import LayerSpec


class SparseMixture(nn.Module):
    """A mixture of dense experts, of which every input uses the few with the largest logits.

    The coefficients are the softmax over these logits (Shazeer et al., 2017). Inputs are grouped by expert,
    so that every expert in use is a product of matrices. There is no loss that balances the experts.

    Parameters
    ----------
    spec : LayerSpec
        Of linear experts, or of MLPs with GELU; the levels make up one number of experts.
    k : int
        Experts that an input uses.

    Attributes
    ----------
    gate : ExpertGate
    weights, biases : ParameterList
        Of shape (experts, in, out) and (experts, out), layer after layer.
    """

    def __init__(self, spec: LayerSpec, k: int, *, device: torch.device | str | None = None):
        super().__init__()
        experts, in_features = prod(spec.experts), spec.in_features
        self.gate = ExpertGate(
            in_features, (experts,), gate=partial(top_k, k=k), gate_norm="none", device=device
        )
        # Equal logits would send all inputs to the same experts.
        nn.init.normal_(self.gate.weight, std=1 / sqrt(in_features))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer in spec.layers:
            bound = 1 / sqrt(layer.in_features)  # as nn.Linear
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
        # One slice after the other would give every gradient the size of all.
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
