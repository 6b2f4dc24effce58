"""A contraction as a single autograd function that saves little for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.calls import is_transformed, plain_apply, unviewed
from mumoe_tensor.contraction.execute import arrange, arranged, run
from mumoe_tensor.contraction.layout import Arrangement
from mumoe_tensor.nn.backward import TORCH, Activation, SavePolicy, gradients_of, unpermuted

_NONE: Mapping[int, Tensor] = {}


def contract(
    policy: SavePolicy,
    operands: Sequence[Tensor],
    activation: Activation | None = None,
    ready: Mapping[int, Tensor] = _NONE,
    is_recorded: bool = False,
) -> Tensor:
    """Contract operands like `execute`, with the input vector last.

    An elementwise activation computes the input vector from the last operands, one for each of its arguments.
    These are saved instead of its result. `ready` contains results by position, which are not recomputed.
    When torch traces the call, the plain steps are traced, since a compiler chooses what to save.
    """
    program = policy.program
    if not program.network.takes_input:
        activation = None
    if any(program.arrange):
        inputs: Sequence[Tensor] = ()
        if activation is not None:
            last = len(program.network.operands) - 1
            operands, inputs = operands[:last], operands[last:]
            activation = _arranged_after(activation, program.arrange[last])
        operands = [*arranged(program, operands, TORCH), *inputs]
    if not program.steps:  # a bias: one vector of outputs for all inputs
        return operands[0]
    if torch.is_grad_enabled() and not is_recorded:
        apply = _Contraction.apply if is_transformed() else _apply
        y = apply(policy, activation, tuple(ready), *operands, *ready.values())[0]
    else:
        y = _run(policy, activation, operands, ready)[program.result]
    output = policy.output
    if output is None:
        return y
    if is_recorded or output.shape is None or output != Arrangement(shape=output.shape):
        return arrange(y, output, TORCH)
    return unviewed(y, output.shape)  # so that the next term can be added in place


def _arranged_after(activation: Activation, arrangement: Arrangement | None) -> Activation:
    """The activation, then the arrangement: padding comes last, since the activation of 0 may not be 0."""
    if arrangement is None:
        return activation
    return lambda *inputs: arrange(activation(*inputs), arrangement, TORCH)


def _run(
    policy: SavePolicy,
    activation: Activation | None,
    operands: Sequence[Tensor],
    ready: Mapping[int, Tensor] = _NONE,
    keep: frozenset[int] = frozenset(),
) -> dict[int, Tensor]:
    """The result and the results to keep, by position."""
    last = len(policy.program.network.operands) - 1
    values = {**dict(enumerate(operands[: last + 1])), **ready}
    if activation is not None:
        values[last] = activation(*operands[last:])
    run(policy.program.numbered, values, TORCH, policy.products, keep)
    return values


class _Contraction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        policy: SavePolicy, activation: Activation | None, positions: tuple[int, ...], *operands: Tensor
    ) -> tuple[Tensor, ...]:
        """Contract the operands; the last ones are ready results, with these positions."""
        count = len(operands) - len(positions)
        ready = dict(zip(positions, operands[count:], strict=True))
        saved = policy.saved.difference(positions)
        values = _run(policy, activation, operands[:count], ready, saved)
        y = values[policy.program.result]
        if policy.program.steps[-1].shape is not None:
            # A view returned by an autograd function must not be changed in place, as some activations do.
            y = unviewed(y, y.shape)
        return y, *map(values.__getitem__, sorted(saved))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.policy, ctx.activation, ctx.positions, *operands = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
        policy, activation, positions, saved = ctx.policy, ctx.activation, ctx.positions, ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        count, stop = len(needed) - len(positions), len(needed)
        if gradient is None:
            return (None,) * (3 + stop)
        if torch.is_grad_enabled():
            # For higher derivatives, the gradient must be a function of the operands, not of the saved
            # results.
            plain = SavePolicy(policy.program)

            def contracted(*x: Tensor) -> Tensor:
                ready = dict(zip(positions, x[count:], strict=True))
                return _run(plain, activation, x[:count], ready)[plain.program.result]

            return None, None, None, *torch.func.vjp(contracted, *saved[:stop])[1](gradient)
        if policy.joined is not None:
            gradient = unpermuted(gradient, policy.joined.order)
        ready = dict(zip(positions, saved[count:stop], strict=True))
        results = dict(zip(sorted(policy.saved.difference(positions)), saved[stop:], strict=True))
        needed_of_ready = dict(zip(positions, needed[count:], strict=True))
        gradients = gradients_of(
            policy, activation, saved[:count], {**results, **ready}, gradient, needed[:count], needed_of_ready
        )
        return None, None, None, *gradients


_apply = plain_apply(_Contraction)
