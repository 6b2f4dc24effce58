"""Layers made of linear layers start equal to them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402

FULL = {"cp": 6, "tucker": 6, "tr": 6, "tt": 6, "hadamard": None, "dense": None}


def rank_of(format: Any, levels: int, size: int | None) -> Any:
    return () if size is None else (size,) * len(mt.get_format(format).bonds(levels))


@pytest.mark.parametrize("format", FULL)
@pytest.mark.parametrize("experts", [(), (4,), (3, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_expert_starts_as_the_linear_layer(format, experts, bias, norm) -> None:
    linear = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    layer = MuMoE.from_linear(
        linear, experts, format=format, rank=rank_of(format, len(experts), FULL[format]), gate_norm=norm
    )
    assert layer.fit_errors[0] < 1e-9
    x = torch.randn(7, 5, dtype=torch.float64)
    for training in (True, False):
        y, coefficients = layer.train(training)(x, return_coefficients=True)
        torch.testing.assert_close(y, linear(x))
        assert all(float(a.detach().std(0).max()) > 0 for a in coefficients if a.shape[-1] > 1)
    matrix, row = layer.expert(tuple(n - 1 for n in experts))
    torch.testing.assert_close(matrix, linear.weight.T)
    assert (row is None) == (not bias)


#: Ranks at which every matrix of 6 x 8 is exact: of the format without experts, and of each term of a sum.
STRUCTURED: dict[str, tuple[Any, int]] = {
    "kron": ("kron", 6),
    "btt": ("btt", 3),
    "tt-matrix of three parts": ({"name": "tt-matrix", "splits": {"i": [1, 2, 3], "o": [2, 2, 2]}}, 12),
    "tucker-matrix": ("tucker-matrix", 4),
    "lowrank": ("lowrank", 7),
    "padded": ({"name": "btt", "splits": {"i": [2, 4], "o": [3, 3]}}, 3),
    "dense, split": ({"name": "dense", "splits": {"o": 2}}, 1),
    "shared-expert": ("shared-expert", 1),
    "shared kron and cp": (mt.sum_of("cp", mt.shared("kron")), 6),
    "terms of low rank": (mt.sum_of(mt.shared("lowrank"), "lowrank"), 4),
    "slices": (mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("btt", 2, 3)), 7),
}


@pytest.mark.parametrize("case", STRUCTURED)
@pytest.mark.parametrize("experts", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_expert_of_a_structured_format_starts_as_the_linear_layer(case, experts, bias, dtype) -> None:
    if case == "slices" and not experts:
        pytest.skip("without levels there is nothing to slice")
    format, size = STRUCTURED[case]
    rank = rank_of(format, len(experts), size)
    linear = nn.Linear(6, 8, bias=bias, dtype=dtype)
    layer = MuMoE.from_linear(linear, experts, format=format, rank=rank, gate_norm="none")
    close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    assert layer.fit_errors[0] < close["rtol"]
    x = torch.randn(7, 6, dtype=dtype)
    torch.testing.assert_close(layer(x), linear(x), **close)
    for index in itertools.product(*map(range, experts)):
        matrix, row = layer.expert(index)
        torch.testing.assert_close(matrix, linear.weight.T, **close)
        assert (row is None) == (not bias)
        if layer.spec.weight_format.has_bias_term:
            assert torch.equal(row, linear.bias)
    # Experts can part: every term has a gradient, also one that adds nothing yet.
    layer(x).square().sum().backward()
    for part in layer.experts._terms:
        assert any(factor.grad.any() for factor in layer.experts.factors[part.factors])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("format", "size"),
    [
        ("monarch", 1), ("kron", 2), ("btt", 1), ("tt-matrix", 2), ("cp-matrix", 2), ("tucker-matrix", 2),
        (mt.sum_of(mt.shared("kron"), "lowrank"), 2),
        (mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("cp", 1, 3)), 7),
    ],
    ids=str,
)  # fmt: skip
def test_the_error_of_the_worst_expert_of_a_structured_format_is_reported(
    format: Any, size: int, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 8, bias=bias, dtype=torch.float64)
    layer = MuMoE.from_linear(linear, 4, format=format, rank=rank_of(format, 1, size))
    weight = torch.column_stack([linear.weight, *([linear.bias] if bias else [])]).detach()
    experts = [layer.expert(k) for k in range(4)]
    matrices = torch.stack(
        [torch.vstack([x for x in expert if x is not None]) for expert in experts]
    ).detach()
    worst = float(((matrices - weight.T).norm(dim=(1, 2)) / weight.norm()).max())
    assert worst > 0.01 and layer.fit_errors == pytest.approx((worst,))


def test_a_shared_dense_expert_is_the_linear_layer_and_the_others_start_at_zero() -> None:
    linear = nn.Linear(6, 8)
    layer = MuMoE.from_linear(linear, 4, format=mt.sum_of("cp", mt.shared("dense")), rank=3)
    cp, shared = layer.experts.terms
    torch.testing.assert_close(shared.factors[0][:-1], linear.weight.T, rtol=0, atol=0)
    torch.testing.assert_close(shared.factors[0][-1], linear.bias, rtol=0, atol=0)
    *others, last = cp.arrays
    assert not last.any() and all(factor.all() for factor in others)
    assert layer.fit_errors == (0.0,)
    assert not any(p.requires_grad for p in frozen_layer(layer).experts.parameters())


def frozen_layer(layer: Any) -> Any:
    linear = nn.Linear(6, 8).requires_grad_(False)
    return MuMoE.from_linear(linear, 4, format=layer.spec.format, rank=layer.spec.rank)


def test_blocks_of_structured_experts_start_as_their_linear_layers() -> None:
    up, down = nn.Linear(6, 12, dtype=torch.float64), nn.Linear(12, 6, dtype=torch.float64)
    format = {"name": "kron", "splits": {"o": [3, 5], "i": [3, 4]}}  # pads both outputs and the first input
    block = MuMoEMLP.from_linears(up, down, 4, format=format, rank=12, activation="sigmoid")
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), down(up(x).sigmoid()))
    assert max(block.fit_errors) < 1e-10


class Bent(mt.Format):
    """With experts it has other factors of the input and the output than without."""

    name, title, splits = "bent", "Bent", {"i": 2}

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        *experts, i1, i2, o = modes
        if not experts:
            return [mt.Factor(f"{i1} {i2} {o}")]
        return [*(mt.Factor(f"{n} r") for n in experts), mt.Factor(f"r {i1} s"), mt.Factor(f"s {i2} {o}")]


@pytest.mark.parametrize("experts", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("format", [Bent(), mt.get_format("tr").with_splits({"i": 2})], ids=repr)
def test_experts_of_other_factors_than_a_matrix_start_as_one_matrix(
    format: mt.Format, experts: tuple[int, ...]
) -> None:
    linear = nn.Linear(6, 8, dtype=torch.float64)
    layer = MuMoE.from_linear(linear, experts, format=format, rank=(6,) * len(format.bonds(len(experts))))
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    assert max(layer.fit_errors) < 1e-9


@pytest.mark.parametrize("format", ["cp", "tucker", "tr", "tt"])
def test_a_rank_too_small_gives_the_best_fit_and_says_how_far_it_is(format: str) -> None:
    linear = nn.Linear(9, 8, dtype=torch.float64)
    rank = {"cp": 3, "tucker": (2, 3, 3), "tr": (1, 1, 3), "tt": (1, 3)}[format]
    layer = MuMoE.from_linear(linear, 4, format=format, rank=rank)
    whole = torch.cat([linear.weight.T, linear.bias[None]]).detach()
    fitted = torch.cat([layer.expert(1)[0], layer.expert(1)[1][None]]).detach()
    singular = torch.linalg.svdvals(whole)
    best = (singular[3:].square().sum() / singular.square().sum()).sqrt()
    error = torch.linalg.norm(fitted - whole) / torch.linalg.norm(whole)
    torch.testing.assert_close(error, best)
    assert layer.fit_errors == pytest.approx((float(best),))


def test_a_linear_layer_of_zeros_is_fitted_without_error() -> None:
    linear = nn.Linear(5, 6)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    layer = MuMoE.from_linear(linear, 3, format="cp", rank=2)
    assert layer.fit_errors == (0.0,) and (layer(torch.ones(4, 5)) == 0).all()


def test_experts_part_in_training() -> None:
    torch.manual_seed(0)
    layer = MuMoE.from_linear(nn.Linear(6, 6), 4, format="cp", rank=6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 6)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - x.abs()).square().mean().backward()
        optimizer.step()
    first, second = (layer.expert(k)[0] for k in (0, 1))
    assert (first - second).abs().max() > 0.05


class Basis(mt.Format):
    """Experts that mix a few matrices: one factor has both the input and the output."""

    name, title = "basis", "Basis"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        experts = [mt.Factor(f"{mode} r") for mode in modes[:-2]]
        return [mt.Factor("r o i" if experts else "o i"), *experts]


@pytest.mark.parametrize("experts", [(), (4,), (3, 2)], ids=str)
def test_experts_start_as_a_linear_layer_where_one_factor_has_input_and_output(experts) -> None:
    linear = nn.Linear(5, 6)
    layer = MuMoE.from_linear(linear, experts, format=Basis(), rank=3 if experts else None)
    matrix, bias = layer.expert(tuple(n - 1 for n in experts))
    assert layer.fit_errors == (0.0,)
    torch.testing.assert_close(matrix, linear.weight.T)
    torch.testing.assert_close(bias, linear.bias)


def test_other_modules_and_pairs_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"a linear layer must be a torch\.nn\.Linear or a Conv1D, got LayerNorm"
    ):
        MuMoE.from_linear(nn.LayerNorm(3), 2)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'bias'"):
        MuMoE.from_linear(nn.Linear(3, 3), 2, bias=False)
    three = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"as many inputs .*\(4, 5\), \(4, 4\), \(5, 3\)"):
        MuMoEMLP.from_linears(*three[:2], 2, gate_proj=three[2], rank=2)
    with pytest.raises(ValueError, match="either all or no linear layers of a block must have a bias"):
        MuMoEMLP.from_linears(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), 2, rank=2)
    with pytest.raises(ValueError, match=r"the same dtype, got \['torch.float32', 'torch.float64'\]"):
        MuMoEMLP.from_linears(nn.Linear(3, 4), nn.Linear(4, 3, dtype=torch.float64), 2, rank=2)
