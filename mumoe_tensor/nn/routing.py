"""Gates with settings, which select experts: a config has them by a name and their arguments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mumoe_tensor import gates
from mumoe_tensor.checks import as_positive, check_flag


class TopK:
    """`mumoe_tensor.top_k`: softmax over the k largest logits.

    Parameters
    ----------
    k : int
        Experts of a level with a coefficient.
    normalize : bool, default True
        False for the softmax of all logits, of which k coefficients are kept as they are.

    Examples
    --------
    >>> from mumoe_tensor.nn import MuMoE
    >>> layer = MuMoE(16, 8, experts=32, rank=4, gate={"name": "topk", "k": 2})
    >>> _, (a,) = layer(torch.randn(5, 16), return_coefficients=True)
    >>> (a != 0).sum(-1).tolist()
    [2, 2, 2, 2, 2]
    """

    sparse_gradient = random_start = True

    def __init__(self, k: int, normalize: bool = True):
        self.k = as_positive(k, "k")
        check_flag(normalize, "normalize")
        self.normalize = normalize

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {}

    def __call__(self, logits: Tensor) -> Tensor:
        coefficients: Tensor = gates.top_k(logits, self.k, normalize=self.normalize)
        return coefficients


class ReLUTopK:
    """`mumoe_tensor.relu_top_k` of logits with a bias: the gate of Mixture of Decoders.

    The coefficients are ReLU of the k largest of ``G x + b``, and have any sum. The bias comes after the norm
    of the logits; the published gate has none, ``gate_norm="none"``.

    Parameters
    ----------
    k : int
        Experts of a level that may have a coefficient.
    bias : bool, default True
        The gate has a parameter `bias` of shape (out_features,), at first zero.

    References
    ----------
    Oldfield et al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with
    Mixture of Decoders", NeurIPS 2025.
    """

    sparse_gradient = random_start = True

    def __init__(self, k: int, bias: bool = True):
        self.k = as_positive(k, "k")
        check_flag(bias, "bias")
        self.bias = bias

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {"bias": nn.Parameter(torch.zeros(num_experts))} if self.bias else {}

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> Tensor:
        coefficients: Tensor = gates.relu_top_k(logits if bias is None else logits + bias, self.k)
        return coefficients


def _check_k(k: int, num_experts: int) -> None:
    if k > num_experts:
        raise ValueError(
            f"k must be at most the number of experts of a level, got k = {k} for {num_experts} experts."
        )
