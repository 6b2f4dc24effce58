"""Predictions of trainings are what torch counts and allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydantic")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mumoe_tensor.training.scale import Machine, main, predict, published, tables, work  # noqa: E402
from mumoe_tensor.training.settings import RUNS, read_settings  # noqa: E402
from mumoe_tensor.training.trainer import cross_entropy  # noqa: E402

SMALL = {
    "gpt2": "vocabulary=311 context=64 width=96 depth=3 heads=4 hidden=384 dropout=0.0",
    "mixer": "image_size=24 channels=3 patch=4 width=96 depth=3 token_hidden=48 channel_hidden=384 classes=7",
}
FORMATS = ("mlp", "cp", "tr")


def small(kind: str, format: str, *overrides: str) -> Any:
    # (More experts than a product of coefficients that is formed again has.)
    mixer_rank = ("token_rank=[20]", "channel_rank=[60]") if format == "cp" else (
        "token_rank=[3,3,6]", "channel_rank=[3,3,20]")  # fmt: skip
    rank: Sequence[str] = mixer_rank if kind == "mixer" else ()
    sizes = [*SMALL[kind].split(), f"format={format}", "experts=[48]", *(rank if format != "mlp" else ())]
    return read_settings(kind, None, [*(f"model.{size}" for size in sizes), *overrides])


def rows_of(settings: Any, count: int = 4) -> tuple[Any, Any]:
    model = settings.model
    if settings.kind == "gpt2":
        return (torch.randint(model.vocabulary, (count, model.context)),) * 2
    size = (count, model.channels, model.image_size, model.image_size)
    return torch.randn(size), torch.arange(count) % model.classes


# ---- FLOPs ------------------------------------------------------------------------------------------------


def test_flops_of_a_dense_gpt2_are_six_a_parameter_and_attention() -> None:
    settings = read_settings("gpt2", "gpt2-124m-mlp")
    config, found = settings.model, work(settings)
    # Neither positions nor norms are multiplied with.
    vectors = config.context * config.width + (2 * config.depth + 1) * config.width
    products = 6 * (found.parameters - vectors)
    attention = 12 * config.depth * config.width * config.context
    assert found.flops == products + attention
    assert 0.85e9 < found.flops < 0.86e9


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("format", FORMATS)
def test_flops_are_those_that_torch_counts(kind: str, format: str) -> None:
    settings = small(kind, format)
    model, (x, y) = settings.make_model(), rows_of(settings)
    # (Of the fused attention torch counts nothing on a CPU.)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(x)
        with FlopCounterMode(display=False) as backward:
            cross_entropy(logits, y).backward()
    found = work(settings)
    predicted = found.flops * found.units * len(x)
    # Torch counts no elementwise products; the first layer needs no gradient of its input.
    assert predicted / 3 == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert predicted * 2 / 3 == pytest.approx(backward.get_total_flops(), rel=0.03)


# ---- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("format", FORMATS)
def test_state_is_what_torch_allocates(kind: str, format: str) -> None:
    settings = small(kind, format)
    model, (x, y) = settings.make_model(), rows_of(settings, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    cross_entropy(model(x), y).backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    allocated = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    # (With one process there are no buckets.)
    assert predict(settings, 1, known=work(settings)).state == allocated


def kept(model: Any, x: Any, y: Any, precision: str) -> int:
    """Bytes of all storages that autograd keeps, without weights and their copies."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters()
                                                             if p.ndim == 2}  # fmt: skip
    found: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in copies:
            found[storage.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        cross_entropy(logits.float(), y)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


#: (On a CPU a Mixer's norms work in bfloat16 too, on CUDA in float32.)
@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"), [("gpt2", "no", 0.03), ("mixer", "no", 0.03), ("gpt2", "bf16", 0.06)]
)
@pytest.mark.parametrize("format", FORMATS)
def test_activations_are_what_autograd_keeps(
    kind: str, format: str, precision: str, tolerance: float
) -> None:
    torch.manual_seed(0)
    settings = small(kind, format, f"train.precision={precision}")
    x, y = rows_of(settings)
    found = kept(settings.make_model(), x, y, precision) / len(x)
    assert work(settings).activations == pytest.approx(found, rel=tolerance)


# ---- predictions ------------------------------------------------------------------------------------------


def test_published_parameters() -> None:
    totals = {
        "mixer-s16-mlp": 18_528_264, "mixer-s16-cp": 18_630_616, "mixer-s16-tr": 18_290_792,
        "gpt2-124m-mlp": 124_373_760, "gpt2-124m-cp-64": 124_487_976, "gpt2-124m-cp-256": 124_789_536,
        "gpt2-124m-tr-64": 124_790_880, "gpt2-124m-tr-256": 125_159_136,
    }  # fmt: skip
    assert {name for kind in RUNS for name in published(kind)} == set(totals)
    for kind in RUNS:
        (heading, *lines), predictions = tables(kind, published(kind), [4])
        assert lines[0][0].endswith("mlp") and heading[1] == "parameters"
        assert {line[0]: int(line[1].replace(",", "")) for line in lines} == {
            name: total for name, total in totals.items() if name.startswith(kind)
        }
        assert [line[:2] for line in predictions[1:]] == [("4", line[0]) for line in lines]


def test_time_and_memory_over_accelerators() -> None:
    settings = read_settings("gpt2", "gpt2-124m-mlp")
    known, machine = work(settings), Machine(peak=1e15, utilisation=0.5, memory=40e9)
    one, four = (predict(settings, n, machine=machine, known=known) for n in (1, 4))
    assert one.units_per_second == pytest.approx(5e14 / known.flops)
    assert four.units_per_second == pytest.approx(4 * one.units_per_second)
    # 100,000 steps of 960 windows of 1,024 tokens.
    assert four.days * 86_400 == pytest.approx(100_000 * 983_040 / four.units_per_second)
    assert one.sent == 0 and four.sent > 0
    for found, n in ((one, 1), (four, 4)):
        each = known.activations + known.loss
        assert found.rows * found.accumulation * n == 960
        assert found.memory == found.state + found.rows * each <= 40e9
        # One part less does not fit, or does not divide.
        fewer = [p for p in range(1, found.accumulation) if 960 % (p * n) == 0]
        assert all(found.state + 960 // (p * n) * each > 40e9 for p in fewer)
    sharded = [predict(settings, n, is_sharded=True, known=known).state for n in (4, 64)]
    divided = 16 * known.parameters * (1 / 4 - 1 / 64)
    assert sharded[0] - sharded[1] == pytest.approx(divided, abs=1) and sharded[0] < four.state
    faster = replace(settings, train=replace(settings.train, steps=50_000))
    assert predict(faster, 4, machine=machine, known=known).days == pytest.approx(four.days / 2)


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_state_and_traffic_by_hand(precision: str) -> None:
    settings = small("gpt2", "mlp", f"train.precision={precision}", "train.batch_size=8")
    known = work(settings)
    model = settings.make_model("meta")
    p, block = known.parameters, sum(x.numel() for x in model.blocks[0].parameters())
    assert known.outside == p - 3 * block
    item = {"no": 4, "bf16": 2}[precision]
    copies = {"no": 0, "bf16": 2}[precision]
    one, four = (predict(settings, n, known=known) for n in (1, 4))
    sharded = predict(settings, 4, is_sharded=True, known=known)
    # Weights, gradients, two numbers of AdamW; DDP's buckets; FSDP2's two blocks and what is outside of them,
    # weights and gradients.
    assert (one.state, four.state) == ((16 + copies) * p, (20 + copies) * p)
    assert sharded.state == 4 * p + 2 * item * (known.outside + 2 * block)
    # A ring of four passes three quarters on: gradients twice, or weights twice and gradients once.
    seconds = 8 * 64 / four.units_per_second
    assert four.sent * seconds == pytest.approx(8 * p * 3 / 4)
    assert sharded.sent * seconds == pytest.approx(3 * item * p * 3 / 4)
    # The logits of the model, in float32 where they are not, and their gradient.
    logits = 64 * 311
    assert known.loss == {"no": 8, "bf16": 10}[precision] * logits


def test_mixed_rows_stay_together() -> None:
    settings = small("mixer", "mlp", "train.batch_size=8", "train.mixup=0.5")
    assert predict(settings, 4).accumulation == 1
    with pytest.raises(ValueError, match="must divide among 8 accelerators"):
        predict(settings, 8)


def test_what_cannot_be_predicted() -> None:
    settings = small("gpt2", "mlp")
    with pytest.raises(ValueError, match=r"fit in 0\.0 GB"):
        predict(settings, 1, machine=Machine(memory=1e6))
    with pytest.raises(ValueError, match="there must be an accelerator"):
        predict(settings, 0)
    for wrong in ({"peak": 0.0}, {"utilisation": 1.1}, {"memory": float("nan")}):
        with pytest.raises(ValueError, match="must be positive"):
            Machine(**wrong)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["gpt2", "gpt2-124m-mlp", "--accelerators", "8", "--peak", "1e15", "--set", "train.steps=10000"]
    assert main(line) == 0
    told = capsys.readouterr().out.splitlines()
    assert "124,373,760" in told[1] and "tokens/s" in told[3] and told[4].split()[:2] == ["8", line[1]]
    # 10,000 steps of 983,040 tokens at 8 × 0.4e15 FLOPs a second.
    hours = 10_000 * 983_040 * work(read_settings("gpt2", "gpt2-124m-mlp")).flops / (8 * 0.4e15) / 3600
    assert float(told[4].split()[-2]) == pytest.approx(hours, abs=0.05)
    assert main(["gpt2", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
