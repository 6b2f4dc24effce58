"""Hypothesis strategies: formats, sizes, weights, and whole problems on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mumoe_tensor.backend import Array, backend_of, dtype_name
from mumoe_tensor.formats import Format, get_format
from mumoe_tensor.formats import formats as registered
from mumoe_tensor.multilinear import multilinear_moe
from mumoe_tensor.tensors import FactorizedTensor

#: TensorLy's name of each backend -> the package it needs.
PACKAGES = {"numpy": "numpy", "pytorch": "torch", "jax": "jax"}
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True, repr=False)
class Problem:
    """A weight and inputs for it.

    Attributes
    ----------
    weight : FactorizedTensor
    z : array
        Inputs of shape (..., I); the input mode of the weight has one row more with `bias`.
    coefficients : list of array
        One array a level.
    bias : bool
    seed : int
        For whatever else a check draws; see `generator`.
    """

    weight: FactorizedTensor
    z: Array
    coefficients: list[Array]
    bias: bool
    seed: int

    @property
    def backend(self) -> str:
        """TensorLy's name of the backend."""
        return str(backend_of(self.z).backend_name)

    @property
    def dtype(self) -> str:
        """Name of the dtype, ``"float32"``."""
        return dtype_name(self.z)

    @property
    def leading(self) -> tuple[int, ...]:
        """Leading shape of the inputs."""
        return tuple(self.z.shape[:-1])

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

    def __repr__(self) -> str:
        return f"Problem({self.weight!r}, leading={self.leading}, bias={self.bias}, seed={self.seed})"


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
def weights(
    draw: Callable,
    format: str | Format | None = None,
    levels: int | None = None,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
) -> FactorizedTensor:
    """Weights with normal factors; every parameter that is not given is drawn.

    A factor declared as a unit is now and then held, with entries other than one. Factors lie in the memory
    order the format asks for, or in any other.

    Parameters
    ----------
    format : str or Format, optional
    levels : int, optional
    backend : {"numpy", "pytorch", "jax"}, optional
    dtype : str, optional
    bias : bool, optional
        With True the input mode has at least two rows, the last of which may serve as the bias.
    """
    format = draw(formats()) if format is None else get_format(format)
    levels = draw(_levels()) if levels is None else levels
    backend = draw(backends()) if backend is None else backend
    dtype = draw(dtypes(backend)) if dtype is None else dtype
    bias = draw(st.booleans()) if bias is None else bias
    most = 4 if levels < 2 else 3
    *experts, i, o = (draw(sizes(most)) for _ in range(levels + 2))
    size = format.sizes((*experts, i + bias, o), draw(ranks(format, levels, most)))
    generator = np.random.default_rng(draw(SEEDS))
    factors: list[Array | None] = []
    for f in format.declaration(levels):
        if f.unit and draw(st.booleans()):
            factors.append(None)
            continue
        order = f.storage if draw(st.booleans()) else f.indices
        values = generator.standard_normal([size[x] for x in order])
        factors.append(make_array(values.transpose([order.index(x) for x in f.indices]), backend, dtype))
    return FactorizedTensor(format, factors)


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
    """
    bias = draw(st.booleans()) if bias is None else bias
    backend = draw(backends()) if backend is None else backend
    dtype = draw(dtypes(backend)) if dtype is None else dtype
    weight = draw(weights(format, levels, backend=backend, dtype=dtype, bias=bias))
    leading = draw(leading_shapes()) if leading is None else leading
    seed = draw(SEEDS)
    generator = np.random.default_rng(seed)
    *experts, i, _ = weight.shape
    z, *coefficients = (
        make_array(generator.standard_normal((*leading, n)), backend, dtype) for n in (i - bias, *experts)
    )
    return Problem(weight, z, coefficients, bias, seed)
