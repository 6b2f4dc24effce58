"""Learning rates for factors, based on how much their steps change the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.experts import Experts, Init
from mumoe_tensor.nn.init import is_bias
from mumoe_tensor.spec import LayerSpec

#: Number of inputs, number of random draws of the factors, and a learning rate small enough for the outputs
#: to be linear in it.
ROWS, DRAWS, STEP = 64, 3, 1e-6
PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer, with a learning rate for every factor.

    A first step of Adam changes each entry of a parameter by the learning rate. How much this changes the
    outputs depends on the position of a factor in its network: on the number of entries that it sums over,
    and on the other factors. With these learning rates, all factors of a layer contribute equally to a step
    that changes the outputs as much as a step of a `torch.nn.Linear` of the same size. All other parameters,
    including gates and biases, have `learning_rate` itself. (Based on Qiu et al., "Compute Better Spent",
    2024, who scale the learning rate of each factor by the number of entries that it sums over.)

    The learning rates depend only on the spec of the layers: they are computed once, with factors initialised
    by `Experts.reset_parameters`, random inputs and equal coefficients.

    Parameters
    ----------
    learning_rate : float
        A learning rate that suits the dense layers of the model.

    Returns
    -------
    list of dict
        Groups with the entries ``params``, ``lr`` and ``scale``. The latter is ``lr / learning_rate``, which
        a schedule can use. Frozen parameters are omitted.

    Raises
    ------
    ValueError
        If the learning rate is not positive.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import MuMoE, parameter_groups
    >>> layer = MuMoE(64, 64, experts=16, format="tt")
    >>> optimizer = torch.optim.AdamW(parameter_groups(layer, learning_rate=1e-3))
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    scales: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            scales.update(zip(module.factors, scales_of(module.spec, module.options["init"]), strict=True))
    groups: dict[float, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(scales.get(parameter, 1.0), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * scale, "scale": scale}
        for scale, parameters in groups.items()
    ]


@lru_cache(maxsize=256)
def scales_of(spec: LayerSpec, init: Init) -> tuple[float, ...]:
    """The learning-rate scale for each factor of the experts, a geometric mean over random draws."""
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(0)
        drawn = [_scales_of_draw(Experts.from_spec(spec, init=init, **PLACE)) for _ in range(DRAWS)]
    return tuple(map(geometric_mean, zip(*drawn, strict=True)))


def _scales_of_draw(experts: Experts) -> list[float]:
    spec = experts.spec
    linear = nn.Linear(spec.in_features, spec.out_features, bias=False, **PLACE)
    x, gradient = (torch.randn(ROWS, n, **PLACE) for n in (spec.in_features, spec.out_features))
    equal = [torch.full((ROWS, n), 1 / n, **PLACE) for n in spec.experts]

    def outputs() -> Tensor:
        y: Tensor = experts(x, equal)
        return y

    # A bias has the unscaled learning rate, as in a linear layer.
    biases = [is_bias(term) for term in experts.weight.terms for factor in term.factors if factor is not None]
    factors = [factor for factor, bias in zip(experts.factors, biases, strict=True) if not bias]
    alone = [_moved(outputs, gradient, {factor: 1.0}) for factor in factors]
    shares = {factor: 1 / moved for factor, moved in zip(factors, alone, strict=True)}
    target = _moved(lambda: linear(x), gradient, {linear.weight: 1.0})
    share = target / _moved(outputs, gradient, shares)
    return [share * shares[factor] if factor in shares else 1.0 for factor in experts.factors]


@torch.no_grad()
def _moved(outputs: Callable[[], Tensor], gradient: Tensor, scales: Mapping[Tensor, float]) -> float:
    """The norm of the change of the outputs by a first step of Adam, divided by the learning rate."""
    with torch.enable_grad():
        before = outputs()
    gradients = torch.autograd.grad(before, [*scales], gradient)
    steps = [STEP * scale * each.sign() for scale, each in zip(scales.values(), gradients, strict=True)]
    for parameter, step in zip(scales, steps, strict=True):
        parameter.sub_(step)
    moved = torch.linalg.vector_norm(outputs() - before).item() / STEP
    for parameter, step in zip(scales, steps, strict=True):
        parameter.add_(step)
    return moved
