"""Corrections of a model by the biases of its experts, without training."""

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
    """Mean coefficients that inputs, such as those of a subpopulation, give to the experts of a layer.

    Parameters
    ----------
    model : Module
        Runs as in ``eval()``. It may be the layer itself.
    layer : MuMoE, MuMoEMLP or ExpertGate
        The layer of the model.
    batches : iterable of Tensor
        What the model is called with, gone through once.

    Returns
    -------
    tuple of Tensor of shape (N_e,)
        One a level, in float64.

    Raises
    ------
    ValueError
        If the layer has not one gate, or there are no inputs.
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
    r"""Correct outputs by the biases of the experts, the more so the more an input looks like some others.

    .. math:: y_o \leftarrow y_o + \lambda \prod_e \bar a_e^\top a_e

    where :math:`\bar a_e` are the mean coefficients of these others, as of `mean_coefficients`, and
    :math:`\lambda` the strength (Oldfield et al., 2024, for one level). This gives every expert one more
    bias, :math:`\lambda \prod_e \bar a_{e,n_e}`.

    Parameters
    ----------
    layer : MuMoE or Experts
        Of a block, ``block.up`` or ``block.down``.
    name : str
        What the edit is called in the state, and by `remove_edit`.
    means : Tensor of shape (N,), or sequence of these
        One a level. They are copied.
    outputs : int, sequence of int, or mask of shape (out_features,)
        Those to correct; one or more.
    strength : float
        May be negative.

    Raises
    ------
    ValueError
        If the layer has not one module `.Experts`, the name cannot be one of a module or is taken, shapes do
        not fit, there is no such output, or one twice, or a mean or the strength is not finite.
    TypeError
        If outputs are no integers, or the strength no number.

    Notes
    -----
    With several levels the mean of the coefficient of a combination of experts, which is the product of one a
    level, would be a tensor as large as their number. The product of the means is taken instead: it takes
    the memory of one coefficient an expert of each level, and is the same where levels are independent.

    The edit lies in buffers of the layer's `.Experts`, in its attribute `edits`. So it is in the state, is
    taken up from there by a layer without it, and moves and is copied with the layer; `expert` includes it,
    `weight` does not.

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
            f"there must be one mean coefficient for each of {experts.num_experts} experts; got means of "
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
    """Take an edit away: the layer is what it was before.

    Parameters
    ----------
    layer : MuMoE or Experts
        Of a block, ``block.up`` or ``block.down``.
    name : str
        As given to `edit_bias`.

    Raises
    ------
    ValueError
        If the layer has not one module `.Experts`, or no such edit.
    """
    experts = experts_of(layer)
    if experts.edits is None or name not in experts.edits:
        raise ValueError(f"an edit must be one of {list(experts.edits or ())}, got {name!r}.")
    del experts.edits[name]
    if not experts.edits:
        experts.edits = None
