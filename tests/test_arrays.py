"""Arrays as they come: every kind is read as the numbers it stands for, or refused with the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.testing import installed_backends, jax_float64, make_array

torch = pytest.importorskip("torch")

from mumoe_tensor import analysis  # noqa: E402
from mumoe_tensor.browser import collect  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402
from mumoe_tensor.training import Dataset  # noqa: E402

FORMATS = list(mt.formats())
RANKS = {"cp": 5, "tucker": (2, 3, 2), "tr": (2, 3, 2), "tt": (3, 2)}
GATES: dict[str, Callable[[Any], Any]] = {
    "entmax15": mt.entmax15,
    "sparsemax": mt.sparsemax,
    "softmax": mt.softmax,
    "top_k": lambda x: mt.top_k(x, 2),
}
#: These fit both layers of a block.
#: Those that can start as any linear layer at the ranks here.
WHOLE = ["cp", "dense", "hadamard", "tucker", "tr", "tt"]


def rank_of(format: str) -> int | tuple[int, ...]:
    return RANKS.get(format, (2,) * len(mt.formats()[format].bonds(1)))


def outputs(format: str) -> int:
    """A number of outputs that the format splits, or two."""
    return 4 if "o" in mt.formats()[format].splits else 2


RANKS_OF_TWO = RANKS | {"tucker": (2, 2, 2)}
Z = np.random.default_rng(0).standard_normal((4, 4))
A = mt.softmax(Z)


def weight(format: str = "cp", like: Any = None) -> mt.FactorizedTensor:
    sizes = dict(experts=4, in_features=4, out_features=outputs(format))
    return mt.FactorizedTensor.random(format, rank=rank_of(format), like=like, seed=1, **sizes)


W = weight()
PLAN = mt.plan("cp", experts=4, in_features=4, out_features=2, rank=5)
#: Every public function that takes an array of shape (4, 4), and what it makes of it.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "multilinear_moe(z)": lambda x: mt.multilinear_moe(W, x, [A]),
    "multilinear_moe(coefficients)": lambda x: mt.multilinear_moe(W, Z, [x]),
    "multilinear_moe(weight)": lambda x: mt.multilinear_moe(x, Z, []),
    "bind(weight)": lambda x: mt.bind(
        mt.plan("dense", experts=(), in_features=4, out_features=4), x
    )(Z, []),
    "bind(...)(z)": lambda x: mt.bind(PLAN, W)(x, [A]),
    "to_dense": lambda x: mt.to_dense(mt.FactorizedTensor("hadamard", [x, Z])),
    "to_dense(array)": mt.to_dense,
    "expert_matrix": lambda x: mt.expert_matrix(x, ()),
    "FactorizedTensor": lambda x: mt.FactorizedTensor("hadamard", [x, Z]).factors[0],
    "random(like)": lambda x: mt.FactorizedTensor.random(
        "cp", experts=4, in_features=3, out_features=2, rank=5, like=x, seed=1
    ).factors[1],
    "decompose": lambda x: mt.decompose(x, "dense")[0].factors[0],
    "decompose(list)": lambda x: mt.decompose([x, x], "dense")[0].factors[0],
    "decompose(bias)": lambda x: mt.decompose(np.ones((4, 3, 4)), "dense", bias=x)[0].factors[0],
}  # fmt: skip
FUNCTIONS |= GATES


class Plain(np.ndarray):
    """A subclass that changes no operation."""


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


TAKEN: dict[str, Callable[[np.ndarray], Any]] = {
    "read-only": read_only,
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "not contiguous": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran's order": np.asfortranarray,
    "a subclass": lambda x: x.view(Plain),
    "the machine's byte order, named": lambda x: x.astype(x.dtype.newbyteorder("=")),
}
REFUSED: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "masked": (lambda x: np.ma.array(x, mask=x > 0), "MaskedArray"),
    "matrix": (np.asmatrix, "matrix"),
    "another byte order": (lambda x: x.astype(x.dtype.newbyteorder("S")), "f8"),
    "complex": (lambda x: x.astype(complex), "complex128"),
    "objects": (lambda x: x.astype(object), "object"),
    "strings": (lambda x: x.astype(str), "<U32"),
    "integers": (lambda x: x.astype(np.int32), "int32"),
    "booleans": (lambda x: x > 0, "bool"),
    "dates": (lambda x: x.astype("M8[D]"), "datetime64"),
    "records": (lambda x: np.rec.fromarrays([x], names="a"), "record"),
    "8 bits": (lambda x: torch.tensor(x).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "sparse": (lambda x: torch.tensor(x).to_sparse(), "sparse_coo"),
    "nested": (lambda x: torch.nested.nested_tensor([*torch.tensor(x)]), "nested"),
    "torch's masked": (
        lambda x: torch.masked.masked_tensor(torch.tensor(x), torch.tensor(x > 0)), "MaskedTensor"),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arrays_of_every_memory(function: str) -> None:
    run = FUNCTIONS[function]
    expected = np.asarray(run(Z if function != "decompose(bias)" else Z.copy()))
    for make in TAKEN.values():
        before = make(Z).copy()
        x = make(Z)
        np.testing.assert_allclose(np.asarray(run(x)), expected, rtol=1e-13)
        np.testing.assert_array_equal(x, before)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*MaskedTensor:UserWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", REFUSED)
def test_arrays_that_are_refused(function: str, kind: str) -> None:
    make, got = REFUSED[kind]
    with pytest.raises(TypeError, match=r"plain|all arrays must|an input must be a dense tensor") as caught:
        FUNCTIONS[function](make(Z))
    # (Beside NumPy's arrays a tensor is refused as one of another backend.)
    assert got in str(caught.value) or "one backend" in str(caught.value)


@pytest.mark.parametrize("kind", ["8 bits", "sparse", "nested", "torch's masked"])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*MaskedTensor:UserWarning")
@pytest.mark.parametrize("gate", GATES)
def test_tensors_that_are_refused(gate: str, kind: str) -> None:
    make, got = REFUSED[kind]
    with pytest.raises(TypeError, match=got):
        GATES[gate](make(Z))


# ---- labels --------------------------------------------------------------------------------------------

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")


def layer() -> MuMoE:
    torch.manual_seed(0)
    made = MuMoE(4, 2, 4, rank=3, gate_norm="layer").eval()
    torch.nn.init.normal_(made.gate.weight)
    return made


class Language(torch.nn.Module):
    """A language model of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, tokens: Any) -> Any:
        return self.layer(X[tokens])


X = torch.tensor(Z, dtype=torch.float32)


def counted(labels: Any) -> Any:
    counts = analysis.Labels(4, 2)
    counts.update(X.softmax(1), labels)
    return counts.counts


def best(indices: Any) -> Any:
    top = analysis.TopInputs(4, 2)
    top.update(X.softmax(1), indices)
    return top.indices


#: Every call that takes labels, with four of them; the last one takes any numbers from 0 on.
LABELLED: dict[str, Callable[[Any], Any]] = {
    "Labels": counted,
    "ablation_effects": lambda y: analysis.ablation_effects(m := layer(), m, [(X, y)], 2),
    "loss_effects": lambda y: analysis.loss_effects(
        m := Language(), m.layer, [(torch.arange(4)[None], y[None])]
    ),
    "collect": lambda y: collect(layer(), X, y)[0].effects,
    "Dataset": lambda y: Dataset(X, y).y,
    "fairness(labels)": lambda y: (
        pytest.importorskip("fairlearn")
        and analysis.fairness(y, y, torch.tensor([0, 0, 1, 1]), (1, 1)).subpopulations
    ),
    "fairness(groups)": lambda y: (
        pytest.importorskip("fairlearn")
        and analysis.fairness(*(torch.tensor([0, 1, 1, 1]),) * 2, y, (1, 1)).subpopulations
    ),
    "TopInputs": best,
}


@pytest.mark.parametrize("call", LABELLED)
def test_labels_of_every_dtype(call: str) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    expected = LABELLED[call](labels)
    for dtype in INTEGERS:
        actual = LABELLED[call](labels.to(getattr(torch, dtype)))
        assert type(actual) is type(expected) and getattr(actual, "dtype", 0) == getattr(expected, "dtype", 0)
        np.testing.assert_equal(to_plain(actual), to_plain(expected))
    for dtype in ("float32", "float64", "bfloat16", "complex64"):
        with pytest.raises(TypeError, match=f"must be integers, got torch.{dtype}"):
            LABELLED[call](labels.to(getattr(torch, dtype)))
    if call != "fairness(groups)":
        with pytest.raises(ValueError, match="-1"):
            LABELLED[call](torch.tensor([0, 1, 1, -1]))
    if call in ("Labels", "ablation_effects"):
        with pytest.raises(ValueError, match=r"labels must be at least 0 and less than 2, got 0 to 2"):
            LABELLED[call](torch.tensor([0, 1, 2, 1], dtype=torch.uint64))


# ---- empty batches -------------------------------------------------------------------------------------

EMPTY = ((0,), (2, 0), (0, 3))


@pytest.mark.parametrize("backend", installed_backends())
@pytest.mark.parametrize("format", FORMATS)
def test_functions_of_empty_batches(format: str, backend: str) -> None:
    w = weight(format, make_array(np.ones(1), backend, "float32"))
    for leading in EMPTY if backend != "jax" else EMPTY[:1]:  # which compiles for every shape
        z, a = (make_array(np.zeros((*leading, 4)), backend, "float32") for _ in range(2))
        y = mt.multilinear_moe(w, z, [a])
        assert tuple(y.shape) == (*leading, outputs(format)) and type(y) is type(z)


@pytest.mark.parametrize("backend", installed_backends())
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_empty_batches(gate: str, backend: str) -> None:
    for shape in ((0, 4), (0, 3, 4)):
        assert tuple(GATES[gate](make_array(np.zeros(shape), backend, "float32")).shape) == shape


@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_layers_of_empty_batches(kind: Any, norm: str) -> None:
    for format in FORMATS:
        sizes = (4, outputs(format)) if kind is MuMoE else (4, 4, outputs(format))
        made = kind(*sizes, 4, format, RANKS_OF_TWO.get(format, rank_of(format)), gate_norm=norm)
        if norm == "batch":
            with pytest.raises(ValueError, match="at least two unmasked rows in training"):
                made(torch.zeros(0, 4))
            made.eval()
        for leading in EMPTY:
            x = torch.zeros(*leading, 4, requires_grad=True)
            y, (a,) = made(x, return_coefficients=True)
            y.sum().backward()
            assert y.shape == (*leading, sizes[-1]) and a.shape == (*leading, 4) and x.grad.shape == x.shape
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        assert gradients and not any(g.any() for g in gradients)


def test_analysis_of_empty_batches() -> None:
    made, no_labels, none = layer(), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    labels = torch.tensor([0, 1, 1, 0])
    usage, by_label, top = analysis.Usage(4), analysis.Labels(4, 2), analysis.TopInputs(4, 2)
    for a, y in ((none, no_labels), (X.softmax(1), labels), (none, no_labels)):
        usage.update(a)
        by_label.update(a, y)
        top.update(a, y)
    assert usage.statistics().rows == 4 and by_label.all.tolist() == [2, 2] and top.rows == 4
    batches = [(none, no_labels), (X, labels), (none, no_labels)]
    expected = analysis.ablation_effects(made, made, batches[1:2], 2)
    assert torch.equal(analysis.ablation_effects(made, made, batches, 2), expected)
    assert analysis.ablation_effects(made, made, batches[:1], 2).isnan().all()
    assert analysis.attribute(made, made, none, 0).shape == (0, 4)
    actual = analysis.mean_coefficients(made, made, [none, X])
    assert torch.equal(actual[0], analysis.mean_coefficients(made, made, [X])[0])
    with pytest.raises(ValueError, match="need at least one input"):
        analysis.mean_coefficients(made, made, [none])
    for context in (analysis.ablate(made, [1]), analysis.random_gate(made, 0)):
        with context:
            assert made(none).shape == (0, 2)


# ---- generators ----------------------------------------------------------------------------------------

Y = torch.tensor([0, 1, 1, 0])
SIZES = dict(in_features=4, out_features=2)
ITERABLES: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "ablation_effects": (lambda b: analysis.ablation_effects(m := layer(), m, b, 2), [(X, Y), (X, 1 - Y)]),
    "loss_effects": (
        lambda b: analysis.loss_effects(m := Language(), m.layer, b),
        [(Y[None], Y[None]), (Y[None], 1 - Y[None])]),
    "mean_coefficients": (lambda b: analysis.mean_coefficients(m := layer(), m, b)[0], [X]),
    "Experts(coefficients)": (lambda a: layer().experts(X, a), [X.softmax(1)]),
    "MuMoE(experts)": (lambda n: torch.tensor(MuMoE(4, 2, n, rank=3).gate.num_experts), [4, 3]),
    "MuMoE(parameters)": (lambda n: torch.tensor(MuMoE(4, 2, n, parameters=200).experts.rank), [4, 3]),
    "random(experts)": (lambda n: mt.FactorizedTensor.random("cp", experts=n, rank=2, **SIZES).shape, [4, 3]),
    "plan(experts)": (lambda n: mt.plan("cp", experts=n, rank=2, **SIZES).flops, [4, 3]),
    "cost(experts)": (lambda n: mt.cost("cp", experts=n, rank=2, **SIZES).parameters, [4, 3]),
    "cost(rank)": (lambda r: mt.cost("tr", experts=4, rank=r, hidden=3, **SIZES).parameters, [2, 3, 2]),
    "MuMoEMLP(rank)": (
        lambda r: torch.tensor([*map(torch.numel, MuMoEMLP(4, 3, 2, 4, "tr", r).parameters())]), [2, 3, 2]),
    "MuMoEMLP(experts)": (
        lambda n: torch.tensor([*map(torch.numel, MuMoEMLP(4, 3, 2, n, rank=3).parameters())]), [4, 3]),
    "fit_rank(rank)": (
        lambda r: mt.fit_rank("tr", experts=4, rank=r, parameters=200, hidden=3, **SIZES), [2, None, 2]),
    "fit_rank(hidden)": (
        lambda n: mt.fit_rank("cp", experts=n, hidden=3, parameters=500, **SIZES), [4, 3]),
    "fit_rank(experts)": (lambda n: mt.fit_rank("cp", experts=n, parameters=500, **SIZES), [4, 3]),
}  # fmt: skip


@pytest.mark.parametrize("call", ITERABLES)
def test_generators_are_read_once(call: str) -> None:
    run, values = ITERABLES[call]
    torch.manual_seed(0)
    np.testing.assert_equal(to_plain(run(value for value in values)), to_plain(run(values)))


def to_plain(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "call",
    [
        lambda: mt.FactorizedTensor("hadamard", (x for x in (Z, Z))),
        lambda: mt.multilinear_moe(W, Z, (a for a in (A,))),
        lambda: mt.decompose((x for x in (Z, Z)), "dense"),
    ],
)
def test_generators_that_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="got generator"):
        call()


# ---- short dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in installed_backends() if b != "numpy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["cp", "tucker", "btt"])
def test_short_dtypes_are_decomposed_in_float64(format: str, dtype: str, backend: str) -> None:
    dense = np.random.default_rng(0).standard_normal((4, 4, outputs(format)))
    short = make_array(dense, backend, dtype)
    wide = np.asarray(make_array(dense, "pytorch", dtype).double())
    with jax_float64():
        actual, error = mt.decompose(short, format, rank_of(format), n_restarts=2)
    _, expected = mt.decompose(wide, format, rank_of(format), n_restarts=2)
    assert mt.backend.dtype_name(actual.arrays[0]) == dtype
    assert error == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_linear_layers_are_truncated(dtype: Any) -> None:
    torch.manual_seed(0)
    short = torch.nn.Linear(8, 6, dtype=dtype)
    before = short.weight.clone()
    wide = torch.nn.Linear(8, 6)
    wide.load_state_dict({name: value.float() for name, value in short.state_dict().items()})
    with analysis.truncate([short, wide], 0.5):
        assert short.weight.dtype == dtype
        torch.testing.assert_close(short.weight, wide.weight.to(dtype), rtol=0, atol=0)
    assert torch.equal(short.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", WHOLE)
def test_short_layers_start_as_a_linear_layer(format: str, dtype: Any) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 2, dtype=dtype)
    options = {"rank": (4,) if format == "cp" else (2, 4, 2) if format == "tucker" else None}
    if format in ("tr", "tt"):
        options = {"parameters": 2000}
    made = MuMoE.from_linear(linear, 4, format=format, gate_norm="layer", **options)
    assert {p.dtype for p in made.parameters()} == {dtype}
    torch.testing.assert_close(made(X.to(dtype)), linear(X.to(dtype)), rtol=0.05, atol=0.05)


# ---- abstract values -----------------------------------------------------------------------------------


def test_weights_print_whatever_their_factors_are() -> None:
    jax = pytest.importorskip("jax")
    import mumoe_tensor.jax  # noqa: F401

    w = weight("cp", jax.numpy.ones(1))
    whole = "FactorizedTensor('cp', shape=(4, 4, 2), rank=(5,), float32, jax)"
    seen: list[str] = []

    def look(weight: Any) -> Any:
        seen.append(repr(weight))
        return weight

    jax.jit(look)(w)
    stacked = jax.vmap(lambda k: jax.tree.map(lambda f: k * f, w))(jax.numpy.arange(3.0))
    jax.vmap(look)(stacked)
    assert seen == [whole] * 2
    factors = "(None, ArrayImpl(3, 4, 5), ArrayImpl(3, 4, 5), ArrayImpl(3, 2, 5))"
    assert repr(stacked) == f"FactorizedTensor('cp', factors={factors})"
    abstract = repr(jax.eval_shape(look, w))
    assert abstract.startswith("FactorizedTensor('cp', factors=(None, ShapeDtypeStruct(4, 5), ")
    assert repr(jax.tree.map(lambda f: "x", w)) == "FactorizedTensor('cp', factors=(None, 'x', 'x', 'x'))"


def test_weights_of_meta_and_mapped_tensors_print() -> None:
    shapes = ((4, 5), (3, 5), (2, 5))
    text = "FactorizedTensor('cp', shape=(4, 3, 2), rank=(5,), float32, pytorch)"
    assert repr(mt.FactorizedTensor("cp", [torch.empty(s, device="meta") for s in shapes])) == text
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert repr(mt.FactorizedTensor("cp", [torch.empty(s) for s in shapes])) == text

    def look(*factors: Any) -> Any:
        assert repr(mt.FactorizedTensor("cp", factors)) == text
        return factors[0].sum()

    torch.func.vmap(look)(*(torch.ones(7, *s) for s in shapes))


@pytest.mark.parametrize("format", ["cp", "tucker", "tr", "btt", "shared-expert"])
def test_exports_for_any_batch(format: str) -> None:
    jax = pytest.importorskip("jax")
    from jax import export

    import mumoe_tensor.jax  # noqa: F401

    w = weight(format, jax.numpy.ones(1))
    (b,) = export.symbolic_shape("b")

    def forward(z: Any, logits: Any) -> Any:
        return mt.multilinear_moe(w, z, [mt.softmax(logits)])

    spec = jax.ShapeDtypeStruct((b, 4), jax.numpy.float32)
    exported = export.export(jax.jit(forward))(spec, spec)
    for rows in (1, 9):
        z = jax.numpy.asarray(np.random.default_rng(0).standard_normal((rows, 4)), jax.numpy.float32)
        np.testing.assert_allclose(exported.call(z, z), forward(z, z), rtol=1e-5, atol=1e-6)
