"""A first step with a rate for every factor moves the outputs as far as one of a linear layer."""

from __future__ import annotations

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, parameter_groups  # noqa: E402

RATE = 1e-3
SUMS = {"shared kron and cp": mt.sum_of(mt.shared("kron"), "cp"), "two terms": mt.sum_of("tucker", "monarch")}
FORMATS = {**mt.formats(), **{name: mt.get_format(format) for name, format in SUMS.items()}}


def moved(call, groups, x, gradient) -> float:
    """How far a step of AdamW moves the outputs."""
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
    before = call(x)
    before.backward(gradient)
    optimizer.step()
    with torch.no_grad():
        return torch.linalg.vector_norm(call(x) - before).item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("experts", "sizes"), [((), (256, 64)), ((16,), (64, 256)), ((8, 8), (256, 64))], ids=str
)
def test_a_first_step_moves_outputs_as_far_as_one_of_a_linear_layer(format, experts, sizes) -> None:
    torch.manual_seed(1)
    spec = mt.LayerSpec(
        FORMATS[format], experts=experts, in_features=sizes[0], out_features=sizes[1], bias=True
    )
    if spec.format.bonds(len(experts)):
        spec = spec.fitted(3 * sizes[0] * sizes[1], rounding="nearest")
    layer, linear = Experts.from_spec(spec), nn.Linear(*sizes)
    x, gradient = torch.randn(64, sizes[0]), torch.randn(64, sizes[1])
    coefficients = [torch.full((64, n), 1 / n) for n in experts]
    step = moved(lambda x: layer(x, coefficients), parameter_groups(layer, RATE), x, gradient)
    assert 1 / 1.5 < step / moved(linear, linear.parameters(), x, gradient) < 1.5


def test_each_factor_has_an_equal_share() -> None:
    torch.manual_seed(1)
    layer = Experts(64, 64, 16, "tucker", (4, 16, 16), bias=False)
    x, gradient = torch.randn(64, 64), torch.randn(64, 64)
    coefficients = [torch.full((64, 16), 1 / 16)]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    steps = []
    for group in parameter_groups(layer, RATE):
        layer.load_state_dict(state)
        steps.append(moved(lambda x: layer(x, coefficients), [group], x, gradient))
    assert len(steps) == 4 and max(steps) < 1.5 * min(steps)


def test_all_parameters_are_in_one_group_and_only_factors_are_scaled() -> None:
    block = nn.Sequential(nn.Linear(8, 12), MuMoEMLP(12, 24, 12, 4, "cp"), MuMoEMLP(12, 24, 12, 4, "cp"))
    block[0].weight.requires_grad_(False)
    block[1].up.factor_0.requires_grad_(False)
    groups = parameter_groups(block, RATE)
    listed = [parameter for group in groups for parameter in group["params"]]
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    assert len(listed) == len(wanted) == len({*map(id, listed)} & {*map(id, wanted)})
    factors = {id(f) for module in block.modules() if isinstance(module, Experts) for f in module.factors}
    for group in groups:
        assert group["lr"] == RATE * group["scale"]
        assert all((id(parameter) in factors) is (group["scale"] != 1) for parameter in group["params"])
    # Layers of the same sizes share their groups.
    assert len(groups) == 1 + 2 * 3


def test_a_bias_that_is_a_term_has_the_rate_of_the_layer() -> None:
    layer = MuMoE(64, 64, experts=4, format="btt")
    (group,) = (group for group in parameter_groups(layer, RATE) if group["scale"] == 1)
    assert {id(parameter) for parameter in group["params"]} >= {id(layer.experts.factors[-1])}


def test_rates_follow_from_the_declaration() -> None:
    torch.manual_seed(1)
    first = MuMoE(24, 24, experts=4, format="tr")
    state = torch.random.get_rng_state()
    groups = parameter_groups(first, RATE)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(3)
    assert [group["lr"] for group in groups] == [group["lr"] for group in parameter_groups(first, RATE)]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match=f"learning_rate must be positive, got {rate}"):
        parameter_groups(nn.Linear(2, 2), rate)
