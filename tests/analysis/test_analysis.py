"""Figures about experts, against their definitions written out."""

from __future__ import annotations

from math import log
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import (  # noqa: E402
    Labels,
    Usage,
    ablate,
    ablation_effects,
    polysemanticity,
    random_gate,
    watch_coefficients,
)
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402

N, C = 6, 4


def head(experts: Any = N, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"gate_norm": "layer", "dtype": torch.float64, "rank": 5, **options}
    layer = MuMoE(8, C, experts, **options)
    nn.init.normal_(layer.gate.weight)
    for factor in layer.experts.factors:
        nn.init.normal_(factor)
    return layer


def model_of(layer: Any) -> Any:
    return nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), nn.Tanh(), layer)


def hooks(module: Any) -> int:
    return sum(len(m._forward_hooks) for m in module.modules())


def batches(count: int = 3, rows: int = 40) -> Any:
    torch.manual_seed(1)
    x = torch.randn(count, rows, 8, dtype=torch.float64)
    return [(inputs, torch.randint(C, (rows,))) for inputs in x]


# ---- coefficients ----------------------------------------------------------------------------------------


def test_coefficients_are_those_of_the_layer() -> None:
    model = nn.ModuleDict(
        {"a": head((3, 2)), "b": MuMoEMLP(C, 5, 8, N, gate_norm="none", dtype=torch.float64)}
    )
    seen: dict[str, Any] = {}
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    with watch_coefficients(model, lambda name, a: seen.setdefault(name, a)):
        y, first = model["a"](x, return_coefficients=True)
        _, second = model["b"](y, return_coefficients=True)
    assert list(seen) == ["a.gate", "b.gate"]
    for actual, expected in ((seen["a.gate"], first), (seen["b.gate"], second)):
        assert [a.shape for a in actual] == [(14, a.shape[-1]) for a in expected]
        assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(actual, expected, strict=True))
        assert not any(a.requires_grad for a in actual)


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    layer, x = head(), torch.randn(2, 8, dtype=torch.float64)

    def fail(*_: Any) -> None:
        raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"), watch_coefficients(layer, fail):
        layer(x)
    with pytest.raises(RuntimeError, match="inside"), ablate(layer, [1]), random_gate(layer, 0):
        assert hooks(layer) == 2
        raise RuntimeError("inside")
    assert hooks(layer) == 0


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="ExpertGate"), watch_coefficients(nn.Linear(2, 2), print):
        pass
    two = nn.Sequential(head(), head())
    with pytest.raises(ValueError, match="one gate"), ablate(two, [0]):
        pass


# ---- usage -----------------------------------------------------------------------------------------------


def test_usage_by_its_definition() -> None:
    a = torch.tensor([[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0], [0, 1, 0, 0], [0.2, 0.7, 0.1, 0]])
    whole, parts = Usage(4), Usage(4)
    whole.update(a)
    parts.update(a[:1])
    parts.update(a[1:].reshape(3, 1, 4))
    actual = whole.statistics()
    mean = a.double().mean(0)
    assert actual.rows == 4
    torch.testing.assert_close(actual.load, torch.tensor([0.5, 0.75, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(actual.mean, mean)
    assert actual.dead == 1
    expected = -sum(float(p) * log(float(p)) for p in mean if p) / log(4)
    assert actual.entropy == pytest.approx(expected)
    assert actual.largest_share == pytest.approx(float(mean.max()))
    assert actual.active == pytest.approx((2 + 2 + 1 + 3) / 16)
    other = parts.statistics()
    torch.testing.assert_close(other.load, actual.load)
    assert (other.entropy, other.active) == (pytest.approx(actual.entropy), pytest.approx(actual.active))


def test_usage_is_bounded() -> None:
    even, single = Usage(8), Usage(8)
    even.update(torch.full((5, 8), 1 / 8))
    single.update(torch.eye(8)[:1].expand(5, 8))
    assert even.statistics().entropy == pytest.approx(1) and single.statistics().entropy == 0
    assert single.statistics().dead == 7 and single.statistics().largest_share == 1
    with pytest.raises(ValueError, match="need at least one input"):
        Usage(3).statistics()
    with pytest.raises(ValueError, match="3 experts"):
        Usage(3).update(torch.ones(2, 4))


def test_counts_beyond_what_float32_can_count() -> None:
    usage = Usage(2)
    usage.loads += 2.0**25
    usage.update(torch.tensor([[1.0, 0.0]]))
    assert usage.loads[0] == 2.0**25 + 1


def test_counts_beyond_what_float16_can_count() -> None:
    a = torch.zeros(2501, 2, dtype=torch.float16)
    a[:, 0] = 1
    usage, by_label = Usage(2), Labels(2, 1)
    usage.update(a)
    by_label.update(a, torch.zeros(len(a), dtype=torch.uint8))
    actual = usage.statistics()
    assert actual.load.tolist() == actual.mean.tolist() == [1, 0] and actual.dead == 1
    assert by_label.statistics().counts.tolist() == [[2501], [0]]


# ---- labels ----------------------------------------------------------------------------------------------


def test_labels_by_their_definition() -> None:
    a = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.2, 0.8, 0]])
    labels = torch.tensor([0, 1, 1, 0])
    counted = Labels(3, 2)
    counted.update(a[:2], labels[:2])
    counted.update(a[2:], labels[2:])
    actual = counted.statistics()
    assert actual.counts.tolist() == [[2, 1], [1, 2], [0, 0]]
    entropy = -(2 / 3 * log(2 / 3) + 1 / 3 * log(1 / 3))
    assert actual.entropy == pytest.approx(entropy)
    assert actual.ratio == pytest.approx(entropy / log(2))
    assert actual.clarity == pytest.approx(2 / 3)
    strict = Labels(3, 2, threshold=0.5)
    strict.update(a, labels)
    assert strict.statistics().counts.tolist() == [[1, 1], [1, 2], [0, 0]]
    assert strict.statistics().clarity == pytest.approx((2 * 1 / 2 + 3 * 2 / 3) / 5)


def test_experts_of_one_label_each_are_clear() -> None:
    counted = Labels(C, C)
    labels = torch.arange(C).repeat(3)
    counted.update(torch.eye(C)[labels], labels)
    actual = counted.statistics()
    assert (actual.entropy, actual.ratio, actual.clarity) == (0, 0, 1)


@pytest.mark.parametrize(
    ("a", "labels", "message"),
    [
        (torch.ones(2, 3), torch.tensor([0]), "a label for every row"),
        (torch.ones(2, 4), torch.tensor([0, 1]), "3 coefficients"),
        (torch.ones(2, 3), torch.tensor([0, 2]), "at least 0 and less than 2"),
    ],
)
def test_labels_that_do_not_fit(a: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels(3, 2).update(a, labels)


# ---- interventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["cp", "tr", "dense"])
@pytest.mark.parametrize("level", [0, 1])
def test_an_ablated_layer_is_one_with_slices_of_zeros(format: str, level: int) -> None:
    import mumoe_tensor as mt

    rank = {"cp": 5, "tr": (2, 2, 3, 4), "dense": None}[format]
    layer, x = head((4, 3), format=format, rank=rank), torch.randn(9, 8, dtype=torch.float64)
    intact, coefficients = layer(x, return_coefficients=True)
    dense = mt.to_dense(layer.weight).clone()
    dense.index_fill_(level, torch.tensor([0, 2]), 0)
    expected = mt.multilinear_moe(dense, x, coefficients, bias=True)
    with ablate(layer, [2, 0], level=level):
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), intact)
    assert not torch.allclose(intact, expected)


@pytest.mark.parametrize(("experts", "level"), [([N], 0), ([-1], 0), ([0], 1)])
def test_experts_that_are_not_there(experts: Any, level: int) -> None:
    with pytest.raises(ValueError, match="level"), ablate(head(), experts, level):
        pass


def test_a_random_gate_is_as_sparse_and_knows_nothing() -> None:
    layer, x = head(64), torch.randn(500, 8, dtype=torch.float64)
    _, (real,) = layer(x, return_coefficients=True)
    drawn = []
    for seed in (3, 3, 4):
        with random_gate(layer, seed):
            drawn.append(layer(x, return_coefficients=True)[1][0])
    torch.testing.assert_close(drawn[0].sort(-1).values, real.sort(-1).values)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # Every expert is used alike, and the places of one input say nothing of those of another.
    assert drawn[0].mean(0).std() < real.mean(0).std()
    assert not torch.equal(drawn[0].argmax(-1), real.argmax(-1))


# ---- effects ---------------------------------------------------------------------------------------------


def brute_force(model: Any, layer: Any, data: Any, level: int, experts: Any, seed: int | None) -> Any:
    """The definition: every class's accuracy on all inputs, with and without."""
    from contextlib import nullcontext

    def accuracies(removed: Any) -> Any:
        right, total = torch.zeros(C), torch.zeros(C)
        for place, (x, labels) in enumerate(data):
            random = nullcontext() if seed is None else random_gate(layer, seed + place)
            with random, ablate(layer, removed, level):
                right += torch.bincount(labels[model(x).argmax(-1) == labels], minlength=C)
            total += torch.bincount(labels, minlength=C)
        return right / total

    return torch.stack([accuracies([k]) - accuracies([]) for k in experts])


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("experts", "level", "removed"), [(N, 0, None), ((4, 3), 1, [2, 0])])
def test_effects_are_those_of_ablating_everywhere(experts: Any, level: int, removed: Any, seed: Any) -> None:
    layer = head(experts)
    model, data = model_of(layer).train(), batches()
    actual = ablation_effects(model, layer, data, C, level=level, experts=removed, random_seed=seed)
    count = layer.gate.num_experts[level]
    expected = brute_force(model, layer, data, level, removed or range(count), seed)
    torch.testing.assert_close(actual, expected)
    assert expected.abs().sum() > 0 and model.training and hooks(model) == 0


def test_effects_with_several_rows_an_input() -> None:
    layer = head()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return self.layer(x.reshape(-1, 2, 8)).mean(1)

    model = Pooled()
    data = [(x.reshape(20, 16), labels[:20]) for x, labels in batches()]
    actual = ablation_effects(model, layer, data, C)
    torch.testing.assert_close(actual, brute_force(model, layer, data, 0, range(N), None))


def test_effects_refuse_a_gate_that_sees_other_rows() -> None:
    layer = head()
    model = nn.Sequential(nn.Flatten(0, 1), layer)
    with pytest.raises(ValueError, match="called once"):
        ablation_effects(model, layer, [(torch.randn(3, 2, 8).double(), torch.tensor([0, 1, 2]))], C)
    with pytest.raises(ValueError, match="experts of level 0 must be different integers"):
        ablation_effects(layer, layer, batches(), C, experts=[N])


def test_polysemanticity_by_its_definition() -> None:
    effects = torch.tensor([[-0.3, 0.0, 0.0], [-0.1, 0.1, -0.1], [0.0, 0.0, 0.0], [torch.nan, 0.2, 0.0]])
    actual = polysemanticity(effects)
    third = 1 / 3
    expected = ((1 - third) ** 2 + 2 * third**2) ** 0.5
    assert actual[0] == 0 and actual[1] == pytest.approx(expected) and actual[2].isnan() and actual[3] == 0
    assert float(actual.nanmean()) == pytest.approx(expected / 3)


def test_a_compiled_model_sees_what_is_done_to_it() -> None:
    torch._dynamo.reset()
    layer, x = head(), torch.randn(9, 8, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager")
    intact = compiled(x)
    seen: list[Any] = []
    with ablate(layer, [0, 1]), watch_coefficients(layer, lambda name, a: seen.append(name)):
        assert not torch.allclose(compiled(x), intact)
        torch.testing.assert_close(compiled(x), layer(x))
    assert seen
    torch.testing.assert_close(compiled(x), intact)


def test_gates_of_a_model_draw_apart() -> None:
    first = head(64)
    model, x = nn.ModuleList([first, head(64)]), torch.randn(20, 8, dtype=torch.float64)
    model[1].load_state_dict(first.state_dict())
    with random_gate(model, 0):
        drawn = [layer(x, return_coefficients=True)[1][0] for layer in model]
    assert not torch.equal(*drawn)


def test_effects_leave_the_modes_of_modules_and_refuse_labels() -> None:
    layer = head()
    model = model_of(layer).train()
    model[1].eval()
    ablation_effects(model, layer, batches(1), C)
    assert [m.training for m in model] == [True, False, True]
    with pytest.raises(ValueError, match="labels must be at least 0 and less than 3"):
        ablation_effects(model, layer, batches(1), C - 1)


def test_statistics_do_not_change_afterwards() -> None:
    counted = Labels(2, 2)
    counted.update(torch.zeros(1, 2), torch.tensor([0]))
    actual = counted.statistics()
    counted.update(torch.ones(1, 2), torch.tensor([0]))
    assert not actual.counts.any()
