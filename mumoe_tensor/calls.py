"""The state of torch during a call: tracing, transforms, the backward pass, autocast.

This module gives public names to the private attributes of torch that the layers read. (It imports torch, so
modules for all backends import it only inside functions.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module

#: Whether ``torch.jit.trace`` records the call.
is_jit_traced = torch.jit.is_tracing  # type: ignore[attr-defined]  # documented, but not in __all__
#: The mode in which ``make_fx`` records the call, or None.
get_proxy_mode = proxy_tensor.get_proxy_mode
#: Whether torch.func transforms the call (vmap, grad, ...).
is_transformed = torch._C._are_functorch_transforms_active
#: Whether a tensor is a batch of gradients (``is_grads_batched``), which `is_transformed` does not see.
is_batched = torch._C._functorch.is_legacy_batchedtensor
#: The number of the backward pass in which the call is made, or -1 outside of one. (Not for torch.compile.)
backward_pass = torch._C._current_graph_task_id
#: Global hooks, which apply to all modules and see or change inputs, outputs and their gradients.
HOOKS_ON_ALL_MODULES = (
    module._global_forward_pre_hooks,
    module._global_forward_hooks,
    module._global_backward_hooks,
    module._global_backward_pre_hooks,
)

_HOOKS_ON_ONE = {
    "forward hook": "_forward_hooks",
    "forward pre-hook": "_forward_pre_hooks",
    "backward hook": "_backward_hooks",
    "backward pre-hook": "_backward_pre_hooks",
    "state dict hook": "_state_dict_hooks",
    "state dict pre-hook": "_state_dict_pre_hooks",
    "hook on loading": "_load_state_dict_pre_hooks",
    "hook after loading": "_load_state_dict_post_hooks",
}

#: Device types with autocast. (Computed at import: torch 2.11 cannot compile this check.)
_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def unviewed(array: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a new result without making it a view for autograd. No other reference to it may exist."""
    return torch.ops.aten._unsafe_view(array, shape)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A faster ``function.apply`` for calls that are not transformed or compiled; arguments are positional.

    (``function.apply`` inspects the signature in every call, which takes longer than a small product.)
    """
    inherited: Any = super(torch.autograd.Function, function)
    apply: Callable[..., Any] = inherited.apply
    return apply


def is_recorded() -> bool:
    """Whether ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or ``make_fx`` is tracing this call.

    The trace later runs on other values and batch sizes, so control flow must not depend on values, and the
    batch size is not a constant.
    """
    return is_compiling() or is_jit_traced() or get_proxy_mode() is not None


def is_exported() -> bool:
    """Like `is_recorded`, but not for ``torch.compile``: the trace must run without this package."""
    return torch.compiler.is_exporting() if is_compiling() else is_recorded()


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is in evaluation mode, gradients are disabled, and torch is not tracing the call."""
    return not (module.training or torch.is_grad_enabled() or is_recorded())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this device, or None if autocast is off."""
    kind = device.type
    if kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module does more than its `forward`."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def hooks_of(module: nn.Module) -> dict[str, list[str]]:
    """Names of the hooks on a module (on calls and on state dicts), by kind."""
    hooks = {kind: getattr(module, attribute).values() for kind, attribute in _HOOKS_ON_ONE.items()}
    return {
        kind: [getattr(hook, "__name__", type(hook).__name__) for hook in of_kind]
        for kind, of_kind in hooks.items()
        if of_kind
    }


def check_dense(x: Tensor) -> None:
    """Raise a TypeError unless an input is a dense tensor."""
    if not isinstance(x, Tensor):
        # Usually a Proxy of torch.fx.
        raise TypeError(
            f"an input must be a torch.Tensor, got {type(x).__name__}; a torch.fx Tracer must treat the "
            "layers as leaves, see its method is_leaf_module."
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor: pad it" if x.is_nested else f"layout {x.layout}: make it dense"
        raise TypeError(f"an input must be a dense tensor, got {kind}.")
