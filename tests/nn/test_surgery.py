"""Layers made from what exists start as it is, in models of someone else."""

from __future__ import annotations

from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP, replace_linear, replace_mlp  # noqa: E402

FULL = {"cp": 6, "tucker": 6, "tr": 6, "tt": 6, "hadamard": None, "dense": None}


def rank_of(format: str, levels: int, size: int | None) -> Any:
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


class Block(nn.Module):
    def __init__(self, activation: Any):
        super().__init__()
        self.up, self.act = nn.Linear(6, 10), activation
        self.down, self.drop = nn.Linear(10, 6), nn.Dropout(0.25)

    def forward(self, x: Any) -> Any:
        return self.drop(self.down(self.act(self.up(x))))


def model() -> nn.Module:
    blocks = nn.ModuleList(
        nn.ModuleDict({"norm": nn.LayerNorm(6), "mlp": Block(nn.SiLU())}) for _ in range(2)
    )
    return nn.ModuleDict({"layers": blocks, "head": nn.Linear(6, 4)})


def test_replace_mlp_keeps_what_the_model_computes() -> None:
    network = model().double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = [block["mlp"](x) for block in network["layers"]]
    options = dict(experts=4, format="cp", rank=7)
    planned = replace_mlp(network, "layers.*.mlp", dry_run=True, **options)
    assert isinstance(network["layers"][0]["mlp"], Block)
    done = replace_mlp(network, "layers.*.mlp", **options)
    assert [r[:3] for r in planned] == [r[:3] for r in done] and planned[0].errors == ()
    assert [r.name for r in done] == ["layers.0.mlp", "layers.1.mlp"]
    for block, y, replacement in zip(network["layers"], before, done, strict=True):
        made = block["mlp"]
        assert isinstance(made, MuMoEMLP) and not made.training and made.dropout.p == 0.25
        assert replacement.before == 6 * 10 + 10 + 10 * 6 + 6
        assert replacement.after == sum(p.numel() for p in made.parameters())
        assert max(replacement.errors) < 1e-9
        torch.testing.assert_close(made(x), y)
    assert "132 -> " not in str(done[0]) and str(done[0]).startswith("layers.0.mlp: 136 -> ")


def test_replace_linear_by_pattern() -> None:
    network = model().double()
    head = network["head"]
    (done,) = replace_linear(network, "head", experts=3, format="hadamard")
    assert isinstance(network["head"], MuMoE) and done.before == 28
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(network["head"](x), head(x))


def test_what_cannot_be_replaced_is_told() -> None:
    with pytest.raises(ValueError, match=r"'decoder.\*' names none of \['layers.0.mlp'"):
        replace_mlp(model(), "decoder.*", experts=3, rank=2)
    with pytest.raises(ValueError, match="names none of"):
        replace_linear(model(), "layers.*.norm", experts=3, rank=2)
    odd = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3))})
    with pytest.raises(ValueError, match=r"\['ReLU', 'Tanh'\]"):
        replace_mlp(odd, "mlp", experts=3, rank=2)
    replace_mlp(odd, "mlp", experts=3, rank=2, activation="relu")
    with pytest.raises(TypeError, match=r"a linear layer is torch\.nn\.Linear or a Conv1D, got LayerNorm"):
        MuMoE.from_linear(nn.LayerNorm(3), 2)
    with pytest.raises(ValueError, match="both linear layers must have a bias or none"):
        MuMoEMLP.from_linears(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), 2, rank=2)


def test_a_gpt2_of_transformers(transformers: Any) -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=12)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (2, 12))
    before = gpt2(tokens).logits
    done = replace_mlp(
        gpt2, "transformer.h.*.mlp", experts=(4, 2), format="tr", rank=(1, 1, 1, 17), gate_norm="layer"
    )
    assert len(done) == 2 and max(e for r in done for e in r.errors) < 1e-5
    torch.testing.assert_close(gpt2(tokens).logits, before, rtol=1e-4, atol=1e-4)
