"""Which backend an array belongs to. The only place that knows NumPy, PyTorch and JAX apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

Array = Any

#: Package an array class comes from -> name of TensorLy's backend.
_BACKENDS = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "jaxlib": "jax"}
_ARRAY_CLASSES = {"ndarray", "Tensor", "ArrayImpl", "Tracer"}


@lru_cache(maxsize=256)
def _backend_name(cls: type) -> str | None:
    for base in cls.__mro__:
        if base.__name__ in _ARRAY_CLASSES:
            return _BACKENDS.get(base.__module__.partition(".")[0])
    return None


@lru_cache(maxsize=len(_BACKENDS))
def load_backend(name: str) -> Any:
    """Load TensorLy's backend `name` without making it the current one.

    Loading the JAX backend switches ``jax_enable_x64`` on for the whole process; the flag is put back.
    """
    from tensorly.backend import BackendManager

    if name != "jax":
        return BackendManager.load_backend(name)
    import jax

    x64 = jax.config.jax_enable_x64
    try:
        return BackendManager.load_backend(name)
    finally:
        jax.config.update("jax_enable_x64", x64)


def is_array(value: Any) -> bool:
    """Whether `value` is an array of a backend the library works on."""
    return _backend_name(type(value)) is not None


def backend_of(*arrays: Array) -> Any:
    """TensorLy's backend object for these arrays.

    Raises
    ------
    TypeError
        If one of them is no array, or they belong to different backends.
    """
    first = _backend_name(type(arrays[0]))
    for array in arrays:
        name = _backend_name(type(array))
        if name is None:
            raise TypeError(f"arrays must be NumPy, PyTorch or JAX arrays, got {type(array).__name__}.")
        if name != first:
            raise TypeError(f"all arrays must belong to one backend, got {first} and {name}.")
    assert first is not None
    return load_backend(first)


def dtype_name(array: Array) -> str:
    """Name of the dtype without its package: ``"float32"``."""
    return str(array.dtype).rpartition(".")[2]


def check_floating(arrays: dict[str, Array]) -> Any:
    """Check that named arrays share one backend, one device and one floating dtype; return the backend.

    Raises
    ------
    TypeError
        If they do not.
    """
    values = list(arrays.values())
    backend = backend_of(*values)
    first = values[0]
    if any(a.dtype != first.dtype for a in values) or "float" not in str(first.dtype):
        told = ", ".join(f"{name}: {dtype_name(a)}" for name, a in arrays.items())
        raise TypeError(f"all arrays must have one floating dtype, got {told}.")
    if backend.backend_name == "pytorch" and any(a.device != first.device for a in values):
        told = ", ".join(f"{name}: {a.device}" for name, a in arrays.items())
        raise TypeError(f"all tensors must be on one device, got {told}.")
    return backend


def stop_gradient(array: Array) -> Array:
    """The array's values without its history."""
    name = _backend_name(type(array))
    if name == "pytorch":
        return array.detach()
    if name == "jax":
        import jax

        return jax.lax.stop_gradient(array)
    return array


def add_product(bias: Array, left: Array, right: Array) -> Array:
    """``bias + left @ right``, in one pass over the result where the backend has one."""
    if left.ndim == 2 and _backend_name(type(left)) == "pytorch":
        import torch

        return torch.addmm(bias, left, right)
    return left @ right + bias


def cast(array: Array, dtype: str) -> Array:
    """The array in the dtype of this name; itself if it has it."""
    if dtype_name(array) == dtype:
        return array
    backend = backend_of(array)
    if backend.backend_name == "pytorch":
        import torch

        return array.to(getattr(torch, dtype))
    return array.astype(dtype)


@contextmanager
def tensorly_backend(name: str) -> Iterator[Any]:
    """Run TensorLy's own functions on a backend, in this thread only.

    TensorLy's ``backend_context`` leaves the backend it found as the default of every thread; this one
    leaves the global setting and the thread's own as they were.
    """
    from tensorly.backend import BackendManager

    backend = load_backend(name)
    local = BackendManager._THREAD_LOCAL_DATA
    missing = object()
    before = getattr(local, "backend", missing)
    local.backend = backend
    try:
        yield backend
    finally:
        if before is missing:
            del local.backend
        else:
            local.backend = before
