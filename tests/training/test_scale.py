"""FLOPs and memory of trainings are what torch counts and allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydantic")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mumoe_tensor.training.scale import accumulation, main, published, table, work  # noqa: E402
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
    config, actual = settings.model, work(settings)
    # Neither positions nor norms are multiplied with.
    vectors = config.context * config.width + (2 * config.depth + 1) * config.width
    products = 6 * (actual.parameters - vectors)
    attention = 12 * config.depth * config.width * config.context
    assert actual.flops == products + attention
    assert 0.85e9 < actual.flops < 0.86e9


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
    actual = work(settings)
    predicted = actual.flops * actual.units * len(x)
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
    assert work(settings).state == allocated


def kept(model: Any, x: Any, y: Any, precision: str) -> int:
    """Bytes of all storages that autograd keeps, without weights and their copies."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters()
                                                             if p.ndim == 2}  # fmt: skip
    actual: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in copies:
            actual[storage.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        cross_entropy(logits.float(), y)
    return sum(tensor.untyped_storage().nbytes() for tensor in actual.values())


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
    actual = kept(settings.make_model(), x, y, precision) / len(x)
    assert work(settings).activations == pytest.approx(actual, rel=tolerance)


# ---- parts of a step --------------------------------------------------------------------------------------


def test_published_parameters() -> None:
    totals = {
        "mixer-s16-mlp": 18_528_264, "mixer-s16-cp": 18_630_616, "mixer-s16-tr": 18_290_792,
        "gpt2-124m-mlp": 124_373_760, "gpt2-124m-cp-64": 124_487_976, "gpt2-124m-cp-256": 124_789_536,
        "gpt2-124m-tr-64": 124_790_880, "gpt2-124m-tr-256": 125_159_136,
    }  # fmt: skip
    assert {name for kind in RUNS for name in published(kind)} == set(totals)
    for kind in RUNS:
        heading, *lines = table(kind, published(kind), [4])
        assert lines[0][0].endswith("mlp") and heading[1] == "parameters"
        assert {line[0]: int(line[1].replace(",", "")) for line in lines} == {
            name: total for name, total in totals.items() if name.startswith(kind)
        }


def test_accumulation_is_the_least_that_fits() -> None:
    settings = read_settings("gpt2", "gpt2-124m-mlp")
    known = work(settings)
    row = known.activations + known.loss
    for n, buckets in ((1, 0), (4, 4 * known.parameters)):
        parts = accumulation(known, settings.train, n, 40e9)
        assert known.state + buckets + 960 // (parts * n) * row <= 40e9
        # One part less does not fit, or does not divide.
        fewer = [p for p in range(1, parts) if 960 % (p * n) == 0]
        assert all(known.state + buckets + 960 // (p * n) * row > 40e9 for p in fewer)


def test_state_by_hand() -> None:
    for precision, item in (("no", 16), ("bf16", 18)):
        known = work(small("gpt2", "mlp", f"train.precision={precision}"))
        assert known.state == item * known.parameters
        # The logits of the model, in float32 where they are not, and their gradient.
        assert known.loss == {"no": 8, "bf16": 10}[precision] * 64 * 311


def test_mixed_rows_stay_together() -> None:
    settings = small("mixer", "mlp", "train.batch_size=8", "train.mixup=0.5")
    assert accumulation(work(settings), settings.train, 4) == 1
    with pytest.raises(ValueError, match="must divide among 8 accelerators"):
        accumulation(work(settings), settings.train, 8)


def test_what_does_not_fit() -> None:
    settings = small("gpt2", "mlp")
    with pytest.raises(ValueError, match=r"fit in 0\.0 GB"):
        accumulation(work(settings), settings.train, 1, memory=1e6)
    with pytest.raises(ValueError, match="accelerators must be positive"):
        accumulation(work(settings), settings.train, 0)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt2", "gpt2-124m-mlp", "--accelerators", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "124,373,760" in lines[2] and lines[0].endswith("accumulation on 8")
    assert main(["gpt2", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
