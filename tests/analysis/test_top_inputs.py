"""Top inputs against a plain sort, and what accumulators keep of many inputs."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mumoe_tensor.analysis import Labels, TopInputs, Usage, mean_coefficients  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402

top_inputs, usage, specialization = (
    import_module(f"mumoe_tensor.analysis.{name}") for name in ("top_inputs", "usage", "specialization")
)


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
    st.integers(1, 9),
    st.integers(0, 999),
)
def test_top_inputs_are_those_of_a_sort(
    experts: int, k: int, batches: list[int], dtype: Any, numbered: bool, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    # Few values: ties and zeros are many.
    a = torch.randint(-1, 5, (sum(batches), experts)).to(dtype) / 5
    parts = torch.rand(len(a), 3, experts)
    numbers = torch.randperm(1000)[: len(a)] if numbered else torch.arange(len(a))
    top = TopInputs(experts, k)
    with patch.object(top_inputs, "CHUNK", chunk):
        for rows, of_rows, given_numbers in zip(
            a.split(batches), parts.split(batches), numbers.split(batches), strict=True
        ):
            top.update(rows, given_numbers if numbered else None, of_rows)
    indices, values = sorted_by_hand(a, k, numbers.tolist())
    assert top.indices.tolist() == indices and top.coefficients.tolist() == values
    assert top.rows == len(a)
    places = {number: place for place, number in enumerate(numbers.tolist())}
    for n, of_expert in enumerate(indices):
        for place, index in enumerate(of_expert):
            if index >= 0:
                assert torch.equal(top.parts[n, place], parts[places[index], :, n])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_infinite_coefficient_hides_no_other(value: float) -> None:
    top = TopInputs(1, 2)
    top.update(torch.tensor([[0.25], [value], [0.5]]))
    expected = [2, 0] if value != value else [1, 2]
    assert top.indices.tolist() == [expected]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 12), st.integers(0, 999))
def test_counts_do_not_depend_on_chunks(experts: int, chunk: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, labels = torch.randint(0, 4, (rows, experts)) / 4, torch.randint(3, (rows,))
    count, by_label = Usage(experts), Labels(experts, 3)
    with patch.object(usage, "CHUNK", chunk), patch.object(specialization, "CHUNK", chunk):
        count.update(a)
        by_label.update(a, labels)
    assert torch.equal(count.sums, a.double().sum(0)) and count.rows == rows
    assert torch.equal(count.loads, (a >= 0.5).double().sum(0))
    assert torch.equal(count.uses, (a != 0).double().sum(0))
    for c in range(3):
        assert torch.equal(by_label.counts[:, c], (a[labels == c] > 0).sum(0))


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
    with pytest.raises(ValueError, match="parts must have the shape"):
        TopInputs(3, 2).update(torch.ones(5, 3), parts=torch.ones(4, 2, 3))
    top = TopInputs(3, 2)
    top.update(torch.ones(5, 3), parts=torch.ones(5, 2, 3))
    with pytest.raises(ValueError, match=r"parts must have the shape \(1, 2, 3\)"):
        top.update(torch.ones(1, 3), parts=torch.ones(1, 4, 3))
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
