"""Put layers of experts into a model of someone else, in the place of its linear layers and MLP blocks."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from mumoe_tensor.formats.base import check_flag
from mumoe_tensor.nn.layers import MuMoE, MuMoEMLP
from mumoe_tensor.nn.linear import is_linear


class Replacement(NamedTuple):
    """What was, or in a dry run would be, put in the place of a module.

    Attributes
    ----------
    name : str
        The module's name in the model.
    before, after : int
        Parameters of the old module and of the new.
    errors : tuple of float
        How far the experts are from each old linear layer: relative errors in the Frobenius norm, zero where
        the rank allows for it. Empty in a dry run.
    """

    name: str
    before: int
    after: int
    errors: tuple[float, ...]

    def __str__(self) -> str:
        errors = ", ".join(f"{error:.2%}" for error in self.errors) or "not fitted"
        return f"{self.name}: {self.before:,} -> {self.after:,} parameters, error {errors}"


def replace_linear(
    model: nn.Module, pattern: str, *, dry_run: bool = False, **options: Any
) -> list[Replacement]:
    """Replace linear layers by `MuMoE` layers that start as they are, in place.

    Parameters
    ----------
    model : Module
    pattern : str
        Shell pattern of the names to replace, e.g. ``"encoder.*.proj"``.
    dry_run : bool, default False
        Change nothing, and only say what would be done.
    **options
        Of `MuMoE`: experts, format, rank or parameters, and so on.

    Returns
    -------
    list of Replacement

    Raises
    ------
    ValueError
        If the pattern names no linear layer.
    """
    return _replace(model, pattern, is_linear, MuMoE.from_linear, "linear layer", dry_run, options)


def replace_mlp(
    model: nn.Module, pattern: str, *, dry_run: bool = False, **options: Any
) -> list[Replacement]:
    """Replace MLP blocks by `MuMoEMLP` blocks that start as they are, in place.

    A block is a module with two linear layers, called one after the other, and an activation between them.

    Parameters
    ----------
    model : Module
    pattern : str
        Shell pattern of the names to replace, e.g. ``"transformer.h.*.mlp"``.
    dry_run : bool, default False
        Change nothing, and only say what would be done.
    **options
        Of `MuMoEMLP`: experts, format, rank or parameters, and so on; and `activation`, where the block does
        not tell.

    Returns
    -------
    list of Replacement

    Raises
    ------
    ValueError
        If the pattern names no such block, or its activation cannot be told.
    """
    return _replace(model, pattern, _is_mlp, _from_block, "block of two linear layers", dry_run, options)


def _replace(
    model: nn.Module,
    pattern: str,
    fits: Callable[[nn.Module], bool],
    make: Callable[..., Any],
    what: str,
    dry_run: bool,
    options: dict[str, Any],
) -> list[Replacement]:
    check_flag(dry_run, "dry_run")
    found = [
        (name, old)
        for name, old in model.named_modules()
        if name and fnmatchcase(name, pattern) and fits(old)
    ]
    if not found:
        near = [name for name, module in model.named_modules() if name and fits(module)]
        raise ValueError(f"the pattern must name a {what}; {pattern!r} names none of {near}.")
    replacements = []
    for name, old in found:
        # On the meta device a layer has sizes but no values.
        new = make(old, **options, **({"device": "meta"} if dry_run else {}))
        before, after = (sum(p.numel() for p in module.parameters()) for module in (old, new))
        replacements.append(Replacement(name, before, after, () if dry_run else new.fit_errors))
        if not dry_run:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.train(old.training))
    return replacements


def _linears(block: nn.Module) -> list[nn.Module]:
    return [child for child in block.children() if is_linear(child)]


def _is_mlp(module: nn.Module) -> bool:
    return len(_linears(module)) == 2


def _from_block(block: nn.Module, **options: Any) -> MuMoEMLP:
    up, down = _linears(block)
    dropouts = [child.p for child in block.children() if isinstance(child, nn.Dropout)]
    others = [
        child for child in block.children() if not is_linear(child) and not isinstance(child, nn.Dropout)
    ]
    if "activation" not in options:
        if len(others) != 1 or any(others[0].parameters()):
            raise ValueError(
                "a block must have one module besides its linear layers and dropout, the activation, or "
                f"`activation` must be given; it has {[type(other).__name__ for other in others]}."
            )
        options["activation"] = others[0]
    return MuMoEMLP.from_linears(up, down, **{"dropout": dropouts[-1] if dropouts else 0.0, **options})
