"""Hypothesis strategies: formats, sizes, weights, and whole problems on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mumoe_tensor.backend import Array
from mumoe_tensor.formats import Format, get_format
from mumoe_tensor.formats import formats as registered
from mumoe_tensor.multilinear import multilinear_moe
from mumoe_tensor.tensors import FactorizedTensor

#: TensorLy's name of each backend -> the package it needs.
PACKAGES = {"numpy": "numpy", "pytorch": "torch", "jax": "jax"}
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Problem:
    """A weight with normal factors, and inputs for it. Its `repr` can be pasted back.

    Attributes
    ----------
    format : str or Format
    shape : tuple of int
        Shape (N1, ..., NE, I, O) of the weight; with `bias` the input mode has one row more than `z`.
    rank : tuple of int
    ones : tuple of int
        Positions of the factors that are None.
    stored : tuple of int
        Positions of the factors that lie in the memory order their declaration asks for.
    leading : tuple of int
        Leading shape of the inputs.
    bias : bool
    backend : {"numpy", "pytorch", "jax"}
    dtype : str
        Name of the dtype, ``"float32"``. JAX has float64 only within `jax_float64`.
    seed : int
        For the arrays, and for whatever else a check draws; see `generator`.
    """

    format: str | Format
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    ones: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    bias: bool = False
    backend: str = "numpy"
    dtype: str = "float64"
    seed: int = 0

    @cached_property
    def weight(self) -> FactorizedTensor:
        """The weight."""
        format, levels = get_format(self.format), len(self.shape) - 2
        size = format.sizes(self.shape, self.rank)
        generator = np.random.default_rng([self.seed, 2])
        factors: list[Array | None] = []
        for k, f in enumerate(format.declaration(levels)):
            order = f.storage if k in self.stored else f.indices
            values = generator.standard_normal([size[x] for x in order])
            values = values.transpose([order.index(x) for x in f.indices])
            factors.append(None if k in self.ones else self.array(values))
        return FactorizedTensor(format, factors)

    @cached_property
    def z(self) -> Array:
        """Inputs of shape (..., I), without the bias row."""
        return self._vectors[0]

    @cached_property
    def coefficients(self) -> list[Array]:
        """One array of shape (..., Ne) a level."""
        return self._vectors[1:]

    @cached_property
    def _vectors(self) -> list[Array]:
        generator = np.random.default_rng(self.seed)
        *experts, i, _ = self.shape
        return [self.array(generator.standard_normal((*self.leading, n))) for n in (i - self.bias, *experts)]

    def generator(self) -> np.random.Generator:
        """A generator of random numbers, the same at every call and not the one that drew the inputs."""
        return np.random.default_rng([self.seed, 1])

    def array(self, values: Any) -> Array:
        """Put values into an array of this problem's backend and dtype.

        Parameters
        ----------
        values : array_like
        """
        return make_array(values, self.backend, self.dtype)

    def output(
        self, weight: Any = None, z: Array = None, coefficients: list[Array] | None = None, **options: Any
    ) -> Array:
        """Result of `multilinear_moe`, with whatever is given in place of what the problem has.

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
            bias=self.bias,
            **options,
        )


def make_array(values: Any, backend: str, dtype: str) -> Array:
    """Put values into an array of a backend, keeping their memory order where the backend has one.

    Parameters
    ----------
    values : array_like
    backend : {"numpy", "pytorch", "jax"}
    dtype : str
    """
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
    """Within it JAX has float64, where JAX is installed; the setting is put back."""
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
    """Registered formats."""
    return st.sampled_from(list(registered().values()))


def installed_backends() -> list[str]:
    """TensorLy's names of the backends that are installed: ``"numpy"``, ``"pytorch"``, ``"jax"``."""
    return [name for name, package in PACKAGES.items() if find_spec(package)]


def backends() -> st.SearchStrategy[str]:
    """TensorLy's names of the backends that are installed."""
    return st.sampled_from(installed_backends())


@st.composite
def dtypes(draw: Callable, backend: str) -> str:
    """Floating dtypes of a backend: float64 on JAX only where it is enabled, 16 bits only on PyTorch."""
    names = ["float64", "float32"]
    if backend == "pytorch":
        names += ["bfloat16", "float16"]
    if backend == "jax":
        import jax

        names = names if jax.config.read("jax_enable_x64") else ["float32"]
    return draw(st.sampled_from(names))


def levels(most: int = 3) -> st.SearchStrategy[int]:
    """Numbers of levels of experts, none included; the most, which takes long to plan, is the rarest.

    Parameters
    ----------
    most : int, default 3
    """
    return st.sampled_from([*range(most + 1), *range(most), *range(most)])


_levels = levels  # where a parameter has that name


def sizes(most: int = 4) -> st.SearchStrategy[int]:
    """Sizes of a mode or a bond, one included.

    Parameters
    ----------
    most : int, default 4
    """
    return st.integers(1, most)


def ranks(format: str | Format, levels: int, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Ranks of a format: one size a bond.

    Parameters
    ----------
    format : str or Format
    levels : int
    most : int, default 3
        The largest size of a bond.
    """
    return st.tuples(*[sizes(most)] * len(get_format(format).bonds(levels)))


def leading_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Leading shapes of inputs: no axis, a few, and some of size zero."""
    return st.lists(st.sampled_from([2, 1, 3, 0]), max_size=3).map(tuple)


@st.composite
def problems(
    draw: Callable,
    format: str | Format | None = None,
    levels: int | None = None,
    *,
    leading: tuple[int, ...] | None = None,
    backend: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
) -> Problem:
    """Weights with inputs and coefficients for them; every parameter that is not given is drawn.

    A factor declared as a unit is now and then held, with entries other than one. Factors lie in the memory
    order the format asks for, or in any other.

    Parameters
    ----------
    format : str or Format, optional
    levels : int, optional
        Number of levels of experts.
    leading : tuple of int, optional
        Leading shape of the inputs.
    backend : {"numpy", "pytorch", "jax"}, optional
    dtype : str, optional
    bias : bool, optional
        With True the input mode has at least two rows, the last of which serves as the bias.
    """
    format = draw(formats()) if format is None else get_format(format)
    levels = draw(_levels()) if levels is None else levels
    bias = draw(st.booleans()) if bias is None else bias
    backend = draw(backends()) if backend is None else backend
    most = 4 if levels < 2 else 3
    *experts, i, o = (draw(sizes(most)) for _ in range(levels + 2))
    factors = format.declaration(levels)
    return Problem(
        format.name if registered().get(format.name) == format else format,
        shape=(*experts, i + bias, o),
        rank=draw(ranks(format, levels, most)),
        ones=tuple(k for k in format.units(levels) if draw(st.booleans())),
        stored=tuple(k for k in range(len(factors)) if draw(st.booleans())),
        leading=draw(leading_shapes()) if leading is None else leading,
        bias=bias,
        backend=backend,
        dtype=draw(dtypes(backend)) if dtype is None else dtype,
        seed=draw(SEEDS),
    )


def weights(
    format: str | Format | None = None,
    levels: int | None = None,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
) -> st.SearchStrategy[FactorizedTensor]:
    """Weights of `problems`.

    Parameters
    ----------
    format : str or Format, optional
    levels : int, optional
        Number of levels of experts.
    backend : {"numpy", "pytorch", "jax"}, optional
    dtype : str, optional
    bias : bool, optional
        With True the input mode has at least two rows, the last of which may serve as the bias.
    """
    drawn = problems(format, levels, leading=(), backend=backend, dtype=dtype, bias=bias)
    return drawn.map(lambda problem: problem.weight)
