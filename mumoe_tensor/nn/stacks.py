"""Replacement of the stacked weights of a mixture of experts by factorized experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import check_flag
from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.nn.fitting import fit_experts
from mumoe_tensor.nn.reading import check_readable, check_same
from mumoe_tensor.nn.routed import RoutedExperts
from mumoe_tensor.nn.surgery import Replacement, plan_replacements, put_replacements
from mumoe_tensor.nn.watch import evaluating, watch_calls

#: The parameters of experts that can be replaced.
STACKS = ("gate_up_proj", "down_proj")
#: Default fraction of the dense parameters.
PARAMETERS = 0.8
#: Default effort of a fit.
EFFORT = {"n_restarts": 1, "n_iter": 50, "tolerance": 1e-4}
#: Damping of the covariance of each expert, added to the diagonal, as a fraction of the mean over all
#: diagonals, since an expert may have few inputs or none.
DAMPING = 0.01


def replace_experts(
    model: nn.Module,
    pattern: str = "*",
    *,
    format: str | Mapping[str, Any] | Format = "lowrank",
    parameters: float | None = None,
    inputs: Iterable[Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> list[Replacement]:
    """Replace the experts in a mixture of experts by factorized experts, in place; router and loss are kept.

    The experts must be a module with the parameters ``gate_up_proj`` of shape (N, 2 F, D) and ``down_proj``
    of shape (N, D, F) that is called with inputs, expert indices and weights, as in Mixtral, OLMoE, Qwen and
    DeepSeek in transformers 5. It is replaced by `RoutedExperts`, in which each weight is the best fit to the
    old weight. Before anything is replaced, the outputs of a copy of each module are checked, and all new
    modules are made, so an error leaves the model unchanged.

    Parameters
    ----------
    pattern : str, default "*"
        Shell pattern of the names of the modules, e.g. ``"model.layers.[0-3].*"``.
    format : str or Format, default "lowrank"
        ``"lowrank"`` has two thin matrices for each expert, ``"shared-expert"`` one matrix for all experts
        plus differences; other formats, such as ``"cp"``, are also supported.
    parameters : float, optional
        Maximum number of parameters of each weight, as a fraction of the parameters of the old weight. The
        default is 0.8 if the format has a rank and the options do not contain one.
    inputs : iterable, optional
        Batches for one pass of the model in evaluation mode: each a mapping or a tuple of arguments, or a
        single argument. The fit is then weighted by the inputs of each expert and their routing weights,
        which takes memory for N (D² + F²) float64 numbers per module.
    fit : mapping, optional
        ``n_restarts``, ``n_iter``, ``tolerance`` and ``seed`` of `.decompose`, such as ``{"n_restarts": 4}``.
    dry_run : bool, default False
        Return the replacements without changing the model.
    **options
        Arguments of `RoutedExperts`: ``gate_up_rank``, ``down_rank`` and so on.

    Returns
    -------
    list of Replacement
        One for each module, with the errors of both weights, and also their weighted errors if `inputs` are
        given.

    Raises
    ------
    ValueError
        If the pattern matches no experts, or experts that cannot be replaced, because they have other
        parameters (such as the interleaved ones with biases of GPT-OSS), compute anything else, share
        parameters with another module, or are not called with the `inputs`.
    """
    check_flag(dry_run, "dry_run")
    if isinstance(inputs, (Tensor, Mapping)):
        raise TypeError(f"inputs must be an iterable of batches, got a single {type(inputs).__name__}.")
    fixed = {"in_features", "hidden_features", "experts", "activation", "dtype", "device"}
    if taken := options.keys() & fixed:
        raise TypeError(
            f"sizes, activation, dtype and device are those of the old experts, got options {sorted(taken)}."
        )
    effort = {**EFFORT, **(fit or {})}
    if unknown := effort.keys() - {*EFFORT, "seed"}:
        raise TypeError(f"fit may only have the keys {[*EFFORT, 'seed']}, got {sorted(unknown)}.")
    options = {"format": format, "parameters": parameters, "fit": effort, **options}
    planned = plan_replacements(model, pattern, is_experts, _maker, "module of routed experts", options)
    if dry_run:
        return [replacement for _, replacement in planned.values()]
    if inputs is not None:
        covariances = _covariances(model, [*planned], inputs)
        planned = {
            old: (partial(make, covariances=covariances[old]), replacement)
            for old, (make, replacement) in planned.items()
        }
    return put_replacements(model, planned, _OfOneInput)


def is_experts(module: nn.Module) -> bool:
    """Whether a module has stacked expert weights, as in transformers 5."""
    stacks = (module._parameters.get(name) for name in STACKS)
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def _maker(
    module: nn.Module, format: Any, parameters: float | None, fit: Mapping[str, Any], **options: Any
) -> Callable[..., RoutedExperts]:
    """Check an old module, and return a function that makes the new one."""
    check_readable(module)
    names = sorted(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if names != sorted(STACKS) or not callable(getattr(module, "act_fn", None)):
        raise ValueError(
            f"experts must have the parameters {' and '.join(STACKS)} and no others, and an activation "
            f"act_fn; got {names} of {type(module).__name__}."
        )
    experts: Any = module
    gate_up, down = experts.gate_up_proj, experts.down_proj
    count, twice, features = gate_up.shape
    hidden = twice // 2
    if twice % 2 or down.shape != (count, features, hidden):
        raise ValueError(
            "gate_up_proj must have shape (N, 2 F, D) and down_proj (N, D, F); got "
            f"{tuple(gate_up.shape)} and {tuple(down.shape)}."
        )
    if gate_up.dtype != down.dtype or gate_up.requires_grad != down.requires_grad:
        raise ValueError("both weights must have the same dtype and the same requires_grad.")
    check_same(_OfOneInput(module), _rebuild, features)
    ranks = [options.get(f"{name}_rank") for name in ("gate_up", "down")]
    if parameters is None and ranks == [None, None] and get_format(format).bonds(1):
        parameters = PARAMETERS
    sizes = {"in_features": features, "hidden_features": hidden, "experts": count}
    place = {"activation": experts.act_fn, "device": gate_up.device, "dtype": gate_up.dtype}
    options = {**sizes, "format": format, "parameters": parameters, **place, **options}

    def make(covariances: Sequence[Tensor | None] = (None, None), **more: Any) -> RoutedExperts:
        new = RoutedExperts(**{**options, **more})
        if not (gate_up.is_meta or new.down.factor_0.is_meta):
            weights = zip((new.gate_up, new.down), (gate_up.mT, down.mT), covariances, strict=True)
            errors = [
                fit_experts(part.weight, stack, False, input_covariance=covariance, **fit)
                for part, stack, covariance in weights
            ]
            new.fit_errors = tuple(plain for plain, _ in errors)
            new.weighted_errors = tuple(error for _, error in errors if error is not None)
        return new.requires_grad_(gate_up.requires_grad).train(module.training)

    return make


class _OfOneInput(nn.Module):
    """Old or new experts as a module of one input, which is routed by position in the batch."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        rows, experts = x.reshape(-1, x.shape[-1]), cast(Any, self.experts)
        count = len(experts.down_proj) if is_experts(experts) else experts.num_experts
        return cast(Tensor, experts(rows, *_routing(len(rows), count)).reshape(x.shape))


def _routing(count: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two experts for each input (or one if there is only one), and their weights."""
    rows = torch.arange(count, device="cpu")
    other = rows + 1 + rows // num_experts % max(num_experts - 1, 1)
    index, share = torch.stack([rows, other], -1) % num_experts, rows / (2 * count)
    weights = torch.stack([0.5 + share, 0.75 - share], -1)
    return index[:, :num_experts], weights[:, :num_experts]


def _rebuild(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function that experts are expected to compute, for the inputs of `_OfOneInput`."""
    experts: Any = module.experts

    def mapped(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        index, weights = _routing(len(rows), len(experts.down_proj))
        y = torch.zeros_like(rows)
        for n, down in enumerate(experts.down_proj):
            row, place = (index == n).nonzero(as_tuple=True)
            part = _hidden(experts, n, rows[row]) @ down.T
            y = y.index_add(0, row, weights[row, place, None] * part)
        return y.reshape(x.shape)

    return mapped


def _hidden(experts: Any, n: int, rows: Tensor) -> Tensor:
    """The inputs of the second weight of an expert, given the inputs of its first weight."""
    gate, up = (rows @ experts.gate_up_proj[n].T).chunk(2, -1)
    return cast(Tensor, experts.act_fn(gate) * up)


@torch.no_grad()
def _covariances(
    model: nn.Module, modules: Sequence[nn.Module], inputs: Iterable[Any]
) -> dict[nn.Module, list[Tensor]]:
    """Covariances of the inputs of each expert, for both weights of each module, from one pass.

    Each input is weighted by the square of its routing weight, like the error of its output.
    """
    sums: dict[nn.Module, list[Tensor]] = {}

    def add(module: nn.Module, arguments: dict[str, Any]) -> None:
        experts: Any = module
        rows, index, weights = arguments.values()
        if module not in sums:
            count, *sizes = experts.down_proj.shape
            sums[module] = [torch.zeros(count, n, n, dtype=torch.float64, device="cpu") for n in sizes]
        for n in range(len(experts.down_proj)):
            row, place = (index == n).nonzero(as_tuple=True)
            z, scale = rows[row], weights[row, place, None].float()
            for total, vectors in zip(sums[module], (z, _hidden(experts, n, z)), strict=True):
                scaled = scale * vectors.float()
                total[n] += (scaled.T @ scaled).cpu()

    with evaluating(model), watch_calls({module: module for module in modules}, before=add):
        for batch in inputs:
            _call(model, batch)
    missing = [name for name, module in model.named_modules() if module in modules and module not in sums]
    if missing:
        raise ValueError(f"the inputs must reach all modules to be replaced; they do not reach {missing}.")
    return {module: [_damped(total) for total in totals] for module, totals in sums.items()}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def _damped(total: Tensor) -> Tensor:
    """Add damping to a stack of covariances, of any scale."""
    more = DAMPING * total.diagonal(dim1=-2, dim2=-1).mean()
    return total + more * torch.eye(total.shape[-1], dtype=total.dtype)
