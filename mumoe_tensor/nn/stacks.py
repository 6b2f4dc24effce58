"""Replace the experts of a mixture of experts, whose weights are stacks, by factorized ones."""

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
#: Fraction of the old parameters, where the caller gives neither that nor a rank.
PARAMETERS = 0.8
#: Effort of a fit, unless the caller asks for more or less.
EFFORT = {"n_restarts": 1, "n_iter": 50, "tolerance": 1e-4}
#: What is added to the diagonal of the covariance of each expert, as a fraction of the mean of all diagonals:
#: the inputs are a sample, and an expert may have none of them.
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
    """Replace the experts of mixtures of experts by factorized ones, in place; router and loss stay.

    Experts are a module with the parameters ``gate_up_proj`` of shape (N, 2 F, D) and ``down_proj`` of shape
    (N, D, F) that is called with inputs, the numbers of their experts and weights, as those of Mixtral,
    OLMoE, Qwen and DeepSeek in transformers 5. `RoutedExperts` take its place, each weight the best fit to
    the old one. Before anything is replaced, a copy of each module is compared with what its parameters say,
    and all new modules are made: an error leaves the model as it is.

    Parameters
    ----------
    pattern : str, default "*"
        Shell pattern of the names of the modules, e.g. ``"model.layers.[0-3].*"``.
    format : str or Format, default "lowrank"
        Two thin matrices for each expert; ``"shared-expert"``, one matrix for all and what each adds to it;
        CP, and so on.
    parameters : float, optional
        Fraction of the old parameters that each weight has at most; 0.8 by default, if the format has a rank
        and the options have none.
    inputs : iterable, optional
        Batches the model is called with once, in evaluation: the arguments as a mapping, as a tuple, or one
        argument. The fit is then weighted by the inputs of each expert, as they and their routing weights
        occur. Meanwhile N (D² + F²) numbers of float64 are held for each module.
    fit : mapping, optional
        ``n_restarts``, ``n_iter``, ``tolerance`` and ``seed`` of `.decompose`, as ``{"n_restarts": 4}``.
    dry_run : bool, default False
        Change nothing, and only return what would be replaced.
    **options
        Of `RoutedExperts`: ``gate_up_rank``, ``down_rank`` and so on.

    Returns
    -------
    list of Replacement
        One for each module, with the errors of both weights: plain ones, and with `inputs` weighted ones.

    Raises
    ------
    ValueError
        If the pattern names no experts, or some that cannot be replaced: they have other parameters, as the
        interleaved ones with biases of GPT-OSS; compute something else or more; share parameters with another
        module; or are not called with the `inputs`.
    """
    check_flag(dry_run, "dry_run")
    if isinstance(inputs, (Tensor, Mapping)):
        raise TypeError(f"inputs must be batches, as a list of them; got one {type(inputs).__name__}.")
    fixed = {"in_features", "hidden_features", "experts", "activation", "dtype", "device"}
    if taken := options.keys() & fixed:
        raise TypeError(
            f"sizes, activation, dtype and device are those of the old experts, got options {sorted(taken)}."
        )
    effort = {**EFFORT, **(fit or {})}
    if unknown := effort.keys() - {*EFFORT, "seed"}:
        raise TypeError(f"fit must be of {[*EFFORT, 'seed']}, got {sorted(unknown)}.")
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
    """Whether a module has the weights of experts as stacks, as the modules of transformers 5 have them."""
    stacks = (module._parameters.get(name) for name in STACKS)
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def _maker(
    module: nn.Module, format: Any, parameters: float | None, fit: Mapping[str, Any], **options: Any
) -> Callable[..., RoutedExperts]:
    """What makes the new module for an old one, which is checked."""
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
        raise ValueError("both weights must have one dtype, and be frozen both or neither.")
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
    """Experts, old or new, for inputs that are routed by their place in a batch."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        rows, experts = x.reshape(-1, x.shape[-1]), cast(Any, self.experts)
        count = len(experts.down_proj) if is_experts(experts) else experts.num_experts
        return cast(Tensor, experts(rows, *_routing(len(rows), count)).reshape(x.shape))


def _routing(count: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two experts for each input, one where there is but one, and their weights."""
    rows = torch.arange(count, device="cpu")
    other = rows + 1 + rows // num_experts % max(num_experts - 1, 1)
    index, share = torch.stack([rows, other], -1) % num_experts, rows / (2 * count)
    weights = torch.stack([0.5 + share, 0.75 - share], -1)
    return index[:, :num_experts], weights[:, :num_experts]


def _rebuild(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the parameters of experts say, for the inputs of `_OfOneInput`."""
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
    """The inputs of the second weight of an expert, from those of its first."""
    gate, up = (rows @ experts.gate_up_proj[n].T).chunk(2, -1)
    return cast(Tensor, experts.act_fn(gate) * up)


@torch.no_grad()
def _covariances(
    model: nn.Module, modules: Sequence[nn.Module], inputs: Iterable[Any]
) -> dict[nn.Module, list[Tensor]]:
    """For both weights of each module the covariance of the inputs of each expert, from one pass.

    An input counts with the square of its routing weight, as the error of its output does.
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
        raise ValueError(f"the inputs must reach all experts to be replaced; they do not reach {missing}.")
    return {module: [_damped(total) for total in totals] for module, totals in sums.items()}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def _damped(total: Tensor) -> Tensor:
    """A stack of covariances, of any scale, with more on the diagonals."""
    more = DAMPING * total.diagonal(dim1=-2, dim2=-1).mean()
    return total + more * torch.eye(total.shape[-1], dtype=total.dtype)
