"""Top inputs against a plain sort, and what accumulators keep of many inputs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mumoe_tensor.analysis import Labels, TopInputs, Usage, mean_coefficients  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402


def sorted_by_hand(a: Any, k: int, numbers: Any) -> tuple[list[Any], list[Any]]:
    indices, values = [], []
    for column in a.T.tolist():
        best = sorted((-value, place) for place, value in enumerate(column) if value > 0)[:k]
        fill = k - len(best)
        indices.append([numbers[place] for _, place in best] + [-1] * fill)
        values.append([-value for value, _ in best] + [0.0] * fill)
    return indices, values


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 999),
)
def test_top_inputs_are_those_of_a_sort(
    experts: int, k: int, batches: list[int], dtype: Any, numbered: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    # Few values: ties and zeros are many.
    a = torch.randint(-1, 5, (sum(batches), experts)).to(dtype) / 5
    numbers = torch.randperm(1000)[: len(a)] if numbered else torch.arange(len(a))
    top = TopInputs(experts, k)
    for rows, given_numbers in zip(a.split(batches), numbers.split(batches), strict=True):
        top.update(rows, given_numbers if numbered else None)
    indices, values = sorted_by_hand(a, k, numbers.tolist())
    assert top.indices.tolist() == indices and top.coefficients.tolist() == values
    assert top.rows == len(a)


def test_any_leading_shape() -> None:
    a = torch.rand(4, 5, 3)
    one, other = TopInputs(3, 2), TopInputs(3, 2)
    one.update(a, torch.arange(20).reshape(4, 5))
    other.update(a.reshape(20, 3).requires_grad_())
    assert torch.equal(one.indices, other.indices) and not other.coefficients.requires_grad


@pytest.mark.parametrize(("shape", "indices"), [((5, 4), None), ((5, 3), (4,)), ((), None)])
def test_top_inputs_that_do_not_fit(shape: Any, indices: Any) -> None:
    with pytest.raises(ValueError, match="3 experts in the last axis"):
        TopInputs(3, 2).update(torch.ones(shape), None if indices is None else torch.arange(*indices))
    with pytest.raises(ValueError, match="positive, got 0 and 2"):
        TopInputs(0, 2)
    with pytest.raises(ValueError, match="positive, got 3 and 0"):
        TopInputs(3, 0)


def kept(accumulator: Any) -> int:
    """Bytes of the storages that an accumulator holds."""
    tensors = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
    assert tensors and all(isinstance(x, (torch.Tensor, int, float)) for x in vars(accumulator).values())
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("kind", ["usage", "labels", "top"])
def test_accumulators_do_not_grow(kind: str) -> None:
    experts, classes, k = 50, 3, 4
    accumulator: Any = {
        "usage": lambda: Usage(experts),
        "labels": lambda: Labels(experts, classes),
        "top": lambda: TopInputs(experts, k),
    }[kind]()
    before = kept(accumulator)
    for _ in range(20):
        a = torch.rand(100, experts)
        accumulator.update(*((a, torch.randint(classes, (100,))) if kind == "labels" else (a,)))
    # (Indices and coefficients of the k best.)
    assert kept(accumulator) == before <= experts * 8 * max(3, classes + 1, 2 * k)


def test_means_keep_no_inputs() -> None:
    """The inputs of a batch, and its coefficients, are let go before the next batch is asked for."""
    import gc
    import weakref

    layer = MuMoE(4, 3, 8, rank=2)
    alive: list[int] = []

    def batches() -> Any:
        references: list[Any] = []
        for _ in range(6):
            gc.collect()
            alive.append(sum(reference() is not None for reference in references))
            x = torch.randn(10, 4)
            references.append(weakref.ref(x))
            yield x
            del x

    mean_coefficients(layer, layer, batches())
    assert max(alive) <= 1
