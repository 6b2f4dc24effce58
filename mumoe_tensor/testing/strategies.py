"""Hypothesis strategies: formats, sizes, specs, weights, and complete problems on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mumoe_tensor.backend import Array
from mumoe_tensor.formats import Format, Sum, get_format, mode_names, shared, sliced, sum_of
from mumoe_tensor.formats import formats as registered
from mumoe_tensor.formats.base import MOST_LEVELS
from mumoe_tensor.formats.splits import is_default
from mumoe_tensor.multilinear import multilinear_moe
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.tensors import FactorizedTensor

#: TensorLy's name of each backend -> the package that it needs.
PACKAGES = {"numpy": "numpy", "pytorch": "torch", "jax": "jax"}
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Problem:
    """A weight with normally distributed factors, and inputs for it. Its `repr` is valid code.

    Attributes
    ----------
    layer : LayerSpec
        A single layer with its rank.
    missing : tuple of int
        Positions of the factors that are None.
    in_memory_order : tuple of int
        Positions of the factors that are stored in their declared memory order.
    leading : tuple of int
        Leading shape of the inputs.
    backend : {"numpy", "pytorch", "jax"}
    dtype : str
        Name of the dtype, such as ``"float32"``. JAX supports float64 only within `jax_float64`.
    seed : int
        Seed of the arrays, and of other random numbers in a check; see `generator`.
    """

    layer: LayerSpec
    missing: tuple[int, ...] = ()
    in_memory_order: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    backend: str = "numpy"
    dtype: str = "float64"
    seed: int = 0

    @cached_property
    def weight(self) -> FactorizedTensor:
        """The weight, of shape ``layer.mode_sizes``."""
        layer, format = self.layer, self.layer.weight_format
        generator = np.random.default_rng([self.seed, 2])
        factors: list[Array | None] = []
        declared = format.declaration(layer.num_levels)
        shapes = format.shapes(layer.mode_sizes, layer.full_rank)
        for k, (f, shape) in enumerate(zip(declared, shapes, strict=True)):
            order = f.memory_order if k in self.in_memory_order else f.indices
            size = dict(zip(f.indices, shape, strict=True))
            values = generator.standard_normal([size[x] for x in order])
            values = values.transpose([order.index(x) for x in f.indices])
            factors.append(None if k in self.missing else self.array(values))
        return FactorizedTensor(format, factors, layer.mode_sizes)

    @cached_property
    def z(self) -> Array:
        """Inputs of shape (..., I), without the bias row."""
        return self._vectors[0]

    @cached_property
    def coefficients(self) -> list[Array]:
        """One array of shape (..., Ne) per level."""
        return self._vectors[1:]

    @cached_property
    def _vectors(self) -> list[Array]:
        generator = np.random.default_rng(self.seed)
        sizes = (self.layer.in_features, *self.layer.experts)
        return [self.array(generator.standard_normal((*self.leading, n))) for n in sizes]

    def generator(self) -> np.random.Generator:
        """A random number generator with the same seed in every call, independent of the inputs."""
        return np.random.default_rng([self.seed, 1])

    def array(self, values: Any) -> Array:
        """Convert values to an array of this problem's backend and dtype."""
        return make_array(values, self.backend, self.dtype)

    def output(
        self, weight: Any = None, z: Array = None, coefficients: list[Array] | None = None, **options: Any
    ) -> Array:
        """Result of `multilinear_moe` for the weight and inputs of the problem, or for replacements.

        Parameters
        ----------
        weight : FactorizedTensor, optional
        z : array of shape (..., I), optional
        coefficients : sequence of array of shape (..., Ne), optional
        **options
            Further arguments of `multilinear_moe`.
        """
        return multilinear_moe(
            self.weight if weight is None else weight,
            self.z if z is None else z,
            self.coefficients if coefficients is None else coefficients,
            bias=self.layer.bias,
            **options,
        )


def make_array(values: Any, backend: str, dtype: str) -> Array:
    """Convert values to an array of a backend, keeping the memory order if the backend supports it."""
    values = np.asarray(values, np.float64)
    if backend == "pytorch":
        import torch

        return torch.from_numpy(values.copy("K")).to(getattr(torch, dtype))
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.asarray(values.astype(dtype))
    return values.astype(dtype)


@contextmanager
def jax_float64() -> Iterator[None]:
    """A context in which float64 is enabled in JAX, if JAX is installed."""
    if find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def formats() -> st.SearchStrategy[Format]:
    """Registered formats, and sometimes sums of two or three, some of them shared by all experts."""
    single = st.sampled_from([f for f in registered().values() if not isinstance(f, Sum)])
    term = single | single.map(shared)
    sums = st.lists(term, min_size=2, max_size=3).map(lambda terms: sum_of(*terms))
    every = st.sampled_from(list(registered().values()))
    return st.one_of(every, every, every, sums)


def fewest_levels(format: Format) -> int:
    """The smallest number of levels that a format supports: it must include the levels of its slices."""
    sliced_levels = [e for f, _ in format.summands(0) for e in range(MOST_LEVELS) if f.window(e)]
    return max((e + 1 for e in sliced_levels), default=0)


def fewest_experts(format: Format, num_levels: int) -> tuple[int, ...]:
    """The smallest number of experts per level that a format supports: one, or the end of the last slice."""
    windows = [[f.window(e) or (0, 1) for f, _ in format.summands(num_levels)] for e in range(num_levels)]
    return tuple(max(stop for _, stop in of_level) for of_level in windows)


def installed_backends() -> list[str]:
    """TensorLy's names of the backends that are installed: ``"numpy"``, ``"pytorch"``, ``"jax"``."""
    return [name for name, package in PACKAGES.items() if find_spec(package)]


def backends() -> st.SearchStrategy[str]:
    """TensorLy's names of the backends that are installed."""
    return st.sampled_from(installed_backends())


@st.composite
def dtypes(draw: Callable[..., Any], backend: str) -> str:
    """Floating dtypes of a backend: float64 on JAX only if enabled, half precision only on PyTorch."""
    names = ["float64", "float32"]
    if backend == "pytorch":
        names += ["bfloat16", "float16"]
    if backend == "jax":
        import jax

        names = names if jax.config.read("jax_enable_x64") else ["float32"]
    return draw(st.sampled_from(names))


def levels(most: int = 3, format: str | Format | None = None) -> st.SearchStrategy[int]:
    """Numbers of levels of experts, from zero.

    The largest number is drawn least often, since its networks are slow to plan.

    For a format, the numbers start from the smallest that it supports; see `fewest_levels`.
    """
    fewest = 0 if format is None else fewest_levels(get_format(format))
    most = max(most, fewest)
    return st.sampled_from([*range(fewest, most + 1), *range(fewest, most), *range(fewest, most)])


def sizes(most: int = 4) -> st.SearchStrategy[int]:
    """Sizes of a mode or a bond, at least one."""
    return st.integers(1, most)


def ranks(format: str | Format, num_levels: int, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Ranks of a format, with one size per bond, each at most `most`."""
    return st.tuples(*[sizes(most)] * len(get_format(format).bonds(num_levels)))


@st.composite
def specs(
    draw: Callable[..., Any],
    format: str | Format | None = None,
    num_levels: int | None = None,
    *,
    most: int = 4,
    bias: bool | None = None,
) -> LayerSpec:
    """Single layers with their rank. Arguments that are None are drawn.

    Parameters
    ----------
    format : str or Format, optional
        If None, some drawn formats also split the experts, and some terms of sums are slices.
    num_levels : int, optional
    most : int, default 4
        Maximum size of a mode or a bond.
    bias : bool, optional
    """
    num_levels = draw(levels(format=format)) if num_levels is None else num_levels
    declared = draw(formats()) if format is None else get_format(format)
    least = (*fewest_experts(declared, num_levels), 1, 1)
    bounds = zip(least, _most_sizes(declared, num_levels, most), strict=True)
    *experts, i, o = mode_sizes = tuple(draw(st.integers(n, max(n, largest))) for n, largest in bounds)
    declared = draw(variants(declared, mode_sizes, format is None))
    # The dense reference sums over all indices in one pass.
    most_rank = most if len(declared.bonds(num_levels)) < 5 else min(most, 2)
    return LayerSpec(
        declared,
        experts=experts,
        in_features=i,
        out_features=o,
        rank=draw(ranks(declared, num_levels, most_rank)),
        bias=declared.has_bias_term or (draw(st.booleans()) if bias is None else bias),
    )


@st.composite
def variants(
    draw: Callable[..., Any],
    format: Format,
    mode_sizes: tuple[int, ...],
    is_open: bool = False,
    is_term: bool = False,
) -> Format:
    """The format with random sizes of the parts of each split mode, some of them padded.

    `mode_sizes` are the sizes before splitting. With `is_open`, expert modes may also be split. With
    `is_term`, the result may also be a slice of the experts, as a term of a sum.
    """
    if isinstance(format, Sum):
        terms = [draw(variants(term, mode_sizes, is_open, is_open)) for term in format.formats]
        return format if terms == list(format.formats) else Sum(terms)
    names = mode_names(len(mode_sizes) - 2)
    counts = {mode: len(format.parts(mode)) for mode in names if format.parts(mode) != (mode,)}
    experts = [level for level, mode in enumerate(names[:-2]) if mode not in counts]
    if is_open and not format.omits and experts and draw(st.integers(0, 5)) == 0:
        level = draw(st.sampled_from(experts))
        experts.remove(level)  # a slice may not have such parts
        counts[names[level]] = draw(st.integers(1, 2))
    splits = {}
    for mode, size in zip(names, mode_sizes, strict=True):
        if mode in counts and isinstance(format.splits.get(mode, 0), int):
            parts = [draw(sizes(3)) for _ in range(counts[mode] - 1)]
            parts = draw(st.permutations([*parts, -(-size // prod(parts))]))
            if not is_default(size, tuple(parts)):
                splits[mode] = parts
            elif mode not in format.splits:
                splits[mode] = counts[mode]
    format = format.with_splits(splits) if splits else format
    if is_term and experts and not format.omits and draw(st.integers(0, 2)) == 0:
        level = draw(st.sampled_from(experts))
        start = draw(st.integers(0, mode_sizes[level] - 1))
        return sliced(format, start, draw(st.integers(start + 1, mode_sizes[level])), level)
    return format


def _most_sizes(format: Format, num_levels: int, most: int) -> list[int]:
    """Maximum size of each mode: `most`, or the product of the parts if a format has their sizes."""
    splits = [f.splits for f, _ in format.summands(num_levels)]
    given = [
        [prod(parts) for each in splits if isinstance(parts := each.get(mode), tuple)]
        for mode in mode_names(num_levels)
    ]
    return [min([most, *held]) for held in given]


def leading_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Leading shapes of inputs with up to three axes, some of size zero."""
    return st.lists(st.sampled_from([2, 1, 3, 0]), max_size=3).map(tuple)


@st.composite
def problems(
    draw: Callable[..., Any],
    format: str | Format | None = None,
    num_levels: int | None = None,
    *,
    leading: tuple[int, ...] | None = None,
    backend: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
) -> Problem:
    """Weights with inputs and coefficients. Arguments that are None are drawn.

    Optional factors are sometimes present, with entries other than one. Factors are stored in their declared
    memory order or in another.

    Parameters
    ----------
    format : str or Format, optional
    num_levels : int, optional
    leading : tuple of int, optional
        Leading shape of the inputs.
    backend : {"numpy", "pytorch", "jax"}, optional
    dtype : str, optional
    bias : bool, optional
    """
    num_levels = draw(levels(format=format)) if num_levels is None else num_levels
    backend = draw(backends()) if backend is None else backend
    layer = draw(specs(format, num_levels, most=4 if num_levels < 2 else 3, bias=bias))
    factors = layer.weight_format.declaration(num_levels)
    return Problem(
        layer,
        missing=tuple(k for k in layer.format.optional(num_levels) if draw(st.booleans())),
        in_memory_order=tuple(k for k in range(len(factors)) if draw(st.booleans())),
        leading=draw(leading_shapes()) if leading is None else leading,
        backend=backend,
        dtype=draw(dtypes(backend)) if dtype is None else dtype,
        seed=draw(SEEDS),
    )


def weights(
    format: str | Format | None = None,
    num_levels: int | None = None,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
) -> st.SearchStrategy[FactorizedTensor]:
    """The weights of `problems` with the same arguments."""
    drawn = problems(format, num_levels, leading=(), backend=backend, dtype=dtype, bias=bias)
    return drawn.map(lambda problem: problem.weight)
