"""Checks that a module from another library computes nothing beyond its parts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.calls import hooks_of


def check_readable(module: nn.Module) -> None:
    """Raise an error if a module has hooks, parametrizations or other features that a replacement would lose.

    The module is not called.
    """
    for name, parameter in module.named_parameters():
        _check_parameter(parameter, name)
    for name, child in module.named_modules():
        where = f" on {name!r}" if name else ""
        if nn.utils.parametrize.is_parametrized(child):
            raise ValueError(f"the module has a parametrization{where}: remove it first.")
        for kind, names in hooks_of(child).items():
            raise ValueError(f"the module has a {kind}{where}: {names}; the new layer would not have it.")
        if "forward" in vars(child):
            raise ValueError(
                f"the instance has its own forward method{where}, for example by offloading with accelerate."
            )


def _check_parameter(parameter: nn.Parameter, name: str) -> None:
    if nn.parameter.is_lazy(parameter):
        raise ValueError(f"the parameter {name!r} is lazy and has no values yet: call the model once.")
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        raise ValueError(
            f"the parameter {name!r} must be an ordinary tensor, got {type(parameter).__name__}."
        )
    if parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"the parameter {name!r} must have a float dtype, got {parameter.dtype}.")
    if not parameter.is_meta and not parameter.detach().isfinite().all():
        raise ValueError(f"the parameter {name!r} must be finite.")
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise ValueError(f"the parameter {name!r} has a hook, which a new parameter would not have.")


def optional_inputs(module: nn.Module, reserved: Container[str] = ()) -> list[str]:
    """Names of the optional inputs of a module.

    Raises an error if the module cannot be called with a single input, or an optional input has a reserved
    name.
    """
    inputs = inspect.signature(module.forward).parameters
    others = [*inputs.values()][1:]
    needed = [x for x in others if x.default is x.empty or x.name in reserved]
    if not inputs or needed or any(x.kind in (x.VAR_POSITIONAL, x.VAR_KEYWORD) for x in inputs.values()):
        raise ValueError(f"the forward method must take one input, got {[*inputs]}.")
    return [x.name for x in others]


class _Unused(Tensor):
    """A placeholder for an input that must not be used: any operation on it raises an error."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        raise ValueError(f"{getattr(function, '__name__', function)} reads it.")


def check_unused(module: nn.Module, names: list[str], x: Tensor) -> None:
    """Raise an error if a module uses one of its optional inputs. The module must be a copy."""
    unused, y = torch.empty(0, device="cpu").as_subclass(_Unused), call(module, x)
    for name in names:
        try:
            is_used = not torch.equal(y, call(partial(module, **{name: unused}), x))
        except ValueError:
            is_used = True
        if is_used:
            raise ValueError(f"the forward method must use one input, but it also uses {name!r}.")


def copy_of(module: nn.Module) -> nn.Module:
    """A copy to call, on the CPU and in float32, so that the state of the module does not change.

    A module on the meta device gets random values.
    """
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(f"the module cannot be copied: {type(error).__name__}: {error}") from error
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        return draw(copied.to_empty(device="cpu").float())
    return copied.to("cpu", torch.float32)


@torch.no_grad()
def draw(module: nn.Module) -> nn.Module:
    """Set the values of a copy at random, so that zero weights or unit scales cannot hide operations."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=max(tensor.shape[-1:], default=1) ** -0.5)
    return module


def probes(in_features: int) -> list[Tensor]:
    """Random inputs of shapes (112, in_features) and (16, 7, in_features), at seven scales, 0.1 to 100."""
    scales = torch.logspace(-1, 2, 7, device="cpu", dtype=torch.float32)
    x = torch.randn(16, 7, in_features, device="cpu", dtype=torch.float32) * scales[:, None]
    return [x.flatten(0, 1), x]


def call(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs of a copy, always with the same random numbers. Use it under `torch.random.fork_rng`."""
    torch.default_generator.manual_seed(0)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = module(x.clone())
    except Exception as error:
        raise ValueError(
            f"the module cannot be called with one tensor of shape {tuple(x.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(f"the module must return a tensor, got {type(y).__name__}.")
    return y


def check_same(
    module: nn.Module, rebuild: Callable[[nn.Module], Callable[[Tensor], Tensor]], in_features: int
) -> None:
    """Raise an error if a module computes more than its parts do, in evaluation or in training mode.

    The outputs of a copy are compared with those of `rebuild(copy)`, on random inputs, with the module's
    parameters and with random ones. One input shape is sufficient, since activations such as `torch.nn.PReLU`
    do not accept all shapes.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        copied, inputs = copy_of(module), probes(in_features)
        for drawn in (False, True):
            if drawn:
                draw(copied)
            for training in (False, True):
                plain = rebuild(copied.train(training))
                for x, y in _outputs(copied, inputs):
                    if cause := _difference(y, call(plain, x), x):
                        when = " in training mode" if training else ""
                        raise ValueError(f"its outputs are not those of its layers alone{when}: {cause}.")
        x, _ = _outputs(copied.eval(), inputs)[0]
        gradient, expected = (_gradient(function, x) for function in (copied, rebuild(copied)))
        # Rounding may move a hidden feature across a kink and thus change the gradient.
        if gradient is None or not are_equal(gradient, expected, 0.05):
            raise ValueError("the gradient of its input is not that of its layers alone.")


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The gradient of the sum of the outputs with respect to the inputs, or None."""
    x = x.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        y = function(x)
    return torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None


def _outputs(module: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The inputs that a copy accepts (at least one), each with its outputs."""
    called, errors = [], []
    for x in inputs:
        try:
            called.append((x, call(module, x)))
        except ValueError as error:
            errors.append(error)
    if not called:
        raise errors[0]
    return called


def _difference(y: Tensor, expected: Tensor, x: Tensor) -> str | None:
    """A description of the difference between outputs, or None if they are equal."""
    if y.shape != expected.shape:
        return f"outputs have shape {tuple(y.shape)} instead of {tuple(expected.shape)}"
    if are_equal(y, expected):
        return None
    if y.shape == x.shape and are_equal(y - x, expected, 1e-3):
        return "it adds its input, like a residual connection"
    scale = (y * expected).sum() / expected.square().sum()
    if are_equal(y, scale * expected):
        return f"it multiplies by {scale:.4g}"
    return f"the relative difference of outputs is {relative_difference(y, expected).max():.1e}"


def relative_difference(y: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference, relative to the expected outputs, for each scale of `probes`."""
    difference, norm = (
        torch.linalg.vector_norm(z.reshape(-1, 7, z.shape[-1]), dim=(0, 2)) for z in (y - expected, expected)
    )
    return torch.where(difference == 0, 0.0, difference / norm)


def are_equal(y: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether outputs are equal up to rounding (in float32), for each scale."""
    return bool((relative_difference(y, expected) <= tolerance).all())
