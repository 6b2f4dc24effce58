"""Layers of any class get one number of parameters, or say that they cannot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn.size import num_parameters  # noqa: E402
from mumoe_tensor.replace import MixtureOfDecoders, MixtureOfTransforms, Transcoder  # noqa: E402
from mumoe_tensor.replace.budget import solve  # noqa: E402

#: The class and the arguments of each arm, and the argument that is solved for, for a size.
ARMS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "transcoder": (Transcoder, {"k": 4, "skip": True}, lambda n: {"latents": n}),
    "decoders": (MixtureOfDecoders, {"k": 4}, lambda n: {"experts": n}),
    "random": (MixtureOfDecoders, {"gate": {"name": "random", "k": 4}}, lambda n: {"experts": n}),
    "cp": (MixtureOfDecoders, {"k": 4, "experts": 32, "format": "cp"}, lambda n: {"rank": n}),
    "tr": (MixtureOfDecoders, {"k": 2, "experts": (8, 4), "format": "tr"}, lambda n: {"rank": (4, 4, 4, n)}),
    "no experts": (MixtureOfDecoders, {"experts": ()}, lambda n: {"hidden_features": n}),
    "transforms": (MixtureOfTransforms, {"ranks": [8, 4, 4, 2]},
                   lambda n: {"ranks": [max(1, round(n * share)) for share in (1, 0.5, 0.5, 0.25)]}),
}  # fmt: skip


@pytest.fixture
def block() -> Any:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


@pytest.mark.parametrize("arm", ARMS)
def test_each_class_gets_the_nearest_number_of_parameters(block: Any, arm: str) -> None:
    kind, options, sized = ARMS[arm]
    low, high = (num_parameters(kind.like(block, device="meta", **{**options, **sized(n)})) for n in (20, 21))
    assert low + 1 < high

    def solved(parameters: int, **more: Any) -> int:
        return num_parameters(kind.like(block, parameters=parameters, **more, **options))

    assert solved(low) == low and solved(low + 1) == low and solved(high - 1) == high
    assert solved(low + 1, rounding="up") == high and solved(high - 1, rounding="down") == low


def test_budgets_in_words(block: Any) -> None:
    assert num_parameters(nn.BatchNorm1d(3)) == 6  # without its statistics
    whole = num_parameters(block)
    for words, factor in (("match", 1), ("2x", 2)):
        count = num_parameters(Transcoder.like(block, k=4, parameters=words))
        assert abs(count - factor * whole) <= (16 + 16 + 1) / 2


@given(st.integers(1, 300), st.sampled_from(["up", "down", "nearest"]), st.integers(1, 9))
def test_the_solver_is_a_search_among_all_sizes(budget, rounding, least) -> None:
    counts = {size: 3 * size * size + 5 for size in range(least, 12)}

    def make(size: int) -> nn.Module:
        layer = nn.Linear(3 * size, size, bias=False)
        layer.more = nn.Parameter(torch.empty(5))
        return layer

    if counts[least] > budget:
        with pytest.raises(ValueError, match="the smallest layer must fit"):
            solve(make, budget, rounding, least)
        return
    best = {
        "up": lambda: min(size for size, count in counts.items() if count >= budget),
        "down": lambda: max(size for size, count in counts.items() if count <= budget),
        "nearest": lambda: min(counts, key=lambda size: abs(counts[size] - budget)),
    }[rounding]()
    assert solve(make, budget, rounding, least) == best


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Transcoder, {"k": 4, "parameters": 100}, "the smallest layer must fit .* with latents=4 it has"),
        (MixtureOfDecoders, {"k": 4, "parameters": 400}, "the smallest layer must fit .* with experts=4 it"),
        (MixtureOfTransforms, {"parameters": 5000}, "ranks must also be given"),
        (MixtureOfDecoders, {"k": 4, "experts": 8, "format": "tucker", "parameters": 99999}, "some size"),
        (MixtureOfDecoders, {"k": 4, "experts": 8, "parameters": 5000}, "experts must be omitted"),
        (MixtureOfDecoders, {"k": 4, "experts": 8, "format": "cp", "rank": 3, "parameters": 5000},
         "experts must be omitted"),
        (MixtureOfDecoders, {"experts": (), "hidden_features": 30, "parameters": 5000}, "must be omitted"),
        (Transcoder, {"k": 4, "latents": 9, "parameters": 5000}, "latents must be omitted"),
        (Transcoder, {"parameters": 5000}, "either k or a gate"),
        (Transcoder, {"k": 4, "parameters": "half"}, "parameters must be match"),
        (Transcoder, {"k": 4, "parameters": 5000, "rounding": "even"}, "rounding must be one of"),
    ],
)  # fmt: skip
def test_what_no_size_fits_is_refused(block: Any, kind: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind.like(block, **options)
