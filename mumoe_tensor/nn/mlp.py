"""Reading of MLP blocks of other libraries: two linear layers with an activation between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.layers import MuMoEMLP
from mumoe_tensor.nn.linear import check_linear, is_linear, layer_like, matrix_of
from mumoe_tensor.nn.reading import call, check_one_input, check_readable, check_same, copy_of, probes

Activation = str | Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """The parts of an MLP block; `hidden_dropout` is that of the results of the activation."""

    up: nn.Module
    activation: Activation
    down: nn.Module
    hidden_dropout: nn.Module | None = None
    dropout: nn.Module | None = None

    def with_experts(self, experts: Any, training: bool, **options: Any) -> MuMoEMLP:
        """A `MuMoEMLP` whose experts all start as the linear layers, with copies of the other parts."""
        rates = {name: getattr(getattr(self, name), "p", 0.0) for name in ("hidden_dropout", "dropout")}
        options = {"activation": copy.deepcopy(self.activation), **rates, **options}
        block = layer_like(MuMoEMLP, [self.up, self.down], experts, **options).train(training)
        for name in ("activation", "hidden_dropout", "dropout"):
            old, new = getattr(self, name), getattr(block, name)
            if isinstance(old, nn.Module) and isinstance(new, nn.Module):
                new.train(old.training)
        return block


def is_mlp(module: nn.Module) -> bool:
    """Whether a module has a forward method and two linear layers among its children."""
    return sum(map(is_linear, module.children())) == 2 and type(module).forward is not nn.Module.forward


def read_mlp(block: nn.Module, activation: Activation | None = None) -> Block:
    """Read the parts of a block, in the order in which a copy calls them; see `replace_mlp`.

    A ValueError names the cause if the block computes something else or more.
    """
    check_readable(block)
    check_one_input(block)
    children = dict(block.named_children())
    linears = [name for name, child in children.items() if is_linear(child)]
    for name in linears:
        try:
            check_linear(children[name])
        except ValueError as error:
            raise ValueError(f"of its linear layer {name!r}, {error}") from error
    called = _calls(block, linears)

    def parts_of(module: nn.Module) -> Block:
        parts: dict[str, Any] = {part: module.get_submodule(name) for part, name in names.items()}
        return Block(**{"activation": activation, **parts})

    def rebuild(copied: nn.Module) -> MuMoEMLP:
        return parts_of(copied).with_experts((), copied.training, format="dense")

    try:
        names = _parts(children, called, activation)
        values = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        if unread := [name for name in values if name.split(".")[0] not in names.values()]:
            raise ValueError(
                "parameters and buffers must be those of the linear layers, or of an activation that is a "
                f"module of the block; it has {unread}."
            )
        matrix, bias = matrix_of(children[names["up"]])
        check_same(block, rebuild, matrix.shape[0] - bias)
    except ValueError as error:
        classes = ", ".join(type(children[name]).__name__ for name in called)
        raise ValueError(f"{error} It calls {classes}.") from error
    return parts_of(block)


def _calls(block: nn.Module, linears: list[str]) -> list[str]:
    """Names of the children in the order in which the block calls them."""
    called: list[str] = []
    errors = []
    with torch.random.fork_rng(devices=()):
        copied = copy_of(block).eval()
        for name, child in copied.named_children():
            child.register_forward_hook(lambda *_, name=name: called.append(name))
        # Either linear layer may be the first.
        for linear in linears:
            matrix, bias = matrix_of(copied.get_submodule(linear))
            for x in probes(matrix.shape[0] - bias):
                called.clear()
                try:
                    call(copied, x)
                    return called
                except ValueError as error:
                    errors.append(error)
    raise errors[0]


def _parts(
    children: dict[str, nn.Module], called: list[str], activation: Activation | None
) -> dict[str, str]:
    """Names of the children for the parts of a `Block`, by the order of calls."""
    order = [name for name in called if not _is_identity(children[name])]
    linears = [name for name in order if is_linear(children[name])]
    if len(linears) != 2 or len(set(linears)) != 2:
        raise ValueError("both linear layers must be called once.")
    names = dict(zip(("up", "down"), linears, strict=True))
    first, second = map(order.index, linears)
    between, after = order[first + 1 : second], order[second + 1 :]
    if between and type(children[between[-1]]) is nn.Dropout:
        names["hidden_dropout"] = between.pop()
    if len(between) == 1 and activation is None:
        names["activation"] = between.pop()
    if len(after) == 1 and type(children[after[0]]) is nn.Dropout:
        names["dropout"] = after[0]
    # The comparison of outputs shows whether there is more, and whether `activation` is that of the block.
    if activation is None and "activation" not in names:
        raise ValueError(
            "a block must be a linear layer, an activation, perhaps a dropout, a linear layer and perhaps a "
            "dropout; an activation that is no module of the block must be given as `activation`."
        )
    return names


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
