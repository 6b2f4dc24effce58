"""Which rows a step is made with, how they are divided and mixed; and other ways to make a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402

from mumoe_tensor.training import Dataset, TrainConfig, cross_entropy, evaluate, train  # noqa: E402
from mumoe_tensor.training.batches import Batches, mixed  # noqa: E402

CONFIG = TrainConfig(epochs=3, batch_size=8, accumulation=2)


def numbered(rows: int = 30) -> Dataset:
    """Every row holds its own number."""
    return Dataset(torch.arange(rows)[:, None].float(), torch.arange(rows) % 3)


def clouds(rows: int = 160, seed: int = 0) -> Dataset:
    """Three classes around three points."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    return Dataset(3 * torch.eye(3)[y] + torch.randn(rows, 3, generator=generator), y)


def linear() -> Any:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_an_epoch_has_each_row_once_and_an_order_of_its_own() -> None:
    batches = Batches(numbered(), CONFIG)
    assert (len(batches), batches.per_epoch) == (9, 3)
    epochs = [torch.cat([batches.rows(3 * epoch + k) for k in range(3)]).tolist() for epoch in range(3)]
    for order in epochs:
        assert len(set(order)) == 24 and set(order) <= set(range(30))
    assert epochs[0] != epochs[1] != epochs[2]
    # A step's rows do not depend on which were asked for before.
    assert Batches(numbered(), CONFIG).rows(7).tolist() == batches.rows(7).tolist()
    assert batches.rows(1).tolist() == epochs[0][8:16]
    other = Batches(numbered(), replace(CONFIG, seed=1))
    assert other.rows(0).tolist() != batches.rows(0).tolist()


def test_shares_of_processes_are_the_parts_of_one() -> None:
    whole = Batches(numbered(), CONFIG)[4]
    shares = [Batches(numbered(), CONFIG, process, 2)[4] for process in range(2)]
    for k, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([share[k][0] for share in shares]))
        assert torch.equal(y, torch.cat([share[k][1] for share in shares]))
    assert [len(x) for x, _ in whole] == [4, 4]


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs at least as many rows, got 7"):
        Batches(numbered(7), CONFIG)
    with pytest.raises(ValueError, match=r"multiple of 6, processes x accumulation, got 8"):
        Batches(numbered(), CONFIG, 0, 3)
    with pytest.raises(ValueError, match=r"multiple of 16, processes x accumulation x 2, got 8"):
        Batches(numbered(), replace(CONFIG, mixup=0.2), 0, 4)

    class Unlabelled:
        def __len__(self) -> int:
            return 8

    with pytest.raises(ValueError, match="mixup needs data with classes"):
        Batches(Unlabelled(), replace(CONFIG, mixup=0.2))  # type: ignore[arg-type]


def test_mixup_by_its_definition() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert mixed(x, 0.75).flatten().tolist() == [0.25, 0.75, 4.0, 8.0]
    config = replace(CONFIG, mixup=0.5)
    shares = set()
    for step in range(9):
        plain, parts = Batches(numbered(), CONFIG)[step], Batches(numbered(), config)[step]
        for (rows, labels), (x, y) in zip(plain, parts, strict=True):
            first, second = rows[::2], rows[1::2]
            share = ((x[::2] - second) / (first - second)).flatten()
            assert torch.allclose(share, share[:1], atol=1e-4) and 0 <= share[0] <= 1
            one_hot = torch.eye(3)[labels]
            assert torch.allclose(y[::2], share[0] * one_hot[::2] + (1 - share[0]) * one_hot[1::2], atol=1e-4)
            assert torch.allclose(y.sum(1), torch.ones(len(y)))
            shares.add(round(float(share[0]), 3))
    assert len(shares) > 9


def test_loss_of_tokens_and_of_shares() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.randint(5, (2, 4))
    expected = -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    shares = torch.rand(2, 4, 5)
    expected = -(shares * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, shares), expected)


def test_accumulated_gradients_are_those_of_the_whole() -> None:
    actual = []
    for parts in (1, 4):
        net = linear()
        train(net, clouds(), clouds(seed=1), TrainConfig(epochs=3, batch_size=16, accumulation=parts))
        actual.append(net.weight.detach())
    torch.testing.assert_close(*actual)


def test_every_step_draws_anew_and_a_seed_draws_the_same() -> None:
    drawn: list[float] = []

    class Draws(nn.Linear):
        def forward(self, x: Any) -> Any:
            if self.training:
                drawn.append(float(torch.rand(())))
            return super().forward(x)

    for seed in (0, 0, 1):
        train(Draws(3, 3), clouds(), clouds(seed=1), TrainConfig(epochs=1, batch_size=16, seed=seed))
    assert drawn[:10] == drawn[10:20] and len(set(drawn)) == 20


def test_workers_load_the_same_rows() -> None:
    actual = []
    for workers in (0, 2):
        net = linear()
        train(net, clouds(), clouds(seed=1), TrainConfig(epochs=2, batch_size=16, mixup=0.3, workers=workers))
        actual.append(net.weight.detach())
    assert torch.equal(*actual)


def test_the_last_parameters_are_kept_on_request() -> None:
    config = TrainConfig(epochs=40, learning_rate=0.3, batch_size=8, keep="last")
    net = linear()
    history = train(net, clouds(16), clouds(seed=1), config)
    assert history[-1].validation_loss > min(e.validation_loss for e in history)
    assert evaluate(net, clouds(seed=1)) == pytest.approx((history[-1].validation_loss, history[-1].accuracy))


def test_precision_is_that_of_products_alone(tmp_path: Path) -> None:
    seen = []

    class Watched(nn.Linear):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            seen.append((self.weight.dtype, y.dtype))
            return y

    torch.manual_seed(0)
    net = Watched(3, 3)
    config = TrainConfig(epochs=4, batch_size=16, learning_rate=0.1, precision="bf16")
    train(net, clouds(), clouds(seed=1), config, folder=tmp_path)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert evaluate(net, clouds(seed=1))[1] > 0.8
    # It is over with the training, and the next one has its own.
    assert net(torch.zeros(1, 3)).dtype == torch.float32
    seen.clear()
    train(net, clouds(), clouds(seed=1), TrainConfig(epochs=1, batch_size=16))
    assert {y for _, y in seen} == {torch.float32}
    # A run in this precision goes on from its checkpoint too.
    again = train(net, clouds(), clouds(seed=1), config, folder=tmp_path, from_step=30)
    assert again[-1].step == 40


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator computes in fp16")
def test_fp16_is_refused_on_cpus() -> None:
    with pytest.raises(ValueError, match="'fp16' needs an accelerator"):
        train(linear(), clouds(), clouds(seed=1), TrainConfig(precision="fp16"))


def test_a_linear_schedule_and_its_end() -> None:
    config = TrainConfig(schedule="linear", warmup=4, learning_rate=1.0, final_learning_rate=0.2)
    factors = [config.factor(step, 12) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.6) and factors[11] == pytest.approx(0.3)
    assert TrainConfig(final_learning_rate=1e-4).factor(10**6, 10**6) == pytest.approx(0.1)


def test_wrong_settings_are_refused() -> None:
    for name, value in {
        "steps": 0, "accumulation": 0, "evaluate_every": -1, "mixup": -0.1, "workers": -1, "seed": -1,
        "schedule": "step", "keep": "first", "precision": "fp8", "betas": (0.9, 1.0), "batch_size": 0,
        "learning_rate": float("nan"), "final_learning_rate": 1.0,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            TrainConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of accumulation"):
        TrainConfig(batch_size=10, accumulation=4)


def test_a_compiled_model_trains_to_the_same() -> None:
    actual = []
    for compiled in (False, True):
        net = linear()
        train(net, clouds(), clouds(seed=1), TrainConfig(epochs=2, batch_size=16, compile=compiled))
        actual.append(net.weight.detach())
    torch.testing.assert_close(*actual, rtol=1e-4, atol=1e-5)
    assert type(net) is nn.Linear
