"""Losses, and a layer in the place of a module, against loops that anyone can read."""

from __future__ import annotations

import copy
from math import isnan
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mumoe_tensor.interval import interval  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402
from mumoe_tensor.replace import (  # noqa: E402
    Bounds,
    DocumentLosses,
    Evaluation,
    Replaced,
    bounds,
    evaluate,
    evaluation,
    losses,
    splice,
)

PLACE = "model.layers.1.mlp"


class Scaled(nn.Module):
    """Another module in the place: the outputs of one, times a factor."""

    def __init__(self, module: nn.Module, factor: float):
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.module(x)


class Plain(nn.Module):
    """A language model that returns its logits, and nothing around them."""

    def __init__(self, vocabulary: int = 11, dropout: float = 0.5):
        super().__init__()
        self.embed, self.block = nn.Embedding(vocabulary, 6), nn.Linear(6, 6)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(6, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.dropout(x + self.block(x)))


class Tupled(Plain):
    """One whose block gives a tuple, as attention does."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))[0])


@torch.no_grad()
def slow_losses(model: nn.Module, texts: list[Tensor]) -> list[float]:
    """Token by token."""
    actual = []
    for text in texts:
        output = model(text[None])
        logits = getattr(output, "logits", output)[0].double()
        total = 0.0
        for place in range(len(text) - 1):
            total -= float(logits[place].log_softmax(0)[text[place + 1]])
        actual.append(total)
    return actual


def state_of(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("limit", [1, 14, 2048])
def test_losses_are_those_of_a_loop(
    llama: Any, texts: list[Tensor], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", limit)
    of_texts = losses(llama, texts)
    expected = slow_losses(llama, texts)
    assert of_texts.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert of_texts.tokens.tolist() == [6, 11, 1, 6, 6, 4, 11, 8]
    assert of_texts.mean == pytest.approx(sum(expected) / 53, rel=1e-5)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 99))
def test_losses_do_not_depend_on_the_batches(lengths: list[int], limit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Plain().eval()
    texts = [torch.randint(11, (length,), generator=generator) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BATCH_TOKENS", limit)
        assert losses(model, texts).nats.tolist() == pytest.approx(slow_losses(model, texts), rel=1e-5)


def test_losses_of_plain_logits_in_evaluation_and_any_integers() -> None:
    torch.manual_seed(0)
    model, tokens = Plain(), torch.randint(11, (5, 8))
    expected = slow_losses(model.eval(), list(tokens))
    model.train()
    for each in (tokens, tokens.int(), tokens.to(torch.uint8)):  # (Rows of a tensor are texts as well.)
        assert losses(model, each).nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert model.training and model.dropout.training


def test_no_batch_has_more_tokens_than_the_limit() -> None:
    model, sizes = Plain(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape)))
    losses(
        model,
        [torch.zeros(length, dtype=torch.long) for length in (3000, 1024, 1025, 3, 1025, 3, 1024, 1024)],
    )
    assert sizes == [(2, 3), (2, 1024), (1, 1024), (1, 1025), (1, 1025), (1, 3000)]


def test_losses_of_half_precision_are_computed_in_single(llama: Any, texts: list[Tensor]) -> None:
    llama.bfloat16()
    assert losses(llama, texts).nats.tolist() == pytest.approx(slow_losses(llama, texts), rel=0.02)


def test_a_module_in_its_own_place_changes_nothing(llama: Any, texts: list[Tensor]) -> None:
    before, expected = state_of(llama), losses(llama, texts).nats
    with splice(llama, PLACE, llama.get_submodule(PLACE)):
        assert losses(llama, texts).nats.equal(expected)
    with splice(llama, PLACE, copy.deepcopy(llama.get_submodule(PLACE))):
        assert losses(llama, texts).nats.equal(expected)
    assert state_of(llama) == before


def test_zeros_are_a_block_whose_last_weight_is_zero(llama: Any, texts: list[Tensor]) -> None:
    zeroed = copy.deepcopy(llama)
    nn.init.zeros_(zeroed.get_submodule(PLACE).down_proj.weight)
    expected = slow_losses(zeroed, texts)
    with splice(llama, PLACE, None):
        assert losses(llama, texts).nats.tolist() == pytest.approx(expected, rel=1e-5)
    limits = bounds(llama, PLACE, texts)
    assert limits.zeroed.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert limits.intact.nats.equal(losses(llama, texts).nats)


def test_the_model_is_as_it_was_after_an_error(llama: Any) -> None:
    before = state_of(llama)
    with pytest.raises(RuntimeError, match="stop"), splice(llama, PLACE, nn.Identity()):
        raise RuntimeError("stop")
    # A layer of the wrong size fails within the forward pass.
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(llama, PLACE, nn.Linear(5, 5), [torch.arange(6)])
    assert state_of(llama) == before


class Shifted(nn.Module):
    def __init__(self, sign: int):
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor, shift: float, *, factor: float = 1.0) -> Tensor:
        return self.sign * (factor * x + shift)


def test_a_layer_gets_all_arguments_and_norms_are_those_of_float32() -> None:
    x = torch.tensor([[[2048.0, 64.0], [1.0, 2.0]]], dtype=torch.float16)
    replaced = Replaced(Shifted(1), Shifted(-1))
    assert replaced(x, 3.0, factor=0.5).equal(-(0.5 * x + 3))
    replaced.limit = 2048.5  # float16 would have the norm of the first as 2048
    assert replaced(x, 0.0).tolist() == [[[2048, 64], [-1, -2]]]


def test_two_places_and_one_place_twice_nest(llama: Any, texts: list[Tensor]) -> None:
    before, other = state_of(llama), "model.layers.2.self_attn.o_proj"
    first, second = nn.Identity(), nn.Identity()
    with splice(llama, PLACE, first), splice(llama, other, second):
        assert llama.get_submodule(PLACE) is first and llama.get_submodule(other) is second
        with splice(llama, PLACE, second):
            assert llama.get_submodule(PLACE) is second
        assert llama.get_submodule(PLACE) is first
    assert state_of(llama) == before


def test_a_module_with_several_names_is_replaced_under_all(llama: Any) -> None:
    llama.model.layers[2].mlp = llama.model.layers[0].mlp
    before, other = state_of(llama), nn.Identity()
    with splice(llama, "model.layers.2.mlp", other):
        assert [layer.mlp is other for layer in llama.model.layers] == [True, False, True]
    assert state_of(llama) == before


def test_names_and_modules_that_are_refused(llama: Any, texts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"such as \['model.layers.0.mlp'.*got 'layers.0.mlp'"):
        evaluate(llama, "layers.0.mlp", nn.Identity(), texts)
    with pytest.raises(ValueError, match="name must be the name of a module"), splice(llama, "", None):
        pass
    with pytest.raises(TypeError, match="Module or None"), splice(llama, PLACE, torch.relu):
        pass
    with pytest.raises(TypeError, match="a model must be"), splice(torch.relu, PLACE, None):
        pass
    with pytest.raises(TypeError, match="a layer must be"):
        evaluate(llama, PLACE, None, texts)  # type: ignore[arg-type]
    # Neither is broadcast to the outputs of the block.
    for layer in (nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 16), nn.Flatten(1))):
        with pytest.raises(ValueError, match=r"module's shape, \(1, 2, 16\); got \(1, "):
            evaluate(llama, PLACE, layer, texts)
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        evaluate(Tupled(), "block", nn.Identity(), [torch.arange(5)])


def test_texts_and_models_that_are_refused(llama: Any, texts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        losses(llama, [*texts, torch.zeros(1, dtype=torch.long)])
    with pytest.raises(ValueError, match="texts must not be empty"):
        losses(llama, [])
    with pytest.raises(TypeError, match="integers"):
        losses(llama, [torch.zeros(4)])
    for wrong, kind in (("a text", "str"), (["a text"], "str"), ([[1, 2]], "list")):
        with pytest.raises(TypeError, match=f"must be tensors, .*; got {kind}"):
            losses(llama, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits for every token"):
        losses(llama.model, texts)
    with pytest.raises(ValueError, match="logits for every token"):
        losses(nn.Sequential(nn.Embedding(64, 3), nn.Flatten(0, 1)), texts)


def test_an_evaluation_is_what_a_loop_measures(llama: Any, texts: list[Tensor]) -> None:
    torch.manual_seed(2)
    layer = MuMoE(16, 16, experts=6, rank=3, gate={"name": "relu_topk", "k": 2}, gate_norm="none", bias=False)
    with torch.no_grad():
        layer.gate.bias[4] = -1e6  # an expert that nothing activates
        layer.gate.bias[1] = 0.1
    block = llama.get_submodule(PLACE)
    inputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    intact = slow_losses(llama, texts)
    handle.remove()
    x = torch.cat([each[0] for each in inputs])
    with torch.no_grad():
        y, (output, (a,)) = block(x), layer(x, return_coefficients=True)
    replaced = copy.deepcopy(llama)
    replaced.set_submodule(PLACE, layer)
    expected = slow_losses(replaced, texts)

    actual = evaluate(llama, PLACE, layer, texts)
    assert actual.losses.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert actual.bounds.intact.nats.tolist() == pytest.approx(intact, rel=1e-5)
    assert (actual.tokens, actual.ce_intact) == (53, pytest.approx(sum(intact) / 53, rel=1e-5))
    assert actual.ce == pytest.approx(sum(expected) / 53, rel=1e-5)
    assert actual.rise == pytest.approx(actual.ce - actual.ce_intact, rel=1e-4)
    rises = [(e - i) / (len(t) - 1) for e, i, t in zip(expected, intact, texts, strict=True)]
    assert actual.rises.tolist() == pytest.approx(rises, rel=1e-3, abs=1e-5)
    nmse = (y - output).square().sum() / (y - y.mean(0)).square().sum()
    assert actual.nmse == pytest.approx(float(nmse), rel=1e-5)
    relative = ((y - output).square().sum(1) / y.square().sum(1)).mean()
    assert actual.relative_error == pytest.approx(float(relative), rel=1e-5)
    assert actual.active == pytest.approx(float((a != 0).sum(-1).double().mean()))
    assert 4 in actual.dead and actual.dead == tuple(n for n in range(6) if not a[:, n].any())


def test_outputs_above_the_limit_are_kept(llama: Any, texts: list[Tensor]) -> None:
    """As if the layer returned the block's output for these tokens; no error is counted for them."""
    block = llama.get_submodule(PLACE)
    norms = [x.norm(dim=-1).flatten() for x in outputs_of(llama, texts)]
    limit = float(torch.cat(norms).quantile(0.6))

    class Kept(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.block, self.factor = block, factor

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return torch.stack([v if v.norm() > limit else self.factor * v for v in y.flatten(0, -2)]).view(
                y.shape
            )

    result = evaluate(llama, PLACE, Scaled(block, 0.5), texts, limit=limit)
    with splice(llama, PLACE, Kept(0.5)):
        torch.testing.assert_close(result.losses.nats, losses(llama, texts).nats)
    with splice(llama, PLACE, Kept(0.0)):
        torch.testing.assert_close(result.bounds.zeroed.nats, losses(llama, texts).nats)
    ordinary = torch.cat([x.flatten(0, -2) for x in outputs_of(llama, texts)])
    ordinary = ordinary[ordinary.norm(dim=1) <= limit]
    spread = (ordinary - ordinary.mean(0)).square().sum()
    assert result.nmse == pytest.approx(float(0.25 * ordinary.square().sum() / spread), rel=1e-5)
    assert result.relative_error == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        evaluate(llama, PLACE, block, texts, limit=0.0)


@torch.no_grad()
def outputs_of(model: nn.Module, texts: list[Tensor]) -> list[Tensor]:
    """Those of the block, text by text."""
    actual: list[Tensor] = []
    handle = model.get_submodule(PLACE).register_forward_hook(lambda module, inputs, y: actual.append(y))
    for text in texts:
        model(text[None])
    handle.remove()
    return actual


def test_bounds_are_measured_once(llama: Any, texts: list[Tensor]) -> None:
    block, calls = llama.get_submodule(PLACE), []
    limits = bounds(llama, PLACE, texts)
    llama.register_forward_hook(lambda *_: calls.append(1))
    actual = evaluate(llama, PLACE, Scaled(block, 0.5), texts, bounds=limits)
    assert actual.bounds is limits and len(calls) == len({len(text) for text in texts})
    assert actual.nmse == pytest.approx(0.25 * found_scale(block, llama, texts), rel=1e-4)
    assert (actual.active, actual.dead) == (None, ())
    with pytest.raises(ValueError, match="same texts"):
        evaluate(llama, PLACE, block, texts[1:], bounds=limits)


def found_scale(block: nn.Module, model: nn.Module, texts: list[Tensor]) -> float:
    """Sum of squares of the outputs over that of their distances from the mean."""
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    slow_losses(model, texts)
    handle.remove()
    y = torch.cat(outputs)
    return float(y.square().sum() / (y - y.mean(0)).square().sum())


def test_the_ends_of_the_scale(llama: Any, texts: list[Tensor]) -> None:
    """The module itself loses nothing; zeros lose what the bound says."""
    block = llama.get_submodule(PLACE)
    limits = bounds(llama, PLACE, texts)
    same = evaluate(llama, PLACE, block, texts, bounds=limits)
    assert (same.rise, same.nmse) == (0, 0) and same.interval() == (0, 0)
    none = evaluate(llama, PLACE, Scaled(block, 0.0), texts, bounds=limits)
    assert none.ce == pytest.approx(none.ce_zeroed, rel=1e-6) and none.rise > 0.01


def test_the_variance_is_not_lost_beside_a_large_mean() -> None:
    torch.manual_seed(3)
    model = Plain()
    with torch.no_grad():
        model.block.bias += 1e4
    x = torch.randint(11, (40, 20))
    outputs = model.block.double()(model.embed.double()(x)).detach().flatten(0, 1)
    model.float()
    spread = (outputs - outputs.mean(0)).square().sum()
    wrong = copy.deepcopy(model.block)
    with torch.no_grad():
        wrong.bias[0] += 1
    assert evaluate(model, "block", wrong, x).nmse == pytest.approx(800 / float(spread), rel=1e-2)


def test_a_place_that_is_called_twice_or_never_is_refused() -> None:
    class Twice(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.block(self.block(self.embed(tokens))))

    class Never(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    for kind in (Twice, Never):
        with pytest.raises(ValueError, match=r"must call 'block' once, .* inputs for 12 tokens"):
            evaluate(kind(), "block", nn.Linear(6, 6), torch.zeros(3, 4, dtype=torch.long))


def test_the_interval_is_over_texts(llama: Any, texts: list[Tensor]) -> None:
    block = llama.get_submodule(PLACE)
    equal = torch.stack([text[:5] for text in texts if len(text) >= 5])
    actual = evaluate(llama, PLACE, Scaled(block, 0.2), equal)
    mean, half = interval(actual.rises.tolist())
    assert actual.interval() == (pytest.approx(mean), pytest.approx(half))
    with pytest.raises(ValueError, match="an index for each of 7 texts, got 2"):
        actual.of_documents([0, 1])
    # Of unequal texts: the error of a ratio of means, from its residuals.
    whole = evaluate(llama, PLACE, Scaled(block, 0.2), texts)
    lengths = [len(text) - 1 for text in texts]
    rise, count = whole.ce - whole.ce_intact, len(texts)
    residuals = [
        n * (each - rise) / (sum(lengths) / count)
        for n, each in zip(lengths, whole.rises.tolist(), strict=True)
    ]
    error = (sum(r**2 for r in residuals) / (count - 1) / count) ** 0.5
    t = 2.364624  # of 7 degrees of freedom
    assert whole.interval() == (pytest.approx(rise, rel=1e-6), pytest.approx(t * error, rel=1e-5))
    single = evaluate(llama, PLACE, Scaled(block, 0.2), texts[:1])
    assert single.interval() == (pytest.approx(single.rise), None)


def test_texts_are_joined_to_documents_in_any_order() -> None:
    tokens, documents = torch.tensor([1, 2, 3, 4]), [7, 2, 7, 4]
    each = [
        DocumentLosses(nats, tokens) for nats in torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1], [9, 8, 7, 6]])
    ]
    joined = Evaluation(each[0], Bounds(*each[1:]), 0.0, 0.0, None, ()).of_documents(documents)
    assert [x.nats.tolist() for x in (joined.losses, *joined.bounds)] == [[3, 1, 6], [1, 1, 2], [8, 6, 16]]
    assert joined.losses.tokens.tolist() == [2, 4, 4]
    assert joined.rise == pytest.approx(0.6) and joined.rises.tolist() == [1, 0, 1]


def test_tokens_without_output_have_no_relative_error() -> None:
    torch.manual_seed(0)
    model, texts = Plain(), [torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 3])]

    class OfSome(nn.Module):
        """The block, but nothing for the inputs of token 1."""

        def __init__(self, block: nn.Module, absent: Tensor):
            super().__init__()
            self.block, self.absent = block, absent

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * (x != self.absent).any(-1, keepdim=True)

    model.block = OfSome(model.block, model.embed.weight[1].detach().clone())
    result = evaluate(model, "block", Scaled(model.block, 0.5), texts)
    assert result.relative_error == pytest.approx(0.25)


def test_not_a_number_is_shown() -> None:
    model, tokens = Plain(), torch.zeros(3, 4, dtype=torch.long)
    nn.init.zeros_(model.block.weight)
    nn.init.zeros_(model.block.bias)  # constant outputs have no variance
    assert isnan(evaluate(model, "block", model.block, tokens).nmse)
