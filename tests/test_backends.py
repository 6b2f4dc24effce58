"""NumPy, PyTorch and JAX: same results, arrays of the same kind back, transforms, and no global touched."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import mumoe_tensor as mt
from mumoe_tensor.backend import dtype_name, load_backend, tensorly_backend
from mumoe_tensor.testing import (
    Problem,
    assert_close,
    dense_weight,
    installed_backends,
    jax_float64,
    magnitude,
    make_array,
    problems,
    to_numpy,
)

HERE = installed_backends()
FORMATS = list(mt.formats())
#: One of each structure: factors of vectors, a core, cores in a ring, split modes, and a sum.
DISTINCT = ["cp", "tucker", "tr", "btt", "shared-expert"]
#: Those that TensorLy has, itself or as an array or a CP tensor.
WITH_CONTAINER = ["cp", "tucker", "tr", "tt", "dense", "hadamard"]
PACKAGE = Path(mt.__file__).parent
needs_torch = pytest.mark.skipif("pytorch" not in HERE, reason="PyTorch is not installed")
needs_jax = pytest.mark.skipif("jax" not in HERE, reason="JAX is not installed")
RANKS = {"cp": 5, "tucker": (2, 3, 4, 2), "tr": (2, 3, 2, 3), "tt": (3, 2, 3)}
#: Two levels: every kind of step occurs.
SIZES = dict(experts=(4, 3), in_features=6, out_features=8)


def example(
    format: str, backend: str, dtype: str = "float64", leading: tuple[int, ...] = (7,), bias: bool = True
) -> tuple[mt.FactorizedTensor, Any, list[Any]]:
    """A weight of two levels, inputs and coefficients."""
    rank = RANKS.get(format, (2,) * len(mt.formats()[format].bonds(2)))
    weight = mt.FactorizedTensor.random(format, rank=rank, bias=bias, seed=1, **SIZES)
    factors = [None if f is None else moved(f, backend, dtype) for f in weight.factors]
    generator = np.random.default_rng(2)
    z, *coefficients = (
        make_array(generator.standard_normal((*leading, n)), backend, dtype)
        for n in (SIZES["in_features"], *SIZES["experts"])
    )
    return mt.FactorizedTensor(weight.format, factors), z, coefficients


def moved(array: np.ndarray, backend: str, dtype: str) -> Any:
    return make_array(array, backend, dtype)


# ---- the same on all backends --------------------------------------------------------------------------


@settings(max_examples=max(4, settings().max_examples // 3), suppress_health_check=list(HealthCheck))
@given(problems(backend="numpy"))
def test_all_backends_agree(problem: Problem) -> None:
    expected = problem.output()
    scale = magnitude(problem.weight, problem.z, problem.coefficients, bias=problem.layer.bias)
    for backend in HERE:
        if backend == "jax" and problem.seed % 8:
            continue  # which compiles every operation for every shape: every eighth will do
        with jax_float64():
            factors = [
                None if f is None else make_array(f, backend, problem.dtype) for f in problem.weight.factors
            ]
            weight = mt.FactorizedTensor(problem.weight.format, factors, problem.weight.asked)
            arrays = [make_array(x, backend, problem.dtype) for x in (problem.z, *problem.coefficients)]
            y = mt.multilinear_moe(weight, arrays[0], arrays[1:], bias=problem.layer.bias)
            assert dtype_name(y) == problem.dtype
            assert type(y) is type(arrays[0])
            assert_close(y, expected, scale, backend, problem.dtype)


def test_threads_that_load_jax_at_once_leave_float64_off(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.read("jax_enable_x64")
    is_loading, loaded = threading.Event(), []

    class Manager:
        """Switches float64 on as TensorLy does, and takes long enough for the others to look at the flag."""

        @staticmethod
        def load_backend(name: str) -> Any:
            jax.config.update("jax_enable_x64", True)
            is_loading.set()
            time.sleep(0.05)
            loaded.append(name)
            return loaded

    monkeypatch.setattr("mumoe_tensor.backend._manager", lambda: Manager)
    monkeypatch.setattr("mumoe_tensor.backend._loaded", {})
    jax.config.update("jax_enable_x64", False)
    try:
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(load_backend, "jax")
            assert is_loading.wait(timeout=60)
            others = [pool.submit(load_backend, "jax") for _ in range(7)]
            assert all(thread.result(timeout=60) is first.result(timeout=60) for thread in others)
        assert not jax.config.read("jax_enable_x64") and loaded == ["jax"]
    finally:
        jax.config.update("jax_enable_x64", before)


def test_jax_that_is_loaded_within_float64_leaves_it_off_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    monkeypatch.setattr("mumoe_tensor.backend._loaded", {})
    before = jax.config.read("jax_enable_x64")
    try:
        with jax.enable_x64(True):
            load_backend("jax")
        assert jax.config.read("jax_enable_x64") == before
    finally:
        jax.config.update("jax_enable_x64", before)


def test_jax_gives_float32_where_float64_is_not_enabled() -> None:
    jax = pytest.importorskip("jax")
    assert not jax.config.read("jax_enable_x64")
    weight, z, coefficients = example("tr", "jax", "float32")
    assert dtype_name(mt.multilinear_moe(weight, z, coefficients, bias=True)) == "float32"


# ---- PyTorch -------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("format", FORMATS)
def test_meta_tensors_give_meta_tensors(format: str) -> None:
    weight, z, coefficients = example(format, "pytorch", "bfloat16")
    factors = [None if f is None else f.to("meta") for f in weight.factors]
    moved = mt.FactorizedTensor(weight.format, factors)
    for leading in ((), (2, 3), (0,)):
        z, *coefficients = (x.new_empty((*leading, x.shape[-1]), device="meta") for x in (z, *coefficients))
        y = mt.multilinear_moe(moved, z, coefficients, bias=True)
        assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", z.dtype, (*leading, 8))
    for result in (mt.to_dense(moved), *mt.expert_matrix(moved, (1, 2), bias=True)):
        assert (result.device.type, result.dtype) == ("meta", z.dtype)
    drawn = mt.FactorizedTensor.random(weight.format, rank=weight.rank, bias=True, like=z, **SIZES)
    assert {f.device.type for f in drawn.arrays} == {"meta"}


@needs_torch
@pytest.mark.parametrize("format", FORMATS)
def test_fake_cuda_tensors_stay_on_their_device(format: str) -> None:
    import torch
    from torch._subclasses import FakeTensorMode

    # Forward only: a backward pass under fake cuda tensors aborts the process on a CPU build.
    weight, z, coefficients = example(format, "pytorch", "float16", bias=True)
    with FakeTensorMode(), torch.no_grad():
        device = torch.device("cuda", 0)
        arrays = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in (z, *coefficients)]
        factors = [
            None if f is None else torch.empty(f.shape, dtype=f.dtype, device=device) for f in weight.factors
        ]
        fake = mt.FactorizedTensor(weight.format, factors)
        for implementation in ("factorized", "reconstructed"):
            y = mt.multilinear_moe(fake, arrays[0], arrays[1:], bias=True, implementation=implementation)
            assert (y.device, y.dtype, tuple(y.shape)) == (device, z.dtype, (7, 8))
        assert mt.to_dense(fake).device == device
        assert {x.device for x in mt.expert_matrix(fake, (0, 1), bias=True)} == {device}
        drawn = mt.FactorizedTensor.random(
            weight.format, rank=weight.rank, bias=True, like=arrays[0], **SIZES
        )
        assert {f.device for f in drawn.arrays} == {device}


@needs_torch
def test_parameters_keep_their_gradients() -> None:
    import torch

    weight, z, coefficients = example("tucker", "pytorch")
    parameters = [torch.nn.Parameter(f) for f in weight.arrays]
    mt.multilinear_moe(mt.FactorizedTensor("tucker", parameters), z, coefficients, bias=True).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def torch_loss(format: mt.Format, coefficients: list[Any]) -> Callable[..., Any]:
    def loss(factors: tuple[Any, ...], z: Any) -> Any:
        return (
            mt.multilinear_moe(mt.FactorizedTensor(format, factors), z, coefficients, bias=True).tanh().sum()
        )

    return loss


@needs_torch
@pytest.mark.parametrize("format", FORMATS)
def test_torch_func_grad(format: str) -> None:
    import torch

    weight, z, coefficients = example(format, "pytorch")
    loss = torch_loss(weight.format, coefficients)
    gradients = torch.func.grad(loss, argnums=(0, 1))(weight.arrays, z)
    leaves = [x.clone().requires_grad_() for x in (*weight.arrays, z)]
    expected = torch.autograd.grad(loss(tuple(leaves[:-1]), leaves[-1]), leaves)
    for ours, theirs in zip((*gradients[0], gradients[1]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@needs_torch
@pytest.mark.parametrize("format", FORMATS)
def test_torch_func_vmap(format: str) -> None:
    import torch

    weight, z, coefficients = example(format, "pytorch", leading=(3, 7))
    whole = mt.multilinear_moe(weight, z, coefficients, bias=True)

    def forward(factors: tuple[Any, ...], z: Any, *coefficients: Any) -> Any:
        return mt.multilinear_moe(
            mt.FactorizedTensor(weight.format, factors), z, list(coefficients), bias=True
        )

    over_inputs = torch.func.vmap(forward, in_dims=(None, 0, 0, 0))(weight.arrays, z, *coefficients)
    torch.testing.assert_close(over_inputs, whole, rtol=1e-12, atol=1e-12)
    stacked = tuple(torch.stack([f, 2 * f, 3 * f]) for f in weight.arrays)
    over_weights = torch.func.vmap(forward, in_dims=(0, None, None, None))(stacked, z, *coefficients)
    for k in range(3):
        alone = forward(tuple(f[k] for f in stacked), z, *coefficients)
        torch.testing.assert_close(over_weights[k], alone, rtol=1e-10, atol=1e-10)


@needs_torch
@pytest.mark.parametrize("format", FORMATS)
def test_torch_func_jacrev_is_the_mixed_matrix(format: str) -> None:
    import torch

    weight, z, coefficients = example(format, "pytorch", leading=())

    def forward(z: Any) -> Any:
        return mt.multilinear_moe(weight, z, coefficients, bias=True)

    mixed = torch.einsum("a,b,abio->oi", *coefficients, mt.to_dense(weight)[..., :-1, :])
    torch.testing.assert_close(torch.func.jacrev(forward)(z), mixed, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.func.jacfwd(forward)(z), mixed, rtol=1e-10, atol=1e-10)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    yield torch
    torch._dynamo.reset()


@pytest.mark.parametrize("format", DISTINCT)
def test_torch_compile_in_one_graph_for_all_batches(format: str, dynamo: Any) -> None:
    value = example(format, "pytorch", leading=())[0].format  # that of a weight with a bias: a sum, if split

    def forward(factors: tuple[Any, ...], z: Any, *coefficients: Any) -> Any:
        return mt.multilinear_moe(mt.FactorizedTensor(value, factors), z, list(coefficients), bias=True)

    compiled = dynamo.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo._dynamo.config.patch(error_on_recompile=True):
        for batch in (11, 2, 64, 1000):  # the first is no other size: torch takes equal sizes for one
            weight, z, coefficients = example(format, "pytorch", leading=(batch,))
            y = compiled(weight.arrays, z, *coefficients)
            dynamo.testing.assert_close(
                y, mt.multilinear_moe(weight, z, coefficients, bias=True), rtol=1e-10, atol=1e-10
            )


@needs_torch
@pytest.mark.parametrize("format", ["cp", "tr"])
def test_torch_compile_with_gradients(format: str, dynamo: Any) -> None:
    def loss(factors: tuple[Any, ...], z: Any, *coefficients: Any) -> Any:
        weight = mt.FactorizedTensor(format, factors)
        return mt.multilinear_moe(weight, z, list(coefficients), bias=True).tanh().sum()

    compiled = dynamo.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo._dynamo.config.patch(error_on_recompile=True):
        for leading in ((11, 13), (2, 9), (4, 4)):
            weight, z, coefficients = example(format, "pytorch", leading=leading)
            leaves = [x.requires_grad_() for x in (*weight.arrays, z, *coefficients)]
            count = len(weight.arrays)
            gradients = dynamo.autograd.grad(compiled(tuple(leaves[:count]), *leaves[count:]), leaves)
            expected = dynamo.autograd.grad(loss(tuple(leaves[:count]), *leaves[count:]), leaves)
            for ours, theirs in zip(gradients, expected, strict=True):
                dynamo.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_torch_compile_with_inductor(dynamo: Any) -> None:
    """The default compiler once, which takes seconds: fixed sizes, no graph break."""
    weight, z, coefficients = example("tr", "pytorch", "float32")
    compiled = dynamo.compile(
        lambda z, a, b: mt.multilinear_moe(weight, z, [a, b], bias=True), fullgraph=True
    )
    y = compiled(z, *coefficients)
    expected = mt.multilinear_moe(weight, z, coefficients, bias=True)
    assert_close(y, expected, magnitude(weight, z, coefficients, bias=True), "the compiled result")


# ---- JAX -----------------------------------------------------------------------------------------------


@needs_jax
@pytest.mark.parametrize("format", DISTINCT)
def test_jax_transforms_over_weights_and_inputs(format: str, jax_x64: None) -> None:
    import jax
    import jax.numpy as jnp

    import mumoe_tensor.jax

    assert mumoe_tensor.jax.__doc__
    weight, z, coefficients = example(format, "jax")
    forward = jax.jit(lambda weight, z, a: mt.multilinear_moe(weight, z, a, bias=True))
    y = forward(weight, z, coefficients)
    scale = magnitude(weight, z, coefficients, bias=True)
    tensor = dense_weight(weight)
    expected = np.einsum("nio,ni->no", np.einsum("na,nb,abio->nio", *coefficients, tensor), with_one(z))
    assert_close(y, expected, scale)

    def loss(weight: mt.FactorizedTensor, z: Any, a: list[Any]) -> Any:
        return jnp.tanh(mt.multilinear_moe(weight, z, a, bias=True)).sum()

    loss = jax.jit(loss)
    gradient, of_z, of_a = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(weight, z, coefficients)
    assert isinstance(gradient, mt.FactorizedTensor)
    assert (gradient.format, gradient.shape, gradient.rank) == (weight.format, weight.shape, weight.rank)
    assert gradient.missing == weight.missing

    # The slope along a direction is that of finite differences.
    step = 1e-6
    plus, minus = (
        loss(
            jax.tree.map(lambda x, s=s: x * (1 + s), weight), z * (1 + s), [a * (1 + s) for a in coefficients]
        )
        for s in (step, -step)
    )
    pairs = zip(
        jax.tree.leaves((gradient, of_z, of_a)), jax.tree.leaves((weight, z, coefficients)), strict=True
    )
    slope = sum((g * x).sum() for g, x in pairs)
    np.testing.assert_allclose((plus - minus) / (2 * step), slope, rtol=1e-6, atol=1e-6)

    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), weight)
    over_weights = jax.jit(jax.vmap(forward, in_axes=(0, None, None)))(stacked, z, coefficients)
    assert_close(over_weights[0], expected, scale)
    twice = jax.tree.map(lambda x: 2 * x, weight)
    assert_close(
        over_weights[1], forward(twice, z, coefficients), magnitude(twice, z, coefficients, bias=True)
    )
    over_inputs = jax.vmap(forward, in_axes=(None, 0, 0))(weight, z, coefficients)
    assert_close(over_inputs, expected, scale)


def with_one(z: Any) -> np.ndarray:
    return np.concatenate([to_numpy(z), np.ones((*z.shape[:-1], 1))], axis=-1)


@needs_jax
def test_jax_tree_of_a_weight() -> None:
    import jax

    import mumoe_tensor.jax  # noqa: F401

    weight, *_ = example("cp", "jax", "float32")
    leaves, tree = jax.tree.flatten(weight)
    assert len(leaves) == 4  # the weights of one are no leaf
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, mt.FactorizedTensor)
    assert (again.format, again.shape, again.missing) == (weight.format, weight.shape, (0,))
    assert jax.tree.structure(weight) == jax.tree.structure(again)
    placeholders = jax.tree.unflatten(tree, [None, "x", 3, object()])  # JAX builds such trees itself
    assert isinstance(placeholders, mt.FactorizedTensor)


# ---- no global is touched ------------------------------------------------------------------------------


def settings_of_everything() -> dict[str, Any]:
    """Every global that a call could have changed, as seen from this thread and from a fresh one."""
    import tensorly as tl

    seen: dict[str, Any] = {"tensorly": tl.get_backend()}
    with ThreadPoolExecutor(1) as pool:
        seen["tensorly in a fresh thread"] = pool.submit(tl.get_backend).result()
    if "jax" in HERE:
        import jax

        seen["x64"] = jax.config.read("jax_enable_x64")
    # After JAX: its import draws from NumPy's generator.
    seen["numpy"] = np.random.get_state()[1].tolist()
    if "pytorch" in HERE:
        import torch

        seen["torch"] = torch.get_rng_state().tolist()
        seen["torch dtype"] = torch.get_default_dtype()
        seen["torch grad"] = torch.is_grad_enabled()
    return seen


def every_public_call(backend: str, dtype: str = "float32") -> None:
    """Call everything that is public on arrays of a backend."""
    for format in ("cp", "tr") if backend == "jax" else mt.formats():  # JAX compiles each operation
        weight, z, coefficients = example(format, backend, dtype)
        like = {"rank": weight.rank, "bias": True, **SIZES}
        plan = mt.plan(format, **like)
        mt.plan(format, implementation="auto", minimize="peak", fold_weights=True, dtype="float32", **like)
        mt.cost(format, gate=True, **like)
        mt.multilinear_moe(weight, z, coefficients, bias=True)
        mt.multilinear_moe(weight, z, coefficients, bias=True, plan=plan)
        mt.multilinear_moe(mt.to_dense(weight), z, coefficients, bias=True)
        mt.bind(plan, weight, bias=True)(z, coefficients)
        mt.expert_matrix(weight, (1, 2), bias=True)
        mt.FactorizedTensor.random(format, like=z, **like)
        if format in WITH_CONTAINER:
            container = weight.to_tensorly()
            mt.multilinear_moe(container, z, coefficients, bias=True)
        if weight.format.container:
            mt.FactorizedTensor.from_tensorly(container)
    for gate in ("entmax15", "sparsemax", "softmax"):
        if hasattr(mt, gate):
            getattr(mt, gate)(z)
    if hasattr(mt, "top_k"):
        mt.top_k(z, 2)
    if hasattr(mt, "decompose"):
        mt.decompose(mt.to_dense(weight), "tt", (2, 2, 2))


@pytest.mark.parametrize("backend", HERE)
def test_no_public_call_changes_a_setting_of_its_user(backend: str) -> None:
    """Where nothing is loaded yet, with another backend than TensorLy's default, and in a thread."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tensorly as tl
tl.set_backend("numpy" if {backend!r} == "pytorch" else {("pytorch" if "pytorch" in HERE else "numpy")!r})
import test_backends
def check():
    before = test_backends.settings_of_everything()
    test_backends.every_public_call({backend!r})
    after = test_backends.settings_of_everything()
    assert before == after, [key for key in before if before[key] != after[key]]
check()
thread = threading.Thread(target=check)
failed = []
threading.excepthook = failed.append
thread.start(); thread.join()
assert not failed, failed
"""
    run_python(code)


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_torch
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("current", HERE)
def test_result_does_not_depend_on_tensorlys_backend(current: str, backend: str) -> None:
    weight, z, coefficients = example("tucker", backend, "float32")
    expected = to_numpy(mt.multilinear_moe(weight, z, coefficients, bias=True))
    with tensorly_backend(current):
        y = mt.multilinear_moe(weight, z, coefficients, bias=True)
        again = mt.multilinear_moe(weight.to_tensorly(), z, coefficients, bias=True)
    assert type(y) is type(z)
    np.testing.assert_array_equal(to_numpy(y), expected)
    np.testing.assert_array_equal(to_numpy(again), expected)


@needs_torch
def test_two_threads_with_two_backends_agree() -> None:
    import tensorly as tl

    before = tl.get_backend()
    barrier = threading.Barrier(2)
    results: dict[str, list[np.ndarray]] = {}

    def work(current: str) -> None:
        tl.set_backend(current, local_threadsafe=True)
        arrays = []
        for format in FORMATS:
            for backend in ("numpy", "pytorch"):
                barrier.wait(timeout=60)
                weight, z, coefficients = example(format, backend)
                arrays.append(to_numpy(mt.multilinear_moe(weight, z, coefficients, bias=True)))
                if format in WITH_CONTAINER:
                    arrays.append(to_numpy(mt.to_dense(weight.to_tensorly())))
                assert tl.get_backend() == current
        results[current] = arrays

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, name) for name in ("numpy", "pytorch")]:
            done.result()
    assert tl.get_backend() == before
    assert len(results["numpy"]) == 2 * (len(FORMATS) + len(WITH_CONTAINER))
    for mine, theirs in zip(results["numpy"], results["pytorch"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_error_puts_tensorlys_backend_back() -> None:
    import tensorly as tl

    before = tl.get_backend()
    with pytest.raises(RuntimeError), tensorly_backend("pytorch" if "pytorch" in HERE else "numpy"):
        raise RuntimeError
    assert tl.get_backend() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tl.get_backend).result() == before


# ---- what is imported ----------------------------------------------------------------------------------


def test_import_is_light() -> None:
    loaded = run_python("import sys, mumoe_tensor; print(*sys.modules)").split()
    assert "mumoe_tensor" in loaded
    assert not {"torch", "jax", "jaxlib", "tensorly", "scipy", "hypothesis", "matplotlib"} & set(loaded)


@needs_torch
def test_numpy_needs_neither_torch_nor_jax() -> None:
    loaded = run_python(
        "import sys, numpy as np, mumoe_tensor as mt\n"
        "mt.multilinear_moe(np.ones((4, 3, 2)), np.ones((5, 3)), [np.ones((5, 4))])\n"
        "print(*sys.modules)"
    ).split()
    assert not {"torch", "jax"} & set(loaded)


ARRAY_LIBRARIES = {"numpy", "torch", "jax", "jaxlib", "scipy", "tensorly"}
WITHOUT_ARRAYS = [*sorted((PACKAGE / "formats").glob("*.py")), PACKAGE / "contraction" / "plan.py"]


def imported(tree: ast.AST) -> set[str]:
    """Packages that a piece of code imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("file", WITHOUT_ARRAYS, ids=lambda file: file.stem)
def test_no_array_library_is_imported(file: Path) -> None:
    """A method that calls TensorLy's own functions imports it, and NumPy, when it is called."""
    tree = ast.parse(file.read_text())
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = set().union(*map(imported, methods)) if methods else set()
    top = ast.Module([n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))], [])
    assert not imported(top) & ARRAY_LIBRARIES
    assert inside & ARRAY_LIBRARIES <= ({"numpy", "tensorly"} if file.parent.name == "formats" else set())


def test_only_backend_knows_torch_and_jax() -> None:
    allowed = {"backend.py", "jax.py", "calls.py"}
    rooms = {"nn", "replace", "training", "models", "analysis", "testing", "measure", "study", "browser"}
    rooms |= {"experiments"}
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if inside.name not in allowed and inside.parts[0] not in rooms:
            assert not imported(ast.parse(file.read_text())) & {"torch", "jax", "jaxlib"}, inside


def test_no_format_is_named_outside_its_file() -> None:
    """No `if format == …` anywhere: nothing but the formats' own files compares with a format's name."""
    names = set(mt.formats())
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & names
                assert not compared, f"{file}:{node.lineno} compares with {compared}"
