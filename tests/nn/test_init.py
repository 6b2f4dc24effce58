"""Layers start as a linear layer does, and train without harm."""

from __future__ import annotations

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402

SUMS = {
    "padded btt": {"name": "btt", "splits": {"i": [8, 9], "o": [7, 7]}},
    "shared kron and cp": mt.sum_of(mt.shared("kron"), "cp"),
    "three terms": mt.sum_of("tucker", "lowrank", "monarch"),
}
FORMATS = {**mt.formats(), **{name: mt.get_format(format) for name, format in SUMS.items()}}


def rank_of(format: str, levels: int, size: int) -> tuple[int, ...]:
    """A rank of this size; of formats of many bonds, which share a core, of a smaller one."""
    bonds = len(FORMATS[format].bonds(levels))
    return (min(size, 4) if bonds > 5 else size,) * bonds


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("experts", "size"), [((), 1), ((), 24), ((8,), 4), ((4, 4), 1), ((4, 4), 24), ((2, 3, 4), 4)], ids=str
)
def test_outputs_start_with_the_variance_of_a_linear_layer(format, experts, size) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    layer = MuMoE(64, 48, experts, FORMATS[format], rank_of(format, len(experts), size))
    with torch.no_grad():
        ratio = layer(x).square().mean() / nn.Linear(64, 48)(x).square().mean()
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("format", FORMATS)
def test_two_hundred_steps_never_give_nan(format: str) -> None:
    """The loss falls at a usual rate, and at a large one it stays finite."""
    torch.manual_seed(0)
    block = MuMoEMLP(16, 24, 16, (4, 2), FORMATS[format], rank_of(format, 2, 3))
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, fused=True)
    x = torch.randn(32, 16)
    target = torch.roll(x, 1, -1)
    losses = []
    for step in range(200):
        if step == 100:
            optimizer.param_groups[0]["lr"] = 1e-1
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p).all() for p in block.parameters())
    assert min(losses[:100]) < 0.9 * losses[0]


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    layer = MuMoE(300, 200, (40, 3), "tr", (3, 3, 4, 50), init="published")
    first, second, i, o = layer.weight.arrays
    diagonal = torch.eye(3)[:, None, :].expand(3, 40, 3) > 0
    assert (first[~diagonal] == 0).all()
    assert 0.7 < first[diagonal].mean() < 1.3 and 0.7 < first[diagonal].std() < 1.3
    assert torch.equal(second, torch.eye(3, 4)[:, None, :].expand(3, 3, 4))
    assert 0.98 * 300**-0.5 < i.abs().max() <= 300**-0.5
    assert 0.98 * 150**-0.5 < o.abs().max() <= 150**-0.5
    cp = MuMoE(300, 200, (40, 3), "cp", 60, init="published").weight.arrays
    assert 0.9 < cp[0].mean() < 1.1 and 0.9 < cp[0].std() < 1.1 and (cp[1] == 1).all()
    assert 0.98 * 60**-0.5 < cp[3].abs().max() <= 60**-0.5
    few = MuMoE(2, 200, 4, "cp", 60, init="published").weight.arrays[1]  # three rows with that of the bias
    assert 0.9 * 2**-0.5 < few.abs().max() <= 2**-0.5
    core = MuMoE(300, 200, (40,), "tucker", (3, 20, 30), init="published").weight.arrays[0]
    assert (torch.linalg.vector_norm(core) - 1).abs() < 1e-5


def test_factors_of_split_modes_start_by_what_they_sum_over() -> None:
    torch.manual_seed(0)
    spans = {
        # btt sums over i2, then over i1 and the rank; kron over i1, then over i2 and the rank.
        "btt": (48, 12 * 5), "kron": (12, 48 * 5), "tt-matrix": (12, 48 * 5), "monarch": (48, 12),
    }  # fmt: skip
    for name, of_factors in spans.items():
        format = mt.get_format({"name": name, "splits": {"i": [12, 48], "o": [20, 24]}})
        layer = MuMoE(576, 480, (), format, () if name == "monarch" else 5, init="published")
        *factors, bias = layer.weight.arrays
        for factor, span in zip(factors, of_factors, strict=True):
            assert 0.98 * span**-0.5 < factor.abs().max() <= span**-0.5
        assert 0.95 * 576**-0.5 < bias.abs().max() <= 576**-0.5


@pytest.mark.parametrize("format", ["monarch", "hadamard", "btt"])
def test_experts_start_near_one_matrix(format: str) -> None:
    # Factors of experts scale the matrix of all: without what is drawn for the first level it is one.
    torch.manual_seed(0)
    layer = MuMoE(36, 24, (3, 4), format, rank_of(format, 2, 4), dtype=torch.float64)
    (first, _), (other, _) = layer.expert((1, 0)), layer.expert((1, 3))
    torch.testing.assert_close(first, other, rtol=0, atol=0)
    assert (first != layer.expert((2, 0))[0]).any()


def test_each_term_of_a_sum_starts_with_an_equal_share_of_the_variance() -> None:
    torch.manual_seed(0)
    layer = MuMoE(64, 48, 6, mt.sum_of(mt.shared("dense"), "cp", "kron"), (5, 5))
    uniform = [torch.full((1, 6), 1 / 6)]
    *terms, bias = layer.experts.terms
    assert bias.shape == (6, 1, 48)
    for term in terms:
        z = torch.eye(64)
        outputs = mt.multilinear_moe(term, z, [a.expand(64, 6) for a in uniform])
        torch.testing.assert_close(outputs.square().mean(), torch.tensor(1 / (3 * 3 * 64)))
