"""Selections of experts, outputs, levels and rows: every call reads every kind alike, or refuses it alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.selections import read_index, read_number, read_selection

torch = pytest.importorskip("torch")

from mumoe_tensor import analysis  # noqa: E402
from mumoe_tensor.browser import Images, Texts  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402
from mumoe_tensor.training import Dataset  # noqa: E402
from mumoe_tensor.training.attributes import Population  # noqa: E402
from mumoe_tensor.training.images import ImageFiles  # noqa: E402
from mumoe_tensor.training.tokens import TOKEN, Tokens  # noqa: E402

#: Experts of each level, outputs, rows and windows: all selections are of as many, so that one table serves.
N = 6
X = torch.linspace(-1, 1, 6 * N).sin().reshape(N, 6)
LABELS = torch.arange(N)


def layer() -> MuMoE:
    """A layer of two levels whose experts all matter."""
    torch.manual_seed(0)
    made = MuMoE(6, N, (N, N), rank=3, gate_norm="layer", gate="softmax").eval()
    torch.nn.init.normal_(made.gate.weight)
    return made


class Language(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, tokens: Any) -> Any:
        return self.layer(X[tokens])


def within(intervene: Callable[..., Any]) -> Any:
    made = layer()
    with torch.no_grad(), intervene(made):
        return made(X)


def edited(outputs: Any) -> Any:
    made = layer()
    analysis.edit_bias(made, "edit", [torch.ones(N)] * 2, outputs, 2.0)
    return made(X)


def kept(level: Any, indices: Any) -> Any:
    return layer().keep_experts(level, indices)(X)


def data() -> Dataset:
    return Dataset(X, LABELS)


def token_files(folder: Any) -> Tokens:
    path = folder / "some.bin"
    np.arange(2 * N + 1).astype(TOKEN).tofile(path)
    return Tokens(path, 2)


@dataclass(frozen=True)
class Call:
    """A call with one selection, which may have to name one or more, or may name one more than once."""

    run: Callable[[Any], Any]
    needs_one: bool = False
    repeats: bool = False


BATCH = [(X, LABELS)]
TOKENS = [(torch.arange(N)[None], torch.arange(N).flip(0)[None])]
SELECTIONS = {
    "ablate(experts)": Call(lambda s: within(lambda m: analysis.ablate(m, s, 1))),
    "keep_only(experts)": Call(lambda s: within(lambda m: analysis.keep_only(m, s, 1))),
    "scale(experts)": Call(lambda s: within(lambda m: analysis.scale(m, s, 3.0, 1))),
    "ablation_effects(experts)": Call(
        lambda s: analysis.ablation_effects(m := layer(), m, BATCH, N, level=1, experts=s)
    ),
    "loss_effects(experts)": Call(
        lambda s: analysis.loss_effects(m := Language(), m.layer, TOKENS, level=1, experts=s)
    ),
    "edit_bias(outputs)": Call(edited, needs_one=True),
    "MuMoE.keep_experts(indices)": Call(lambda s: kept(1, s), needs_one=True),
    "Dataset.rows(index)": Call(lambda s: data().rows(s).x, needs_one=True, repeats=True),
    "Dataset.batch(rows)": Call(lambda s: data().batch(s)[0], repeats=True),
    "Population.rows(index)": Call(
        lambda s: Population(X, LABELS[:, None], LABELS % 2).rows(s).group, repeats=True
    ),
}
NUMBERS = {
    "ablate(level)": lambda n: within(lambda m: analysis.ablate(m, [2], n)),
    "keep_only(level)": lambda n: within(lambda m: analysis.keep_only(m, [2], n)),
    "scale(level)": lambda n: within(lambda m: analysis.scale(m, [2], 3.0, n)),
    "ablation_effects(level)": lambda n: analysis.ablation_effects(m := layer(), m, BATCH, N, level=n),
    "loss_effects(level)": lambda n: analysis.loss_effects(m := Language(), m.layer, TOKENS, level=n),
    "attribute(level)": lambda n: analysis.attribute(m := layer(), m, X, 0, level=n),
    "attribute(output)": lambda n: analysis.attribute(m := layer(), m, X, n),
    "MuMoE.keep_experts(level)": lambda n: kept(n, [2, 0]),
    "Images.shown(index)": lambda n: Images(np.arange(N * 4).reshape(N, 2, 2) / 24).shown(n),
    "Texts.shown(index)": lambda n: Texts([[str(k)] for k in range(N)]).shown(n),
}
WEIGHT = mt.FactorizedTensor.random(
    "tr", experts=(N, N), in_features=2, out_features=3, rank=(2, 2, 2, 2), seed=0
)
INDICES = {
    "expert_matrix(index)": lambda index: mt.expert_matrix(WEIGHT, index),
    "Experts.expert(index)": lambda index: layer().experts.expert(index)[0],
    "MuMoE.expert(index)": lambda index: layer().expert(index)[0],
}
#: What 1 can be.
ONE: dict[str, Callable[[], Any]] = {
    "numpy.int64": lambda: np.int64(1),
    "numpy.uint8": lambda: np.uint8(1),
    "numpy 0-d": lambda: np.array(1, dtype=np.int16),
    "torch 0-d": lambda: torch.tensor(1),
    "torch uint64 0-d": lambda: torch.tensor(1, dtype=torch.uint64),
    "jax 0-d": lambda: pytest.importorskip("jax").numpy.asarray(1),
}
#: What [1, 3, 4] can be; more kinds in `every_kind`.
SOME: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (1, 3, 4),
    "generator": lambda: (k for k in (1, 3, 4)),
    "iterator": lambda: iter([1, 3, 4]),
    "dict keys": lambda: {1: "a", 3: "b", 4: "c"}.keys(),
    "NumPy's integers": lambda: [np.int8(1), np.uint64(3), np.int64(4)],
    "0-d tensors": lambda: list(torch.tensor([1, 3, 4])),
    "negative strides": lambda: np.array([4, 3, 1])[::-1],
    "other byte order": lambda: np.array([1, 3, 4], dtype=">i4"),
    "read-only": lambda: np.broadcast_to(np.array([1, 3, 4]), (3,)),
    "objects": lambda: np.array([1, 3, 4], dtype=object),
    "jax": lambda: pytest.importorskip("jax").numpy.asarray([1, 3, 4]),
    "list of bool": lambda: [k in (1, 3, 4) for k in range(N)],
    "tuple of NumPy's bool": lambda: tuple(np.isin(np.arange(N), [1, 3, 4])),
    "NumPy mask": lambda: np.isin(np.arange(N), [1, 3, 4]),
    "torch mask": lambda: torch.isin(torch.arange(N), torch.tensor([1, 3, 4])),
    "jax mask": lambda: pytest.importorskip("jax").numpy.asarray(np.isin(np.arange(N), [1, 3, 4])),
}
SOME |= {
    f"numpy {name}": lambda name=name: np.array([1, 3, 4], dtype=name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
}
SOME |= {
    f"torch {name}": lambda name=name: torch.tensor([1, 3, 4], dtype=getattr(torch, name))
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
}
#: What is no selection, and what the message says that it got.
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float": (lambda: 1.0, TypeError, "[1.0]"),
    "floats": (lambda: [1.0, 2.0], TypeError, "[1.0, 2.0]"),
    "NumPy floats": (lambda: np.array([1.0]), TypeError, "[1.0]"),
    "torch floats": (lambda: torch.tensor([1.0], dtype=torch.bfloat16), TypeError, "[1.0]"),
    "bool": (lambda: True, TypeError, "[True]"),
    "NumPy bool": (lambda: np.True_, TypeError, "[True]"),
    "torch bool": (lambda: torch.tensor(True), TypeError, "[True]"),
    "bools and integers": (lambda: [True, 2], TypeError, "[True]"),
    "short mask": (lambda: np.ones(N - 1, bool), ValueError, f"mask of length {N - 1}"),
    "long mask": (lambda: torch.ones(N + 1, dtype=torch.bool), ValueError, f"mask of length {N + 1}"),
    "list of few bools": (lambda: [False, True], ValueError, "mask of length 2"),
    "out of range": (lambda: [1, N], ValueError, f"[{N}]"),
    "integer out of range": (lambda: N, ValueError, f"[{N}]"),
    "huge": (lambda: np.array([2**64 - 1], dtype=np.uint64), ValueError, f"[{2**64 - 1}]"),
    "negative": (lambda: [1, -1], ValueError, "[-1]"),
    "two axes": (lambda: np.array([[1, 2]]), TypeError, "[[1, 2]]"),
    "mask of two axes": (lambda: torch.ones(N, 1, dtype=torch.bool), TypeError, "[[True]"),
    "string": (lambda: "12", TypeError, "['12']"),
    "strings": (lambda: ["1", "2"], TypeError, "['1', '2']"),
    "dictionary": (lambda: {1: 2}, TypeError, "[{1: 2}]"),
    "none": (lambda: [None], TypeError, "[None]"),
    "masked entries": (lambda: np.ma.array([1, 2], mask=[False, True]), TypeError, "[None]"),
    "complex": (lambda: [1j], TypeError, "[1j]"),
}
BAD_NUMBER = [
    (1.0, TypeError), (True, TypeError), (np.float32(1), TypeError), (torch.tensor(1.0), TypeError),
    ([1], TypeError), ("1", TypeError), (None, TypeError), (-1, ValueError),
    (99, ValueError), (np.int8(-1), ValueError), (torch.tensor(True), TypeError), (np.array([1]), TypeError),
]  # fmt: skip


def assert_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        np.testing.assert_equal(actual, expected)


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_call_takes_every_kind(name: str) -> None:
    run = SELECTIONS[name].run
    expected = run([1, 3, 4])
    for kind in SOME.values():
        assert_equal(run(kind()), expected)
    assert_equal(run(range(1, 5, 2)), run([1, 3]))
    assert_equal(run(slice(1, None, 2)), run([1, 3, 5]))
    for one in (1, *(kind() for kind in ONE.values())):
        assert_equal(run(one), run([1]))


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_call_refuses_what_is_no_selection(name: str) -> None:
    call = SELECTIONS[name]
    bad = dict(BAD)
    if not call.repeats:
        bad["twice"] = (lambda: [2, 1, 2], ValueError, "[2] more than once")
    if call.needs_one and "rows" not in name:
        bad["none of them"] = (lambda: np.zeros(N, bool), ValueError, "got none")
        bad["empty"] = (list, ValueError, "got none")
    for kind, (value, error, got) in bad.items():
        with pytest.raises(error) as caught:
            call.run(value())
        message = str(caught.value)
        assert f"integers at least 0 and less than {N}, or a boolean mask of length {N}" in message, kind
        assert got in message, kind


@pytest.mark.parametrize("name", [name for name, call in SELECTIONS.items() if not call.needs_one])
def test_no_experts_and_no_rows_are_a_selection(name: str) -> None:
    run = SELECTIONS[name].run
    for empty in ((), np.zeros(N, bool), torch.tensor([]), range(0)):
        assert_equal(run(empty), run([]))


def test_what_no_experts_mean() -> None:
    assert_equal(SELECTIONS["ablate(experts)"].run([]), layer()(X).detach())
    assert not SELECTIONS["keep_only(experts)"].run([]).any()
    assert SELECTIONS["ablation_effects(experts)"].run([]).shape == (0, N)


def test_none_is_no_selection_of_experts() -> None:
    layer = MuMoE(5, 4, experts=3, rank=2)
    contexts = (
        lambda: analysis.ablate(layer, None),
        lambda: analysis.keep_only(layer, None),
        lambda: analysis.scale(layer, None, 2.0),
    )
    for context in contexts:
        with pytest.raises(TypeError, match=r"experts of level 0 must be .*got \[None\]"), context():
            pass


def test_the_order_is_that_of_the_selection() -> None:
    # Gates and experts are put in another order together: the outputs are the same, the coefficients are not.
    smaller = layer().keep_experts(1, [4, 1])
    assert torch.equal(smaller.gate.weight, layer().gate.weight[[*range(N), N + 4, N + 1]])
    assert data().rows([4, 1, 4]).y.tolist() == [4, 1, 4]
    assert read_selection([False, True, True], 3, "experts") == [1, 2]


@pytest.mark.parametrize("name", NUMBERS)
def test_one_number_of_every_library(name: str) -> None:
    run = NUMBERS[name]
    for kind in ONE.values():
        assert_equal(run(kind()), run(1))
    for value, error in BAD_NUMBER:
        with pytest.raises(error, match=r"must be an integer at least 0 and less than \d"):
            run(value)


@pytest.mark.parametrize("name", INDICES)
def test_the_index_of_an_expert(name: str) -> None:
    run = INDICES[name]
    for index in (
        [1, 3],
        np.array([1, 3]),
        torch.tensor([1, 3]),
        (np.uint8(1), torch.tensor(3)),
        range(1, 4, 2),
    ):
        assert_equal(run(index), run((1, 3)))
    for value, error in BAD_NUMBER:
        with pytest.raises(error, match=f"index at level 1 must be an integer at least 0 and less than {N}"):
            run((1, value))
    for index in (1, (), (1, 2, 3), np.ones(N, bool)):
        with pytest.raises(ValueError, match="one entry per level, 2 here"):
            run(index)


def test_the_index_of_an_edited_expert() -> None:
    made = layer()
    analysis.edit_bias(made, "edit", [torch.arange(float(N))] * 2, 2, 1.0)
    before = layer().expert((1, 3))[1]
    for index in ((1, 3), np.array([1, 3]), torch.tensor([1, 3])):
        assert (made.expert(index)[1] - before).tolist() == [0, 0, 3, 0, 0, 0]


def test_one_level_needs_no_sequence() -> None:
    assert read_index(2, (3,)) == read_index([2], (3,)) == read_index(np.array(2), (3,)) == (2,)
    assert read_index((), ()) == ()
    with pytest.raises(ValueError, match="less than 0"):
        read_number(0, 0, "level")


def test_rows_of_files(tmp_path: Any) -> None:
    tokens = token_files(tmp_path)
    expected = tokens.batch([1, 3, 4])
    for kind in SOME.values():
        assert_equal(tokens.batch(kind())[0], expected[0])
    pictures = ImageFiles([("", k) for k in range(N)], None)
    for value, error, got in BAD.values():
        for rows in (tokens, pictures):
            with pytest.raises(error) as caught:
                rows.batch(value())
            assert got in str(caught.value)


# ---- no call is left out -------------------------------------------------------------------------------

#: Parameters with these names take one of a number of things, or some ...
NAMES = {"level", "experts", "index", "indices", "output", "outputs", "rows"}
#: ... but for these, which are numbers of experts or rows, results, or names of indices.
COUNTS = {"int", "int | None", "int | Sequence[int]", "Sequence[int]", "tuple[int, ...]", "Any"}
OTHERS = {
    "Factor(indices)",  # names
    "Experts.add_edit(outputs)", "ChosenExperts.add_edit(outputs)",  # values
    "ChosenExperts.expert(index)",  # inherited as Experts'
    "ChosenExperts.forward(index)",  # a tensor, one number an input: see tests/nn/test_routed.py
    "Results.add(rows)",  # measurements
    "Task.labels(rows)", "Task.members(rows)",  # a population
    "Task(output)",  # of a file's columns, by the reader
    "ExpertLevel(level)", "ExpertLevel(rows)",  # results
    "TopInputs.update(indices)",  # numbers of inputs, of any size: see tests/test_arrays.py
    "Rows.batch(rows)",  # a protocol
    "Format.window(level)", "sliced(level)",  # of a declaration, before there are experts: see tests/formats
    "Tokens.batch(rows)", "ImageFiles.batch(rows)", "ImageFiles.rows(index)",  # above
    "MuMoEMLP.keep_experts(level)", "MuMoEMLP.keep_experts(indices)",  # inherited as MuMoE's
    "Measurement(experts)", "Setting(experts)",  # of a study
}  # fmt: skip
MODULES = (
    "mumoe_tensor", "mumoe_tensor.analysis", "mumoe_tensor.nn", "mumoe_tensor.models", "mumoe_tensor.browser",
    "mumoe_tensor.training", "mumoe_tensor.training.attributes", "mumoe_tensor.training.images",
    "mumoe_tensor.training.tokens", "mumoe_tensor.study",
)  # fmt: skip


def public_functions() -> Iterator[tuple[str, Any]]:
    for name in MODULES:
        module = import_module(name)
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if not str(getattr(value, "__module__", "")).startswith("mumoe_tensor"):
                continue
            if inspect.isclass(value):
                for method, function in inspect.getmembers(value, callable):
                    if method == "__init__" and inspect.isfunction(function):
                        yield value.__name__, function
                    elif not method.startswith("_") and inspect.isroutine(function):
                        yield f"{value.__name__}.{method}", function
            elif inspect.isfunction(value) and not name.startswith("_"):
                yield name, value


def test_no_public_call_is_left_out() -> None:
    actual = set()
    for name, function in public_functions():
        if str(getattr(function, "__module__", "")).startswith("mumoe_tensor"):
            for parameter in inspect.signature(function).parameters.values():
                is_count = parameter.name in ("experts", "rows") and str(parameter.annotation) in COUNTS
                if parameter.name in NAMES and not is_count:
                    actual.add(f"{name}({parameter.name})")
    assert len(actual) >= len(SELECTIONS) + len(NUMBERS) + len(INDICES)
    assert actual - OTHERS == {*SELECTIONS, *NUMBERS, *INDICES}
