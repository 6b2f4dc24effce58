"""Parsing of MLP blocks from other libraries: linear layers with an activation between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.layers import MuMoEMLP
from mumoe_tensor.nn.linear import check_linear, halves_of, is_linear, layer_like, matrix_of
from mumoe_tensor.nn.reading import (
    call,
    check_readable,
    check_same,
    check_unused,
    copy_of,
    optional_inputs,
    probes,
)

Activation = str | Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """The parts of an MLP block; `hidden_dropout` applies to the inputs of the last linear layer.

    `to_hidden` contains the linear layer before the activation. A gated block has a second one, whose outputs
    multiply the result of the activation, or a single layer whose outputs are split into halves.
    """

    to_hidden: tuple[nn.Module, ...]
    activation: Activation
    down: nn.Module
    hidden_dropout: nn.Module | None = None
    dropout: nn.Module | None = None

    def with_experts(self, experts: Any, training: bool, **options: Any) -> MuMoEMLP:
        """Make a `MuMoEMLP` whose experts all start as the linear layers, with copies of the other parts."""
        rates = {name: getattr(getattr(self, name), "p", 0.0) for name in ("hidden_dropout", "dropout")}
        options = {"activation": copy.deepcopy(self.activation), **rates, **options}
        if len(self.to_hidden) > 1:
            options["gated"] = True
        block = layer_like(MuMoEMLP, [*self.to_hidden, self.down], experts, **options).train(training)
        for name in ("activation", "hidden_dropout", "dropout"):
            old, new = getattr(self, name), getattr(block, name)
            if isinstance(old, nn.Module) and isinstance(new, nn.Module):
                new.train(old.training)
        return block


class Names(NamedTuple):
    """Names of the submodules of a `Block`: the linear layers in call order, and the others by part."""

    linears: list[str]
    others: dict[str, str]

    def ways(self, block: nn.Module) -> list[Callable[[nn.Module], tuple[nn.Module, ...]]]:
        """Candidates for `Block.to_hidden`, as functions of a block; one of them is right.

        With two layers or halves, the activation may belong to the first or to the second.
        """

        def in_order(module: nn.Module) -> tuple[nn.Module, ...]:
            return tuple(module.get_submodule(name) for name in self.linears[:-1])

        def halves(module: nn.Module) -> tuple[nn.Module, ...]:
            return halves_of(module.get_submodule(self.linears[0]))

        first, last = (matrix_of(block.get_submodule(self.linears[k])) for k in (0, -1))
        outputs, inputs = first[0].shape[1], last[0].shape[0] - last[1]
        is_fused = len(self.linears) == 2 and outputs == 2 * inputs
        read = halves if is_fused else in_order
        is_gated = is_fused or len(self.linears) == 3
        return [read, lambda module: read(module)[::-1]] if is_gated else [read]


def is_mlp(module: nn.Module) -> bool:
    """Whether a module has a forward method, and two or three linear layers as direct submodules."""
    return sum(map(is_linear, module.children())) in (2, 3) and type(module).forward is not nn.Module.forward


def read_mlp(block: nn.Module, activation: Activation | None = None) -> Block:
    """Identify the parts of a block by the order of calls in a copy; see `replace_mlp`.

    If the block computes something else, a ValueError states the cause.
    """
    check_readable(block)
    optional = optional_inputs(block, signature(MuMoEMLP.forward).parameters)
    children = dict(block.named_children())
    linears = [name for name, child in children.items() if is_linear(child)]
    for name in linears:
        try:
            check_linear(children[name])
        except ValueError as error:
            raise ValueError(f"in its linear layer {name!r}, {error}") from error
    called = _calls(block, linears, optional)
    try:
        names = _parts(children, called, activation)
        values = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        read = (*names.linears, *names.others.values())
        if unread := [name for name in values if name.split(".")[0] not in read]:
            raise ValueError(
                "parameters and buffers must be those of the linear layers, or of an activation that is a "
                f"module of the block; it has {unread}."
            )
        return _right_way(block, names, activation)
    except ValueError as error:
        classes = ", ".join(type(children[name]).__name__ for name in called)
        raise ValueError(f"{error} It calls {classes}.") from error


def _right_way(block: nn.Module, names: Names, activation: Activation | None) -> Block:
    """The parts that reproduce the outputs of the block; raises the first ValueError if none do."""
    matrix, bias = matrix_of(block.get_submodule(names.linears[0]))
    errors = []
    for to_hidden in names.ways(block):

        def parts_of(module: nn.Module, to_hidden: Any = to_hidden) -> Block:
            others: dict[str, Any] = {part: module.get_submodule(name) for part, name in names.others.items()}
            down = module.get_submodule(names.linears[-1])
            return Block(to_hidden(module), **{"activation": activation, **others, "down": down})

        def rebuild(copied: nn.Module, parts_of: Any = parts_of) -> MuMoEMLP:
            return parts_of(copied).with_experts((), copied.training, format="dense")

        try:
            check_same(block, rebuild, matrix.shape[0] - bias)
            return parts_of(block)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _calls(block: nn.Module, linears: list[str], optional: list[str]) -> list[str]:
    """Names of the submodules in the order of calls, after checking that optional inputs are not used."""
    called: list[str] = []
    errors = []
    with torch.random.fork_rng(devices=()):
        copied = copy_of(block).eval()
        for name, child in copied.named_children():
            child.register_forward_hook(lambda *_, name=name: called.append(name))
        # Any linear layer may be the first.
        for linear in linears:
            matrix, bias = matrix_of(copied.get_submodule(linear))
            for x in probes(matrix.shape[0] - bias):
                called.clear()
                try:
                    call(copied, x)
                except ValueError as error:
                    errors.append(error)
                    continue
                order = [*called]
                check_unused(copied, optional, x)
                return order
    raise errors[0]


def _parts(children: dict[str, nn.Module], called: list[str], activation: Activation | None) -> Names:
    """Names of the submodules for the parts of a `Block`, inferred from the order of calls."""
    order = [name for name in called if not _is_identity(children[name])]
    linears = [name for name in order if is_linear(children[name])]
    present = [name for name, child in children.items() if is_linear(child)]
    if sorted(linears) != sorted(present):
        raise ValueError(f"each of its linear layers {present} must be called once.")
    first, last = order.index(linears[0]), order.index(linears[-1])
    between = [name for name in order[first + 1 : last] if name not in linears]
    after = order[last + 1 :]
    others = {}
    if between and type(children[between[-1]]) is nn.Dropout:
        others["hidden_dropout"] = between.pop()
    if len(between) == 1 and activation is None:
        others["activation"] = between.pop()
    if len(after) == 1 and type(children[after[0]]) is nn.Dropout:
        others["dropout"] = after[0]
    # Comparing outputs will reveal further operations, and whether `activation` is the block's activation.
    if activation is None and "activation" not in others:
        raise ValueError(
            "a block must consist of a linear layer, an activation, optionally a dropout, a linear layer and "
            "optionally a dropout, and one more linear layer if it is gated; an activation that is not a "
            "module of the block must be passed as `activation`."
        )
    return Names(linears, others)


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
