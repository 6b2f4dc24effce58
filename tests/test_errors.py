"""Bad calls: each raises ValueError or TypeError, states the rule, then names the offending value."""

# ruff: noqa: E501 - a table
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import mumoe_tensor as mt

Z, A = np.ones((5, 3)), np.full((5, 4), 0.25)
W = mt.FactorizedTensor.random("cp", experts=4, in_features=3, out_features=2, rank=6)
TWO = mt.FactorizedTensor.random("tr", experts=(4, 7), in_features=3, out_features=2, rank=(2, 3, 2, 3))
SIZES = dict(experts=4, in_features=3, out_features=2)
PLAN = mt.plan("cp", rank=6, **SIZES)


def torch_tensor(array: np.ndarray, **options: object) -> object:
    return pytest.importorskip("torch").tensor(array, **options)


def cp(*shapes: tuple[int, ...]) -> mt.FactorizedTensor:
    return mt.FactorizedTensor("cp", [np.ones(s) for s in shapes])


def declared(name: str, *factors: str, bond: str = "") -> type[mt.Format]:
    class Declared(mt.Format):
        title = "Declared in a test"

        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            return [mt.Factor(f) for f in factors] or [mt.Factor(" ".join(modes) + bond)]

    Declared.name = name
    return Declared


#: A call, the error, and what the message must say: the rule, and the offending value.
BAD: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    # formats
    "unknown format": (lambda: mt.get_format("cpd"), ValueError, ("'cpd'", "'btt', 'cp'", "'tucker'", "--import")),
    "format of a wrong type": (lambda: mt.get_format(3), TypeError, ("a name, a dict", "or a Format", "3")),
    "factor with an index twice": (lambda: mt.Factor("r r"), ValueError, ("must differ", "'r r'")),
    "memory order of other indices": (lambda: mt.Factor("r i", "r o"), ValueError, ("reorder", "'r o'")),
    "format without a mode": (lambda: mt.register(declared("a", "i o")), ValueError, ("every mode", "'n1'")),
    "bond with one end": (
        lambda: mt.register(declared("b", bond=" r")), ValueError, ("two or more factors", "'r'")),
    "name taken": (lambda: mt.register(declared("cp")), ValueError, ("unique", "'cp'")),
    # FactorizedTensor
    "factors not in a list": (lambda: mt.FactorizedTensor("cp", Z), TypeError, ("list or a tuple", "ndarray")),
    "factor that is no array": (lambda: mt.FactorizedTensor("cp", [Z, "x", Z]), TypeError, ("array", "str")),
    "too few factors": (lambda: cp((4, 6)), ValueError, ("n1 r | i r | o r", "(4, 6)")),
    "no factors": (lambda: mt.FactorizedTensor("cp", []), ValueError, ("n1 r", "none")),
    "factor of wrong order": (lambda: cp((4, 6), (3, 6, 1), (2, 6)), ValueError, ("n1 r | i r", "(3, 6, 1)")),
    "bond of two sizes": (
        lambda: cp((4, 6), (3, 5), (2, 6)), ValueError, ("same size", "'r'", "6 in factor[1]", "5 in factor[2]")),
    "factor of size zero": (lambda: cp((4, 6), (0, 6), (2, 6)), ValueError, ("positive", "(0, 6)")),
    "ring that does not close": (
        lambda: mt.FactorizedTensor("tr", [np.ones(s) for s in ((2, 4, 3), (3, 3, 5), (5, 2, 4))]),
        ValueError, ("same size", "'b1'", "2 in factor[0]", "4 in factor[2]")),
    "None for a factor with a mode": (
        lambda: mt.FactorizedTensor("hadamard", [None, np.ones((3, 2))]), ValueError, ("None only", "'n1'")),
    "integer factors": (
        lambda: mt.FactorizedTensor("hadamard", [np.ones((4, 2), int), np.ones((3, 2), int)]),
        TypeError, ("floating", "int64")),
    "factors of two dtypes": (
        lambda: mt.FactorizedTensor("hadamard", [np.ones((4, 2), "f4"), np.ones((3, 2))]),
        TypeError, ("the same floating dtype", "float32", "float64")),
    "factors of two backends": (
        lambda: mt.FactorizedTensor("hadamard", [torch_tensor(np.ones((4, 2))), np.ones((3, 2))]),
        TypeError, ("one backend", "pytorch", "numpy")),
    "no container in TensorLy": (
        lambda: mt.FactorizedTensor(declared("x")(), [np.ones((4, 3, 2))]).to_tensorly(),
        TypeError, ("no container", "'x'")),
    "neither weight nor container": (lambda: mt.to_dense("W"), TypeError, ("FactorizedTensor", "str")),
    "random with a wrong rank": (
        lambda: mt.FactorizedTensor.random("tr", rank=(2, 3), **SIZES), ValueError, ("b1, b2, b3", "(2, 3)")),
    "random without a rank": (lambda: mt.FactorizedTensor.random("cp", **SIZES), ValueError, ("per bond, r;", "None")),
    "random like integers": (
        lambda: mt.FactorizedTensor.random("cp", rank=2, like=np.ones(1, int), **SIZES),
        TypeError, ("floating", "int64")),
    "random like no array": (
        lambda: mt.FactorizedTensor.random("cp", rank=2, like=1.0, **SIZES), TypeError, ("arrays", "float")),
    "random with no experts": (
        lambda: mt.FactorizedTensor.random("cp", experts=0, in_features=3, out_features=2, rank=2),
        ValueError, ("positive", "0")),
    # multilinear_moe
    "coefficients not in a list": (lambda: mt.multilinear_moe(W, Z, A), TypeError, ("list", "ndarray")),
    "a level too few": (lambda: mt.multilinear_moe(TWO, Z, [A]), ValueError, ("2 for this", "got 1")),
    "a level too many": (lambda: mt.multilinear_moe(W, Z, [A, A]), ValueError, ("1 for this", "got 2")),
    "input of wrong size": (lambda: mt.multilinear_moe(W, A, [A]), ValueError, ("3 features", "(5, 4)")),
    "bias that the weight lacks": (
        lambda: mt.multilinear_moe(W, Z, [A], bias=True), ValueError, ("2 features", "bias row", "(5, 3)")),
    "input without an axis": (
        lambda: mt.multilinear_moe(W, np.ones(()), [A]), ValueError, ("3 features", "()")),
    "coefficients of wrong size": (
        lambda: mt.multilinear_moe(W, Z, [Z]), ValueError, ("coefficients[0]", "(5, 4)", "(5, 3)")),
    "coefficients of another batch": (
        lambda: mt.multilinear_moe(W, Z, [A[:4]]), ValueError, ("leading shape", "(5, 4)", "(4, 4)")),
    "levels in wrong order": (
        lambda: mt.multilinear_moe(TWO, Z, [np.ones((5, 7)), A]), ValueError, ("coefficients[0]", "(5, 7)")),
    "input that is no array": (lambda: mt.multilinear_moe(W, [1.0], [A]), TypeError, ("arrays", "list")),
    "coefficients that are no array": (
        lambda: mt.multilinear_moe(W, Z, [[0.25] * 4]), TypeError, ("arrays", "list")),
    "input of another dtype": (
        lambda: mt.multilinear_moe(W, Z.astype("f4"), [A]), TypeError, ("the same floating dtype", "z: float32")),
    "integer input": (lambda: mt.multilinear_moe(W, Z.astype(int), [A]), TypeError, ("floating", "int64")),
    "input of another backend": (
        lambda: mt.multilinear_moe(W, torch_tensor(Z), [A]), TypeError, ("one backend", "pytorch")),
    "input on another device": (
        lambda: mt.multilinear_moe(torch_tensor(np.ones((4, 3, 2))), torch_tensor(Z, device="meta"),
                                   [torch_tensor(A)]), TypeError, ("one device", "meta", "cpu")),
    "bias that is no bool": (lambda: mt.multilinear_moe(W, Z, [A], bias=1), TypeError, ("True or False", "1")),
    "unknown objective": (
        lambda: mt.multilinear_moe(W, Z, [A], minimize="speed"), ValueError, ("'time', 'flops'", "'speed'")),
    "unknown implementation": (
        lambda: mt.multilinear_moe(W, Z, [A], implementation="fast"), ValueError, ("'auto'", "'fast'")),
    "limit that nothing keeps": (
        lambda: mt.multilinear_moe(W, Z, [A], memory_limit=1), ValueError, ("memory_limit", "batch 5", "1 el")),
    "plan of other sizes": (
        lambda: mt.multilinear_moe(W, Z, [A], plan=mt.plan("cp", rank=5, **SIZES)),
        ValueError, ("made for", "'r': 5", "'r': 6")),
    "plan of a wrong type": (lambda: mt.multilinear_moe(W, Z, [A], plan="x"), TypeError, ("Plan", "str")),
    "binding another weight": (lambda: mt.bind(PLAN, TWO), ValueError, ("made for", "'r': 6")),
    "binding with a bias that is no bool": (lambda: mt.bind(PLAN, W, bias=0), TypeError, ("True or False", "0")),
    "binding with another bias": (lambda: mt.bind(PLAN, W, bias=True), ValueError, ("made for", "bias=False")),
    # expert_matrix
    "expert that is not there": (lambda: mt.expert_matrix(W, 4), ValueError, ("less than 4", "got 4")),
    "negative expert": (lambda: mt.expert_matrix(W, -1), ValueError, ("at least 0", "got -1")),
    "index of wrong length": (lambda: mt.expert_matrix(TWO, 3), ValueError, ("one entry per level", "2 here", "[3]")),
    "index that is no integer": (lambda: mt.expert_matrix(W, 1.0), TypeError, ("integer", "1.0")),
    "index that is a bool": (lambda: mt.expert_matrix(W, (True,)), TypeError, ("integer", "True")),
    "expert's bias that is no bool": (lambda: mt.expert_matrix(W, 0, bias=1), TypeError, ("True or", "1")),
    # dense_parameters
    "dense layer of no size": (
        lambda: mt.dense_parameters(-3, 4), ValueError, ("in_features", "positive", "-3")),
    "dense block of no size": (lambda: mt.dense_parameters(3, 4, 0), ValueError, ("hidden", "0")),
    "dense layer of half a feature": (
        lambda: mt.dense_parameters(3, 4.5), TypeError, ("out_features", "integer", "4.5")),
    "dense layer whose bias is no bool": (
        lambda: mt.dense_parameters(3, 4, bias=2), TypeError, ("True or False", "2")),
    # plan
    "zero experts": (
        lambda: mt.plan("cp", experts=0, in_features=3, out_features=2, rank=6), ValueError, ("experts", "0")),
    "experts that are no integer": (
        lambda: mt.plan("cp", experts=(4, 2.5), in_features=3, out_features=2, rank=6), TypeError, ("2.5",)),
    "experts in a string": (
        lambda: mt.plan("cp", experts="4", in_features=3, out_features=2, rank=6), TypeError, ("integer", "'4'")),
    "negative input size": (
        lambda: mt.plan("cp", experts=4, in_features=-3, out_features=2, rank=6), ValueError, ("in_f", "-3")),
    "output size that is no integer": (
        lambda: mt.plan("cp", experts=4, in_features=3, out_features=None, rank=6), TypeError, ("None",)),
    "rank zero": (lambda: mt.plan("cp", rank=0, **SIZES), ValueError, ("rank", "positive", "0")),
    "rank that is no integer": (lambda: mt.plan("cp", rank=1.5, **SIZES), TypeError, ("rank", "1.5")),
    "rank in a string": (lambda: mt.plan("cp", rank="6", **SIZES), TypeError, ("rank", "'6'")),
    "open rank": (lambda: mt.plan("tr", rank=(4, 4, None), **SIZES), ValueError, ("fit_rank", "None")),
    "rank of a format without": (lambda: mt.plan("dense", rank=3, **SIZES), ValueError, ("no entries", "3")),
    "rank of too many entries": (
        lambda: mt.plan("cp", rank=(2, 2), **SIZES), ValueError, ("per bond, r;", "(2, 2)")),
    "negative batch": (lambda: mt.plan("cp", rank=6, batch=-1, **SIZES), ValueError, ("batch", "-1")),
    "unknown dtype": (
        lambda: mt.plan("cp", rank=6, dtype="int8", **SIZES), ValueError, ("'float32'", "'int8'")),
    "weights folded by name": (
        lambda: mt.plan("cp", rank=6, fold_weights="all", **SIZES), TypeError, ("fold_weights", "'all'")),
    "limit of zero": (lambda: mt.plan("cp", rank=6, memory_limit=0, **SIZES), ValueError, ("memory_limit", "0")),
    # cost and budget
    "gate that is no bool": (lambda: mt.cost("cp", rank=6, gate=1, **SIZES), TypeError, ("gate", "1")),
    "hidden of zero": (lambda: mt.cost("cp", rank=6, hidden=0, **SIZES), ValueError, ("hidden", "0")),
    "cost of an unknown format": (lambda: mt.cost("svd", rank=6, **SIZES), ValueError, ("'svd'", "'tr'")),
    "budget below the smallest rank": (
        lambda: mt.fit_rank("cp", parameters=3, **SIZES), ValueError, ("budget of 3", "has 9")),
    "budget of zero": (lambda: mt.fit_rank("cp", parameters=0, **SIZES), ValueError, ("parameters", "0")),
    "budget in words": (
        lambda: mt.fit_rank("cp", parameters="all", **SIZES), ValueError, ("multiple such as 0.5x", "'all'")),
    "budget beyond full rank": (
        lambda: mt.fit_rank("tucker", parameters=10_000, **SIZES), ValueError, ("full rank", "10,000")),
    "two open ranks": (
        lambda: mt.fit_rank("tr", rank=(4, None, None), **SIZES), ValueError, ("exactly one", "None, None")),
    "no open rank": (lambda: mt.fit_rank("tr", rank=(4, 4, 4), **SIZES), ValueError, ("exactly one", "4, 4")),
    "no rank to fit": (lambda: mt.fit_rank("hadamard", **SIZES), ValueError, ("has none", "and 14 parameters")),
    "unknown rounding": (
        lambda: mt.fit_rank("cp", rounding="floor", **SIZES), ValueError, ("'nearest'", "'floor'")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name: str) -> None:
    call, error, parts = BAD[name]
    registered = [*mt.formats()]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert [*mt.formats()] == registered  # none that was refused


@pytest.mark.parametrize("sizes", [{"experts": True}, {"in_features": True}, {"rank": True}, {"batch": True}])
def test_sizes_that_are_bools(sizes) -> None:
    with pytest.raises(TypeError, match="must be an integer, got True"):
        mt.plan("cp", **{"experts": 4, "in_features": 3, "out_features": 2, "rank": 6, **sizes})
