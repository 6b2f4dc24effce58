"""The backend of an array. No other module distinguishes between NumPy, PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple

from mumoe_tensor.compiling import constant_under_compile

#: Arrays of NumPy, PyTorch and JAX have no common type and differ in most methods.
Array = Any

#: Package of an array class -> name of TensorLy's backend.
_BACKENDS = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "jaxlib": "jax"}
_ARRAY_CLASSES = {"ndarray", "Tensor", "ArrayImpl", "Tracer"}
#: Subclasses whose operations have a different meaning: results would be wrong.
_REFUSED_CLASSES = {"MaskedArray", "matrix", "MaskedTensor", "NestedTensor"}
#: Names of the floating dtypes in native byte order.
_FLOATING = {"float16", "bfloat16", "float32", "float64", "float96", "float128"}


# Dictionaries instead of lru_cache, which torch.compile traces through with a warning.
_names: dict[type, str | None] = {}
_loaded: dict[str, Any] = {}
_loading = RLock()


@constant_under_compile
def _backend_name(cls: type) -> str | None:
    if cls not in _names:
        arrays = [base for base in cls.__mro__ if base.__name__ in _ARRAY_CLASSES]
        is_refused = any(base.__name__ in _REFUSED_CLASSES for base in cls.__mro__)
        is_array = bool(arrays) and not is_refused
        _names[cls] = _BACKENDS.get(arrays[0].__module__.partition(".")[0]) if is_array else None
    return _names[cls]


def load_backend(name: str) -> Any:
    """Load TensorLy's backend `name` without making it the current one.

    Loading the JAX backend switches ``jax_enable_x64`` on for the whole process; this function restores the
    flag.
    """
    _ensure_loaded(name)
    return _loaded[name]


@constant_under_compile
def _ensure_loaded(name: str) -> None:
    if name in _loaded:
        return
    # One thread at a time: a second thread would read the flag after JAX's backend has switched it on.
    with _loading:
        if name not in _loaded:
            _loaded[name] = _load_jax() if name == "jax" else _manager().load_backend(name)


def _manager() -> Any:
    # Imported only when needed: importing TensorLy takes most of a second.
    from tensorly.backend import BackendManager

    return BackendManager


def _load_jax() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    import jax

    # A new thread reads the process-wide flag; this thread may be inside ``with jax.enable_x64(...)``.
    with ThreadPoolExecutor(1) as thread:
        x64 = thread.submit(jax.config.read, "jax_enable_x64").result()
    try:
        return _manager().load_backend("jax")
    finally:
        jax.config.update("jax_enable_x64", x64)


def is_array(value: Any) -> bool:
    """Whether `value` is an array of a supported backend."""
    return _backend_name(type(value)) is not None


class Operations(NamedTuple):
    """Backend operations of a contraction besides ``*``, ``@`` and ``reshape``, under torch's names."""

    permute: Callable[[Array, tuple[int, ...]], Array]
    select: Callable[[Array, int, int], Array]
    narrow: Callable[[Array, int, int, int], Array]
    addmm: Callable[[Array, Array, Array], Array]
    baddbmm: Callable[[Array, Array, Array], Array]
    #: Add zeros before and after the entries along an axis.
    pad: Callable[[Array, int, int, int], Array]
    expand: Callable[[Array, tuple[int, ...]], Array]


def _pad(array: Array, axis: int, before: int, after: int) -> Array:
    widths = [(before, after) if k == axis else (0, 0) for k in range(array.ndim)]
    return array.__array_namespace__().pad(array, widths)


#: The operations of NumPy and JAX.
_OPERATIONS = Operations(
    permute=lambda array, order: array.transpose(order),
    select=lambda array, axis, index: array[(*(slice(None),) * axis, index)],
    narrow=lambda array, axis, start, length: array[(*(slice(None),) * axis, slice(start, start + length))],
    addmm=lambda row, left, right: row + left @ right,
    baddbmm=lambda row, left, right: row + left @ right,
    pad=_pad,
    expand=lambda array, shape: array.__array_namespace__().broadcast_to(array, shape),
)


def operations_of(array: Array) -> Operations:
    """The operations of an array's backend."""
    if _backend_name(type(array)) != "pytorch":
        return _OPERATIONS
    import torch

    def pad(array: Array, axis: int, before: int, after: int) -> Array:
        return torch.nn.functional.pad(array, (0, 0) * (array.ndim - 1 - axis) + (before, after))

    return Operations(
        torch.permute, torch.select, torch.narrow, torch.addmm, torch.baddbmm, pad, torch.Tensor.expand
    )


def backend_of(*arrays: Array) -> Any:
    """TensorLy's backend object for these arrays.

    The arrays must belong to one backend. Masked arrays, `numpy.matrix`, nested and sparse tensors raise a
    TypeError.
    """
    first = _backend_name(type(arrays[0]))
    for array in arrays:
        name = _backend_name(type(array))
        if name is None:
            raise TypeError(f"arrays must be plain NumPy, PyTorch or JAX arrays, got {type(array).__name__}.")
        if name != first:
            raise TypeError(f"all arrays must belong to one backend, got {first} and {name}.")
    assert first is not None
    if first == "pytorch":
        from mumoe_tensor.calls import check_dense

        for tensor in arrays:
            check_dense(tensor)
    return load_backend(first)


def is_traced(array: Array) -> bool:
    """Whether the array is a tensor and torch is tracing the current call."""
    if _backend_name(type(array)) != "pytorch":
        return False
    from mumoe_tensor.calls import is_recorded

    return is_recorded()


def device_kind(array: Array) -> str:
    """The type of the device of an array: ``"cpu"``, ``"cuda"``, ..."""
    name = _backend_name(type(array))
    if name == "pytorch":
        return str(array.device.type)
    if name == "jax":  # a traced array has no device
        import jax

        return str(jax.default_backend())
    return "cpu"


def dtype_name(array: Array) -> str:
    """Name of the dtype without its package: ``"float32"``."""
    return str(array.dtype).rpartition(".")[2]


def check_floating(arrays: dict[str, Array]) -> Any:
    """Check that named arrays share one backend, one device and one floating dtype; return the backend."""
    values = list(arrays.values())
    backend = backend_of(*values)
    first = values[0]
    if any(a.dtype != first.dtype for a in values) or dtype_name(first) not in _FLOATING:
        listed = ", ".join(f"{name}: {dtype_name(a)}" for name, a in arrays.items())
        raise TypeError(
            "all arrays must have the same floating dtype, of at least 16 bits and in native byte order, "
            f"got {listed}."
        )
    if backend.backend_name == "pytorch" and any(a.device != first.device for a in values):
        listed = ", ".join(f"{name}: {a.device}" for name, a in arrays.items())
        raise TypeError(f"all tensors must be on one device, got {listed}.")
    return backend


def context_of(array: Array, tl: Any) -> dict[str, Any]:
    """Dtype and device of an array, as keyword arguments for the functions of its TensorLy backend."""
    return {key: value for key, value in tl.context(array).items() if key != "requires_grad"}


def stop_gradient(array: Array) -> Array:
    """The array, detached from automatic differentiation."""
    name = _backend_name(type(array))
    if name == "pytorch":
        return array.detach()
    if name == "jax":
        import jax

        return jax.lax.stop_gradient(array)
    return array


def kth_largest(array: Array, k: int) -> Array:
    """The k-th largest entry along the last axis, which keeps size 1. Much faster than sorting."""
    name = _backend_name(type(array))
    if name == "pytorch":
        return array.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    if name == "jax":
        import jax

        return jax.lax.top_k(array, k)[0][..., -1:]
    import numpy as np

    place = array.shape[-1] - k
    return np.partition(array, place, axis=-1)[..., place : place + 1]


def to_float64(array: Array) -> Any:
    """Copy an array to NumPy float64. NumPy has no bfloat16, so half precision goes through float32."""
    import numpy as np

    array = stop_gradient(cast(array, "float32") if array.dtype.itemsize < 4 else array)
    return np.array(backend_of(array).to_numpy(array), dtype=np.float64, order="C")


def cast(array: Array, dtype: str) -> Array:
    """Cast an array to the dtype with this name; return the array itself if it already has this dtype."""
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

    TensorLy's ``backend_context`` changes the default of every thread when it exits. This context manager
    restores both the global setting and the thread's setting.
    """
    backend = load_backend(name)
    local = _manager()._THREAD_LOCAL_DATA
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
