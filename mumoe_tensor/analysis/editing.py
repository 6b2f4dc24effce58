"""Editing the biases of experts to correct a model without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.parts import experts_of, gate_of
from mumoe_tensor.analysis.usage import Usage
from mumoe_tensor.checks import as_finite
from mumoe_tensor.nn.edits import check_edit_name
from mumoe_tensor.nn.watch import evaluating, watch_coefficients
from mumoe_tensor.selections import Selection, read_selection


@torch.no_grad()
def mean_coefficients(model: nn.Module, layer: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, ...]:
    """Mean coefficients of the experts of a layer over inputs, for example those of a subpopulation.

    Parameters
    ----------
    model : Module
        The model, which is run in evaluation mode. It may be the layer itself.
    layer : MuMoE, MuMoEMLP or ExpertGate
        The layer of the model.
    batches : iterable of Tensor
        Batches of inputs of the model, iterated once.

    Returns
    -------
    tuple of Tensor of shape (N_e,)
        One tensor per level, in float64.

    Raises
    ------
    ValueError
        If the layer does not have exactly one gate, or there are no inputs.
    """
    usage = [Usage(count) for count in gate_of(layer).num_experts]

    def count(name: str, coefficients: tuple[Tensor, ...]) -> None:
        for each, a in zip(usage, coefficients, strict=True):
            each.update(a)

    with watch_coefficients(layer, count), evaluating(model):
        for inputs in batches:
            model(inputs)
    return tuple(each.statistics().mean for each in usage)


def edit_bias(
    layer: nn.Module,
    name: str,
    means: Tensor | Sequence[Tensor],
    outputs: Selection,
    strength: float,
) -> None:
    r"""Add a bias to the experts that corrects outputs for inputs similar to a given subpopulation.

    .. math:: y_o \leftarrow y_o + \lambda \prod_e \bar a_e^\top a_e

    where :math:`\bar a_e` are the mean coefficients of the subpopulation (see `mean_coefficients`) and
    :math:`\lambda` is the strength (Oldfield et al., 2024, for one level). Every expert gets an additional
    bias, :math:`\lambda \prod_e \bar a_{e,n_e}`, so the correction is larger for more similar inputs.

    Parameters
    ----------
    layer : MuMoE or Experts
        The layer; for a block, ``block.up`` or ``block.down``.
    name : str
        Name of the edit in the state dict, and for `remove_edit`.
    means : Tensor of shape (N,), or sequence of these
        Mean coefficients of each level; they are copied.
    outputs : int, sequence of int, or mask of shape (out_features,)
        The outputs to correct, at least one.
    strength : float
        Strength of the correction, possibly negative.

    Raises
    ------
    ValueError
        If the layer does not have exactly one `.Experts` module, the name is not a valid module name or
        already exists, shapes do not match, an output does not exist or occurs twice, or a mean or the
        strength is not finite.
    TypeError
        If outputs are not integers, or the strength is not a number.

    Notes
    -----
    With several levels, the mean coefficients of all combinations of experts would be a tensor with one entry
    per combination. The product of the means is used instead: it needs only one number per expert of each
    level, and is the same if the levels are independent.

    The edit is stored in buffers of the layer's `.Experts`, in its attribute `edits`. It is part of the state
    dict, is created when such a state dict is loaded, and is moved and copied with the layer. `expert`
    includes it; `weight` does not.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import MuMoE
    >>> layer, x = MuMoE(4, 3, experts=8, rank=2, gate_norm="layer"), torch.randn(5, 4)
    >>> before = layer(x)
    >>> edit_bias(layer, "more", mean_coefficients(layer, layer, [x]), outputs=1, strength=8.0)
    >>> (layer(x) - before)[0].detach().round(decimals=3)
    tensor([0., 1., 0.])
    >>> remove_edit(layer, "more")
    >>> torch.equal(layer(x), before)
    True
    """
    experts = experts_of(layer)
    check_edit_name(name)
    if name in (experts.edits or ()):
        raise ValueError(f"the name of an edit must be new; {name!r} exists.")
    means = [means] if isinstance(means, Tensor) else list(means)
    if wrong := [type(mean).__name__ for mean in means if not isinstance(mean, Tensor)]:
        raise TypeError(f"mean coefficients must be tensors, one per level, got {wrong}.")
    if [tuple(mean.shape) for mean in means] != [(count,) for count in experts.num_experts]:
        raise ValueError(
            f"there must be one mean coefficient for each of {experts.num_experts} experts, got means of "
            f"shapes {[tuple(mean.shape) for mean in means]}."
        )
    changed = read_selection(outputs, experts.out_features, "outputs", empty=False)
    strengths = torch.zeros(experts.out_features, dtype=torch.float64)
    strengths[changed] = as_finite(strength, "strength")
    like = next(experts.parameters())
    if not all(mean.is_floating_point() and mean.to(like.dtype).isfinite().all() for mean in means):
        raise ValueError(f"mean coefficients must be floats that are finite in {like.dtype}, got {means}.")
    if not strengths.to(like.dtype).isfinite().all():
        raise ValueError(f"strength must be finite in {like.dtype}, got {strength}.")
    experts.add_edit(name, means, strengths)


def remove_edit(layer: nn.Module, name: str) -> None:
    """Remove an edit, which restores the original outputs.

    Parameters
    ----------
    layer : MuMoE or Experts
        The layer; for a block, ``block.up`` or ``block.down``.
    name : str
        Name of the edit; see `edit_bias`.

    Raises
    ------
    ValueError
        If the layer does not have exactly one `.Experts` module, or has no such edit.
    """
    experts = experts_of(layer)
    if experts.edits is None or name not in experts.edits:
        raise ValueError(f"an edit must be one of {list(experts.edits or ())}, got {name!r}.")
    del experts.edits[name]
    if not experts.edits:
        experts.edits = None
