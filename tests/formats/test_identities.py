"""What each structured format is, built with plain NumPy or by TensorLy."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.testing import levels, sizes

RANDOM = st.integers(0, 2**32 - 1).map(np.random.default_rng)
PARTS = st.lists(st.tuples(sizes(3), sizes(3)), min_size=2, max_size=4)


def drawn(generator: np.random.Generator, format: mt.Format, shape: tuple[int, ...], rank: Any) -> list[Any]:
    return [generator.standard_normal(s) for s in format.shapes(shape, rank)]


def split(name: str, parts: list[tuple[int, int]]) -> tuple[mt.Format, tuple[int, int]]:
    """A format with parts of the input and the output, and the sizes of these."""
    inputs, outputs = zip(*parts, strict=True)
    return mt.formats()[name].with_splits({"i": inputs, "o": outputs}), (prod(inputs), prod(outputs))


@given(PARTS, sizes(3), st.lists(sizes(3), max_size=2), RANDOM)
def test_kron_is_a_sum_of_kronecker_products(parts, terms, experts, generator) -> None:
    format, ends = split("kron", parts)
    factors = drawn(generator, format, (*experts, *ends), (terms,))
    dense = mt.to_dense(mt.FactorizedTensor(format, factors))
    for expert in np.ndindex(*experts):
        expected = 0
        for k in range(terms):
            product = np.ones((1, 1))
            for matrix in factors[len(experts) :]:
                product = np.kron(product, matrix[..., k])
            scale = prod(factor[n, k] for factor, n in zip(factors, expert, strict=False))
            expected = expected + scale * product
        np.testing.assert_allclose(dense[expert], expected, atol=1e-12)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, rows, columns = blocks.shape
    whole = np.zeros((count * rows, count * columns))
    for k, block in enumerate(blocks):
        whole[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = block
    return whole


@given(sizes(), sizes(), sizes(), sizes(), RANDOM)
def test_monarch_is_two_block_diagonal_matrices_and_a_permutation(i1, i2, o1, o2, generator) -> None:
    format, _ = split("monarch", [(i1, o1), (i2, o2)])
    first, second = drawn(generator, format, (i1 * i2, o1 * o2), ())
    left = block_diagonal(first)  # a block for each i1, of shape (i2, o1)
    right = block_diagonal(second)  # a block for each o1, of shape (i1, o2)
    permutation = np.zeros((i1 * o1, o1 * i1))
    for i in range(i1):
        for o in range(o1):
            permutation[i * o1 + o, o * i1 + i] = 1
    expected = left @ permutation @ right
    np.testing.assert_allclose(
        mt.to_dense(mt.FactorizedTensor(format, [first, second])), expected, atol=1e-12
    )


@given(sizes(), sizes(5), sizes(), sizes(5), sizes(), RANDOM)
def test_the_blocks_of_btt_have_its_rank(i1, i2, o1, o2, r, generator) -> None:
    format, shape = split("btt", [(i1, o1), (i2, o2)])
    weight = mt.FactorizedTensor(format, drawn(generator, format, shape, r))
    blocks = mt.to_dense(weight).reshape(i1, i2, o1, o2)
    for i in range(i1):
        for o in range(o1):
            assert np.linalg.matrix_rank(blocks[i, :, o]) == min(r, i2, o2)


@given(PARTS, st.lists(sizes(3), min_size=3, max_size=3), RANDOM)
def test_tt_matrix_is_tensorlys(parts, bonds, generator) -> None:
    tt_matrix = pytest.importorskip("tensorly.tt_matrix")
    format, shape = split("tt-matrix", parts)
    factors = drawn(generator, format, shape, tuple(bonds[: len(parts) - 1]))
    first, *_ = cores = list(factors)
    cores[0] = first[None]
    cores[-1] = cores[-1][..., None]
    expected = tt_matrix.tt_matrix_to_matrix(cores)
    weight = mt.FactorizedTensor(format, factors)
    np.testing.assert_allclose(mt.to_dense(weight), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "cousin"), [("cp-matrix", "cp"), ("tucker-matrix", "tucker"), ("tt-matrix", "tt")]
)
def test_parts_of_size_one_are_the_unsplit_cousin(name: str, cousin: str) -> None:
    @given(levels(2), sizes(), sizes(), st.just(True) if name == "tt-matrix" else st.booleans(), RANDOM)
    def run(num_levels: int, i: int, o: int, is_first: bool, generator: np.random.Generator) -> None:
        inputs, outputs = ((i, 1), (1, o)) if is_first else ((1, i), (o, 1))
        format = mt.formats()[name].with_splits({"i": inputs, "o": outputs})
        shape = (2,) * num_levels + (i, o)
        factors = drawn(generator, format, shape, (2,) * len(format.bonds(num_levels)))
        dense = mt.to_dense(mt.FactorizedTensor(format, factors, shape))
        # The factors of the parts of size one scale the weights of CP or the core.
        ones = [num_levels + k for k in ((1, 2) if is_first else (0, 3))]
        if name == "tt-matrix":
            *experts, first, second = factors
            others = [*experts, first[..., 0, :], second[:, 0, :]]
        else:
            head, *matrices = factors
            for place in reversed(ones):
                (vector,) = matrices.pop(place)
                head = head * vector if name == "cp-matrix" else np.tensordot(head, vector, (place, 0))
            others = [head, *matrices]
        expected = mt.FactorizedTensor(cousin, others)
        np.testing.assert_allclose(dense, mt.to_dense(expected), atol=1e-12)

    run()


@given(st.sampled_from(["cp", "btt", "kron", "tr", "lowrank"]), RANDOM)
def test_a_sum_of_one_term_is_the_term_and_without_experts_so_is_a_shared_one(name, generator) -> None:
    format = mt.formats()[name]
    for composed, experts in ((mt.sum_of(name), (3,)), (mt.sum_of(mt.shared(name)), ())):
        shape = (*experts, 4, 6)
        factors = drawn(generator, format, shape, (2,) * len(format.bonds(len(experts))))
        np.testing.assert_array_equal(
            mt.to_dense(mt.FactorizedTensor(composed, factors, shape)),
            mt.to_dense(mt.FactorizedTensor(format, factors, shape)),
        )


#: Saves factors and matrices of layers of tensorly-torch. It runs in a separate process, as the import sets
#: TensorLy's global backend.
TENSORIZED = """
import sys

import numpy as np
import tltorch
import torch

torch.manual_seed(0)
arrays = {}
for name, rank in (("cp", 7), ("tucker", (2, 3, 4, 5)), ("blocktt", 5)):
    weight = tltorch.FactorizedLinear((2, 3), (4, 5), factorization=name, rank=rank).weight
    for parameter in weight.parameters():
        torch.nn.init.normal_(parameter)
    parts = {"matrix": weight.to_matrix(), "weights": getattr(weight, "weights", None)}
    parts |= {"core": getattr(weight, "core", None), **{str(k): f for k, f in enumerate(weight.factors)}}
    arrays |= {f"{name} {k}": x.detach().numpy() for k, x in parts.items() if isinstance(x, torch.Tensor)}
np.savez(sys.argv[1], **arrays)
"""


@pytest.fixture(scope="module")
def tensorized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    if find_spec("tltorch") is None:
        pytest.skip("tensorly-torch is not installed")
    path = tmp_path_factory.mktemp("tltorch") / "arrays.npz"
    subprocess.run([sys.executable, "-c", TENSORIZED, str(path)], check=True, cwd=Path(path).parent)
    with np.load(path) as arrays:
        return {name: arrays[name].astype(float) for name in arrays}


def of_tensorized(name: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The factors of a layer of tensorly-torch in the order of this library, inputs before outputs."""
    if name == "blocktt":
        first, second = arrays["blocktt 0"][0], arrays["blocktt 1"][..., 0]
        return [first.transpose(1, 0, 2), second.transpose(0, 2, 1)]
    o1, o2, i1, i2 = (arrays[f"{name} {k}"] for k in range(4))
    first = arrays["cp weights"] if name == "cp" else arrays["tucker core"].transpose(2, 3, 0, 1)
    return [first, i1, i2, o1, o2]


@pytest.mark.parametrize(
    ("format", "name"), [("cp-matrix", "cp"), ("tucker-matrix", "tucker"), ("tt-matrix", "blocktt")]
)
def test_tensorized_layers_are_those_of_tensorly_torch(format, name, tensorized) -> None:
    weight = mt.FactorizedTensor(format, of_tensorized(name, tensorized))
    assert weight.shape == (6, 20)
    np.testing.assert_allclose(mt.to_dense(weight), tensorized[f"{name} matrix"].T, atol=1e-5)
