"""Gates with settings that select experts. Configs refer to them by name and arguments."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor import gates
from mumoe_tensor.checks import as_finite, as_positive, check_flag
from mumoe_tensor.extras import missing
from mumoe_tensor.nn.functional import is_eager_on_cpu, largest
from mumoe_tensor.nn.sparse import SparseCoefficients


class _Selecting:
    """A gate that returns the indices of the selected experts; see `mumoe_tensor.gates.Gate`."""

    sparse_gradient = True
    select: Callable[..., Tensor | SparseCoefficients]

    def __call__(self, *arguments: Any, **values: Tensor) -> Tensor:
        coefficients = self.select(*arguments, **values)
        return coefficients if isinstance(coefficients, Tensor) else coefficients.dense()


class TopK(_Selecting):
    """`mumoe_tensor.top_k`: softmax over the k largest logits.

    Parameters
    ----------
    k : int
        Number of experts to select at each level.
    normalize : bool, default True
        Whether the softmax is over the k selected logits. If False, it is over all logits, and the k
        coefficients sum to less than one.

    Examples
    --------
    >>> from mumoe_tensor.nn import MuMoE
    >>> layer = MuMoE(16, 8, experts=32, rank=4, gate={"name": "topk", "k": 2})
    >>> _, (a,) = layer(torch.randn(5, 16), return_coefficients=True)
    >>> (a != 0).sum(-1).tolist()
    [2, 2, 2, 2, 2]
    """

    random_start = True

    def __init__(self, k: int, normalize: bool = True):
        self.k = as_positive(k, "k")
        check_flag(normalize, "normalize")
        self.normalize = normalize

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {}

    def select(self, logits: Tensor) -> Tensor | SparseCoefficients:
        chosen = largest(logits, self.k)
        if chosen is None:
            coefficients: Tensor = gates.top_k(logits, self.k, normalize=self.normalize)
            return coefficients
        values, places = chosen
        weights = values.softmax(-1)
        if not self.normalize:
            top = values.detach()[..., :1]  # The logarithm of a sum would be rounded.
            weights = (values - top).exp() / (logits - top).exp().sum(-1, keepdim=True)
        return SparseCoefficients(weights, places, logits.shape[-1])


class ReLUTopK(_Selecting):
    """`mumoe_tensor.relu_top_k` of logits with a bias: the gate of Mixture of Decoders.

    The coefficients are the ReLU of the k largest entries of ``G x + b``; they need not sum to one. The bias
    is added after the norm of the logits. The published gate has no norm (``gate_norm="none"``).

    Parameters
    ----------
    k : int
        Maximum number of experts of a level with nonzero coefficients.
    bias : bool, default True
        Whether the gate has a parameter `bias` of shape (out_features,), initialised to zero.

    References
    ----------
    Oldfield et al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with
    Mixture of Decoders", NeurIPS 2025.
    """

    random_start = True

    def __init__(self, k: int, bias: bool = True):
        self.k = as_positive(k, "k")
        check_flag(bias, "bias")
        self.bias = bias

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {"bias": nn.Parameter(torch.zeros(num_experts))} if self.bias else {}

    def select(self, logits: Tensor, bias: Tensor | None = None) -> Tensor | SparseCoefficients:
        logits = logits if bias is None else logits + bias
        chosen = largest(logits, self.k)
        if chosen is None:
            coefficients: Tensor = gates.relu_top_k(logits, self.k)
            return coefficients
        values, places = chosen
        return SparseCoefficients(values.relu(), places, logits.shape[-1])


class JumpReLU:
    """`mumoe_tensor.jumprelu` with a trainable threshold for each expert.

    The parameter is `log_threshold`, of shape (out_features,), so that thresholds stay positive. Its gradient
    is the published straight-through estimate. The published gate has no norm of the logits
    (``gate_norm="none"``).

    Parameters
    ----------
    threshold : float, default 0.001
        Initial threshold of every expert.
    bandwidth : float, default 0.001
        Only logits closer to a threshold than half the bandwidth contribute to its gradient.

    References
    ----------
    Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders", arXiv:2407.14435, 2024.
    """

    sparse_gradient = random_start = True

    def __init__(self, threshold: float = 0.001, bandwidth: float = 0.001):
        self.threshold, self.bandwidth = as_finite(threshold, "threshold"), as_finite(bandwidth, "bandwidth")
        if self.threshold <= 0 or self.bandwidth <= 0:
            raise ValueError(
                f"threshold and bandwidth must be positive, got {self.threshold} and {self.bandwidth}."
            )

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        return {"log_threshold": nn.Parameter(torch.full((num_experts,), log(self.threshold)))}

    def __call__(self, logits: Tensor, log_threshold: Tensor) -> Tensor:
        threshold = log_threshold.to(logits.dtype).exp()
        coefficients: Tensor = gates.jumprelu(logits, threshold, bandwidth=self.bandwidth)
        return coefficients


class SigmoidTopK(_Selecting):
    """`mumoe_tensor.sigmoid_top_k`: the gate of DeepSeek-V3, with a bias that affects only the selection.

    The buffer `selection_bias`, of shape (out_features,), is initialised to zero and is not trained. To
    balance the experts, add a small number to the entries of experts with few inputs, and subtract it from
    the others. The published gate has no norm of the logits (``gate_norm="none"``).

    Parameters
    ----------
    k : int
        Number of experts to select at each level.
    groups, top_groups : int, default 1
        Number of groups of experts, and number of groups to select for each input.
    normalize : bool, default True
        Divide the coefficients by their sum.
    scale : float, default 1
        Positive factor of the coefficients.

    References
    ----------
    DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, 2024: 256 experts, ``k=8, groups=8,
    top_groups=4, scale=2.5``.
    """

    random_start = True

    def __init__(
        self, k: int, groups: int = 1, top_groups: int = 1, normalize: bool = True, scale: float = 1.0
    ):
        self.k, self.groups = as_positive(k, "k"), as_positive(groups, "groups")
        self.top_groups = as_positive(top_groups, "top_groups")
        check_flag(normalize, "normalize")
        self.normalize, self.scale = normalize, as_finite(scale, "scale")
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}.")

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        gates.check_groups(num_experts, self.k, self.groups, self.top_groups)
        return {"selection_bias": torch.zeros(num_experts)}

    def select(self, logits: Tensor, selection_bias: Tensor) -> Tensor | SparseCoefficients:
        bias, chosen = selection_bias.to(logits.dtype), None
        if self.groups == self.top_groups and is_eager_on_cpu(logits) and bool((logits < torch.inf).all()):
            scores = logits.detach().sigmoid() + bias
            chosen = largest(scores.masked_fill(logits == -torch.inf, -torch.inf), self.k)
        if chosen is None:
            coefficients: Tensor = gates.sigmoid_top_k(
                logits, self.k, bias=bias, groups=self.groups, top_groups=self.top_groups,
                normalize=self.normalize, scale=self.scale,
            )  # fmt: skip
            return coefficients
        logs = nn.functional.logsigmoid(logits.gather(-1, chosen[1]))
        weights = logs.softmax(-1) if self.normalize else logs.exp()
        return SparseCoefficients(self.scale * weights, chosen[1], logits.shape[-1])


class Random(_Selecting):
    """A null model: k random experts for every input, each with the coefficient 1 / k.

    They are drawn in every call, in training and in evaluation mode, from the device's default torch
    generator.

    Parameters
    ----------
    k : int
        Number of experts to select at each level.
    """

    reads_input = True

    def __init__(self, k: int):
        self.k = as_positive(k, "k")

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {}

    def select(self, z: Tensor, num_experts: int) -> Tensor | SparseCoefficients:
        numbers = torch.rand((*z.shape[:-1], num_experts), device=z.device, dtype=z.dtype)
        return _uniform_top_k(numbers, self.k)


class NearestCentres(_Selecting):
    """A null model: the k experts with the centres nearest to the input, each with the coefficient 1 / k.

    The buffer `centres`, of shape (out_features, in_features), is initialised from a standard normal
    distribution. `.ExpertGate.fit` sets it to k-means centres, which requires scikit-learn.

    Parameters
    ----------
    k : int
        Number of experts to select at each level.

    Examples
    --------
    >>> from mumoe_tensor.nn import MuMoE
    >>> layer = MuMoE(16, 8, experts=4, rank=4, gate={"name": "nearest_centres", "k": 1})
    >>> _ = layer.gate.fit(torch.randn(100, 16))
    """

    reads_input = True

    def __init__(self, k: int):
        self.k = as_positive(k, "k")

    def per_expert(self, num_experts: int, in_features: int) -> dict[str, Tensor]:
        _check_k(self.k, num_experts)
        return {"centres": torch.randn(num_experts, in_features)}

    def fit(self, z: Tensor, num_experts: int) -> dict[str, Tensor]:
        if len(z) < num_experts:
            raise ValueError(
                f"there must be at least as many inputs as experts, got {len(z)} for {num_experts}."
            )
        try:
            from sklearn.cluster import KMeans
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(missing("sklearn"), name="sklearn") from error
        seed = int(torch.randint(2**31, (), device="cpu"))
        means = KMeans(num_experts, n_init=1, random_state=seed).fit(z.detach().cpu().double().numpy())
        return {"centres": torch.from_numpy(means.cluster_centers_)}

    def select(self, z: Tensor, num_experts: int, centres: Tensor) -> Tensor | SparseCoefficients:
        centres = centres.to(z.dtype)
        # Half the squared distance is |z|² / 2, which is the same for all experts, minus this.
        nearness = nn.functional.linear(z, centres, -0.5 * centres.square().sum(1))
        return _uniform_top_k(nearness, self.k)


def _uniform_top_k(scores: Tensor, k: int) -> Tensor | SparseCoefficients:
    chosen = largest(scores, k)
    if chosen is None:
        coefficients: Tensor = gates.uniform_top_k(scores, k)
        return coefficients
    values, places = chosen
    # Propagate NaN.
    return SparseCoefficients(0 * values + 1 / k, places, scores.shape[-1])


def _check_k(k: int, num_experts: int) -> None:
    if k > num_experts:
        raise ValueError(
            f"k must be at most the number of experts of a level, got k = {k} for {num_experts} experts."
        )
