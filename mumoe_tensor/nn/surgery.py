"""Replacement of linear layers and MLP blocks of a model by layers of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn

from mumoe_tensor.checks import check_flag
from mumoe_tensor.nn.described import check_model, is_layer, prepare_to_save
from mumoe_tensor.nn.layers import MuMoE
from mumoe_tensor.nn.linear import check_linear, is_linear, layer_like
from mumoe_tensor.nn.mlp import is_mlp, read_mlp
from mumoe_tensor.nn.reading import call, copy_of
from mumoe_tensor.nn.size import num_parameters

#: Submodules of torch modules that read their weights instead of calling them.
_READ_BY_PARENT = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
#: The predicate in error messages about a module.
REFUSAL = "cannot be replaced"
#: Wrappers that register all parameters of a model when it is wrapped.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


class Replacement(NamedTuple):
    """The replacement of one module, actual or planned (in a dry run).

    Attributes
    ----------
    names : tuple of str
        The module's names in the model; several if it is used in several places.
    before, after : int
        Number of parameters of the old and the new module.
    errors : tuple of float
        Relative error of the experts in the Frobenius norm, one for each weight. Empty if nothing is fitted,
        as in a dry run or on the meta device.
    output_error : float or None
        Relative error of the outputs on random inputs, in evaluation mode and in float32: the norm of the
        difference divided by the norm of the outputs. None if nothing is fitted.
    weighted_errors : tuple of float
        Like `errors`, for the outputs on the inputs by which the fit is weighted; empty without weighting.
    """

    names: tuple[str, ...]
    before: int
    after: int
    errors: tuple[float, ...] = ()
    output_error: float | None = None
    weighted_errors: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    def __str__(self) -> str:
        start = f"{', '.join(self.names)}: {self.before:,} -> {self.after:,} parameters"
        if self.output_error is None:
            return f"{start}, not fitted"
        kinds = {"of weights": self.errors, "weighted by inputs": self.weighted_errors}
        errors = [
            f"{kind} {', '.join(f'{error:.1e}' for error in of_kind)}"
            for kind, of_kind in kinds.items()
            if of_kind
        ]
        return f"{start}, relative error {', '.join(errors)}, of outputs {self.output_error:.1e}"


def replace_linear(
    model: nn.Module, pattern: str, *, dry_run: bool = False, **options: Any
) -> list[Replacement]:
    """Replace linear layers by `MuMoE` layers that start with the same outputs, in place.

    All layers are checked and all new layers are made before the first is replaced, so an error leaves the
    model unchanged. If any name of a layer with several names matches, it is replaced under all of them. If
    a layer is frozen, its replacement is frozen too.

    Parameters
    ----------
    pattern : str
        Shell pattern of the names to replace, e.g. ``"encoder.*.proj"``.
    dry_run : bool, default False
        Return the replacements without changing the model.
    **options
        Arguments of `MuMoE`, such as experts, format, and rank or parameters.

    Raises
    ------
    ValueError
        If the pattern matches no linear layer, or one that cannot be replaced, because it computes something
        else (it has a hook, a parametrization or an overridden forward method), shares parameters with
        another module, or has a parent that reads the weight instead of calling the layer.
    """
    return _replace(model, pattern, is_linear, _linear_maker, "linear layer", dry_run, options)


def replace_mlp(
    model: nn.Module, pattern: str, *, dry_run: bool = False, **options: Any
) -> list[Replacement]:
    """Replace MLP blocks by `MuMoEMLP` blocks that start with the same outputs, in place.

    A block is a module with two consecutive linear layers and an activation between them. A dropout may
    follow the activation and the second linear layer. A gated block has another linear layer parallel to the
    first, whose outputs multiply the outputs of the activation; both may be halves of a single layer. Before
    anything is replaced, the outputs of a copy of each block are compared with the outputs computed from its
    parts, in evaluation and in training mode.

    Patterns, dry runs, blocks with several names, frozen blocks and errors are as in `replace_linear`. The
    options are the arguments of `MuMoEMLP`; `activation` is required if it is not a module of the block.

    Raises
    ------
    ValueError
        If the pattern matches no such block, or one that cannot be replaced, because it computes something
        else (it has a norm, a residual connection, a second input or a hook) or shares parameters with
        another module.
    """
    return _replace(model, pattern, is_mlp, _mlp_maker, "block of linear layers", dry_run, options)


def _linear_maker(linear: nn.Module, **options: Any) -> Callable[..., Any]:
    check_linear(linear)
    return lambda **more: layer_like(MuMoE, [linear], **{**options, **more}).train(linear.training)


def _mlp_maker(block: nn.Module, activation: Any = None, **options: Any) -> Callable[..., Any]:
    parts = read_mlp(block, activation)
    return lambda **more: parts.with_experts(training=block.training, **{**options, **more})


def _replace(
    model: nn.Module,
    pattern: str,
    fits: Callable[[nn.Module], bool],
    maker: Callable[..., Callable[..., Any]],
    what: str,
    dry_run: bool,
    options: dict[str, Any],
) -> list[Replacement]:
    check_flag(dry_run, "dry_run")
    if "experts" not in options or "bias" in options:
        raise TypeError(
            "the options must include experts, but not bias, which follows from the old layer; got "
            f"{options}."
        )
    planned = plan_replacements(model, pattern, fits, maker, what, options)
    return [each for _, each in planned.values()] if dry_run else put_replacements(model, planned)


#: The modules to replace, each with a function that makes the new module, and the preliminary report.
Planned = dict[nn.Module, tuple[Callable[..., Any], Replacement]]


def plan_replacements(
    model: nn.Module,
    pattern: str,
    fits: Callable[[nn.Module], bool],
    maker: Callable[..., Callable[..., Any]],
    what: str,
    options: dict[str, Any],
    refusal: str = REFUSAL,
) -> Planned:
    """Check all modules that match the pattern, without fitting or changing anything."""
    chosen = choose(model, pattern, fits, what)
    planned: Planned = {}
    for old, names in chosen.items():
        with _named(names[0], refusal):
            _check_place(model, old, names, chosen)
            make = maker(old, **options)
            # A layer on the meta device has sizes but no values, and reveals invalid options.
            modules = old, make(device="meta")
            before, after = (num_parameters(module) for module in modules)
        planned[old] = make, Replacement(tuple(names), before, after)
    return planned


def put_replacements(
    model: nn.Module,
    planned: Planned,
    called: Callable[[nn.Module], nn.Module] = lambda module: module,
    refusal: str = REFUSAL,
) -> list[Replacement]:
    """Make all new modules, compare each with the old one, and then replace all of them.

    `called` wraps an old or new module so that it takes a single input.
    """
    new, fitted = {}, []
    for old, (make, replacement) in planned.items():
        with _named(replacement.name, refusal):
            new[old] = layer = make()
            difference = None
            if layer.fit_errors:
                difference = output_error(called(old), called(layer), layer.in_features)
            if difference is not None and not isfinite(difference):
                raise ValueError(
                    f"the outputs of the new module must be finite, got a relative error of {difference}."
                )
        fitted.append(
            replacement._replace(
                errors=layer.fit_errors,
                output_error=difference,
                weighted_errors=getattr(layer, "weighted_errors", ()),
            )
        )
    put_all(model, {old: [*each.names] for old, (_, each) in planned.items()}, new)
    return fitted


@contextmanager
def _named(name: str, refusal: str) -> Iterator[None]:
    """Add the name of a module to error messages."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name!r} {refusal}: {error}") from error


def choose(
    model: nn.Module, pattern: str, fits: Callable[[nn.Module], bool], what: str
) -> dict[nn.Module, list[str]]:
    """The suitable modules that match the pattern, each with all its names in the model."""
    check_model(model)
    if not isinstance(pattern, str):
        raise TypeError(f"the pattern must be a string, got {pattern!r}.")
    candidates: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (module in candidates or fits(module)):
            candidates.setdefault(module, []).append(name)
    chosen = {m: names for m, names in candidates.items() if any(fnmatchcase(x, pattern) for x in names)}
    if not chosen:
        near = [name for names in candidates.values() for name in names]
        others = [
            f"{name!r}, a {type(module).__name__} of {[type(child).__name__ for child in module.children()]}"
            for name, module in model.named_modules()
            if name and fnmatchcase(name, pattern)
        ]
        but = f", but {others[0]}" if others else ""
        raise ValueError(
            f"the pattern must name a {what} in the model; {pattern!r} names none of {near}{but}."
        )
    return chosen


def put_all(model: nn.Module, names: dict[nn.Module, list[str]], new: dict[nn.Module, nn.Module]) -> None:
    """Replace all modules, or none of them if an error occurs."""
    places = [(name, old, module) for old, module in new.items() for name in names[old]]
    try:
        for name, _, module in places:
            model.set_submodule(name, module)
    except BaseException:
        for name, old, _ in places:
            model.set_submodule(name, old)
        raise
    prepare_to_save(model)


def _check_place(
    model: nn.Module, module: nn.Module, names: list[str], chosen: dict[nn.Module, list[str]]
) -> None:
    """Raise an error if the rest of the model uses a module in any way other than calling it."""
    for name in names:
        *above, child = name.split(".")
        ancestors = [model.get_submodule(".".join(above[:k])) for k in range(len(above) + 1)]
        for kind, children in _READ_BY_PARENT.items():
            if isinstance(ancestors[-1], kind) and child in children:
                raise ValueError(
                    f"a {kind.__name__} reads the weight of {child!r} instead of calling the module, as in "
                    "its fast path for evaluation."
                )
        classes = {base.__name__ for ancestor in ancestors for base in type(ancestor).__mro__}
        if wrappers := classes & _WRAPPERS:
            raise ValueError(f"the model is wrapped in {', '.join(wrappers)}: replace first, then wrap.")
        if layers := [type(ancestor).__name__ for ancestor in ancestors if is_layer(ancestor)]:
            raise ValueError(f"it is a part of a layer of class {layers[0]}, which must stay whole.")
        if around := [n for other in chosen.values() for n in other if name.startswith(f"{n}.")]:
            raise ValueError(f"the pattern also matches {around[0]!r}, of which it is a part.")
    parameters = {_memory(parameter) for parameter in module.parameters()}
    for other, holder in model.named_modules(remove_duplicate=False):
        if not any(other == name or other.startswith(f"{name}.") for name in names):
            for key, parameter in holder.named_parameters(recurse=False):
                if _memory(parameter) in parameters:
                    shared = f"{other}.{key}" if other else key
                    raise ValueError(f"it shares a parameter with the rest of the model, {shared!r}.")


def _memory(parameter: nn.Parameter) -> int:
    """A number that is equal for two parameters if they are the same or share memory."""
    ordinary = type(parameter) is nn.Parameter
    return (ordinary and parameter.data_ptr()) or id(parameter)


def output_error(old: nn.Module, new: nn.Module, in_features: int) -> float:
    """Relative error of the outputs on normal inputs."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        x = torch.randn(64, in_features, device="cpu", dtype=torch.float32)
        expected, y = (call(copy_of(module).eval(), x) for module in (old, new))
    norm = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(y - expected) / norm) if norm else float(y.norm())
