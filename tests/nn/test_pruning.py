"""A layer with some of its experts is that layer without the others."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import Tempered  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP, entmax15  # noqa: E402

FORMATS = {
    **mt.formats(),
    "sum": mt.sum_of(mt.shared("kron"), "cp", mt.sliced("lowrank", 1, 3)),  # slices the first level
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("norm", "gated"), [("batch", False), ("none", True)])
def test_keep_experts_is_exact(format: str, norm: Any, gated: bool) -> None:
    rank = (2,) * len(FORMATS[format].bonds(2))
    block = MuMoEMLP(
        6, 9, 4, (3, 5), FORMATS[format], rank, gated=gated, gate_norm=norm, dtype=torch.float64
    ).train()
    nn.init.normal_(block.gate.weight)
    x = torch.randn(9, 6, dtype=torch.float64)
    block(x)
    block.eval()
    smaller = block.keep_experts(1, [4, 0, 2])
    assert smaller.config["experts"] == (3, 3)

    def masked(module: Any, inputs: Any, output: Any) -> list[Any]:
        logits = inputs[0] @ module.weight.T
        logits = module.norm(logits) if module.norm else logits
        kept = torch.full((5,), -torch.inf, dtype=x.dtype)
        kept[[0, 2, 4]] = 0
        first, second = logits.split((3, 5), -1)
        return [entmax15(first), entmax15(second + kept)]

    block.gate.register_forward_hook(masked)
    torch.testing.assert_close(smaller(x), block(x))
    with pytest.raises(ValueError, match="indices of level 1 must be"):
        block.keep_experts(1, [0, 0])
    with pytest.raises(ValueError, match="indices of level 1 must be"):
        block.keep_experts(1, [5])
    with pytest.raises(ValueError, match="level must be an integer"):
        block.keep_experts(2, [0])


@pytest.mark.parametrize("level", [0, 1])
def test_keep_experts_loses_nothing_and_shares_nothing(level: int) -> None:
    block = MuMoEMLP(
        5, 7, 4, (3, 5), "tr", (2, 2, 2, 3), activation=nn.PReLU(7), gate=Tempered(), input_norm=True,
        dropout=0.1, hidden_dropout=0.2,
    ).bfloat16()  # fmt: skip
    block.gate.float(), block.input_norm.half()
    block.gate.norm.momentum, block.gate.norm.eps, block.gate.norm.copies = None, 1e-3, 2
    block.gate.norm.running_mean.normal_()
    block.gate.norm.num_batches_tracked.fill_(3)
    block.input_norm.eps, block.dropout.p, block.hidden_dropout.p = 1e-2, 0.3, 0.4
    block.fit_errors = (0.5, 0.25)
    means = [torch.rand(3), torch.rand(5)]
    edit_bias(block.up, "edit", means, 1, 2.0)
    block.train()
    block.gate.eval(), block.hidden_dropout.eval()
    for frozen in (block.gate.weight, block.up.factors[1], block.activation.weight):
        frozen.requires_grad_(False)
    before, chance = {k: v.clone() for k, v in block.state_dict().items()}, torch.get_rng_state()
    kept = [[2, 0], [4, 1]][level]
    smaller = block.keep_experts(level, kept)
    assert torch.equal(torch.get_rng_state(), chance) and smaller.fit_errors == (0.5, 0.25)

    def described(layer: Any) -> Any:
        attributes = ("training", "eps", "momentum", "copies", "p", "normalized_shape", "edits")
        modules = {
            name: (type(module), [repr(getattr(module, a, None)) for a in attributes])
            for name, module in layer.named_modules()
        }
        values = {name: (v.dtype, v.device, v.requires_grad) for name, v in layer.named_parameters()}
        return modules, values, {name: v.dtype for name, v in layer.named_buffers()}

    assert described(smaller) == described(block)
    for name, value in smaller.state_dict().items():
        if value.shape == before[name].shape:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(smaller.up.edits["edit"].get_buffer(f"mean_{level}"), means[level][kept].bfloat16())
    memory = [{v.data_ptr() for v in layer.state_dict().values()} for layer in (block, smaller)]
    assert not memory[0] & memory[1]
    assert not {id(module) for module in block.modules()} & {id(module) for module in smaller.modules()}
    with torch.no_grad():
        for value in smaller.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_gate_with_parameters_of_any_shape_keeps_them_for_fewer_experts() -> None:
    class Scaled(Tempered):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, logits: Any) -> Any:
            return super().forward(logits * self.scales.prod())

    layer = MuMoEMLP(5, 6, 4, (3, 2), rank=2, gate=Scaled())
    smaller = layer.keep_experts(0, [2])
    assert torch.equal(smaller.gate.gate.scales, layer.gate.gate.scales)


@pytest.mark.parametrize(
    "format",
    [
        mt.sum_of("cp", mt.sliced("cp", 0, 2)),
        {"name": "cp", "splits": {"n1": 2}},
        mt.sum_of("cp", {"name": "cp", "splits": {"n1": 2}}),
    ],
    ids=str,
)
def test_levels_that_a_term_slices_or_splits_are_refused(format: Any) -> None:
    layer = MuMoE(6, 9, (4, 3), format, (2,) * len(mt.get_format(format).bonds(2)))
    with pytest.raises(
        ValueError, match=r"no term may slice or split a level whose experts are removed; term .* level 0"
    ):
        layer.keep_experts(0, [1, 2])
    assert layer.keep_experts(1, [1, 2]).config["experts"] == (4, 2)


def test_frozen_terms_stay_frozen() -> None:
    layer = MuMoE(6, 9, (4, 3), "shared-expert", 2)
    layer.experts.freeze("shared")
    smaller = layer.keep_experts(0, [3])
    assert [factor.requires_grad for factor in smaller.experts.factors] == [False, True, True, True, True]
