"""The speed of a machine, used to choose plans and to predict times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mumoe_tensor.checks import as_finite, as_integer, check_choice

#: Bytes per element.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Machine:
    """A device computing in one dtype.

    Parameters
    ----------
    flops : float
        FLOPs per second of matrix products, counting multiplications and additions separately.
    bandwidth : float
        Bytes per second, read or written.
    launch : float, default 0
        Fixed time of an operation in seconds: the launch of a GPU kernel, or the call on a CPU.
    dtype : {"float64", "float32", "bfloat16", "float16"}, default "float32"
    element : int, default 0
        Cost in FLOPs of reading or writing an element, for comparing contraction orders. With 0, it is the
        number of FLOPs that take as long as moving an element.
    gate_passes : int, default 8
        Number of passes over the logits in the norm and entmax15 of a gate, each a separate operation.

    Raises
    ------
    ValueError, TypeError
        If a number is not positive (only `launch`, `element` and `gate_passes` may be 0), or the dtype is
        unknown.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> machine = mt.Machine(flops=300e12, bandwidth=2e12, launch=5e-6, dtype="bfloat16")
    >>> machine.element
    300
    >>> f"{1e6 * machine.seconds(flops=6e9, elements=1e6):.0f} microseconds"
    '25 microseconds'
    """

    flops: float
    bandwidth: float
    launch: float = 0.0
    dtype: str = "float32"
    element: int = 0
    gate_passes: int = 8

    def __post_init__(self) -> None:
        check_choice(self.dtype, ITEMSIZE, "dtype of a machine")
        for name in ("flops", "bandwidth", "launch"):
            value = as_finite(getattr(self, name), f"{name} of a machine")
            if value < 0 or (value == 0 and name != "launch"):
                least = "at least 0" if name == "launch" else "positive"
                raise ValueError(f"{name} of a machine must be {least}, got {value}.")
            object.__setattr__(self, name, value)
        for name in ("element", "gate_passes"):
            number = as_integer(getattr(self, name), f"{name} of a machine")
            if number < 0:
                raise ValueError(f"{name} of a machine must be at least 0, got {number}.")
            object.__setattr__(self, name, number)
        worth = round(ITEMSIZE[self.dtype] * self.flops / self.bandwidth)
        object.__setattr__(self, "element", self.element or max(worth, 1))

    def __str__(self) -> str:
        return f"{self.flops / 1e9:,.0f} GFLOP/s, {self.bandwidth / 1e9:,.0f} GB/s, {self.dtype}"

    def seconds(self, flops: float, elements: float) -> float:
        """Time of an operation by the roofline model: the longer of compute and transfer, plus the launch."""
        moving = elements * ITEMSIZE[self.dtype] / self.bandwidth
        return max(flops / self.flops, moving) + self.launch


def _gpu(bandwidth: float, **flops: float) -> dict[str, Machine]:
    # A launch takes about 4 us. One kernel computes coefficients from logits, and possibly another the norm.
    return {dtype: Machine(each, bandwidth, 4e-6, dtype, gate_passes=2) for dtype, each in flops.items()}


#: Machines by name and dtype.
MACHINES: dict[str, dict[str, Machine]] = {
    # One core of an Intel Xeon (Sapphire Rapids), measured by `python -m benchmarks.machine`. `element` is
    # smaller than its bytes suggest, because products compute while they read and write.
    "cpu": {
        "float64": Machine(80e9, 20e9, 1.2e-5, "float64", element=16, gate_passes=20),
        "float32": Machine(160e9, 20e9, 1.2e-5, "float32", element=16, gate_passes=25),
        "bfloat16": Machine(1000e9, 20e9, 1.2e-5, "bfloat16", gate_passes=43),
        "float16": Machine(140e9, 20e9, 1.2e-5, "float16", gate_passes=40),
    },
    # NVIDIA A100 SXM 80 GB, from its data sheet; used for all GPUs.
    "cuda": _gpu(2.039e12, float64=19.5e12, float32=19.5e12, bfloat16=312e12, float16=312e12),
    # NVIDIA H200: bandwidth and bfloat16 measured, other dtypes from its data sheet (float16 as bfloat16).
    "h200": _gpu(4.3e12, float64=67e12, float32=67e12, bfloat16=790e12, float16=790e12),
}

#: The default machine.
CPU = MACHINES["cpu"]["float32"]

_NEEDED = {"flops", "bandwidth"}
#: A machine, a mapping with its attributes, or a name in `MACHINES`.
AnyMachine = str | Machine | Mapping[str, Any]


def as_machine(machine: AnyMachine, dtype: str | None = None) -> Machine:
    """Convert a name (with a dtype, by default float32) or a mapping to a machine, or check a machine.

    Raises
    ------
    ValueError
        If there is no machine with this name, or the dtype of the machine is not `dtype`.
    TypeError
        If `machine` is neither a name, nor a `Machine`, nor a mapping with the attributes of one.
    """
    check_choice(dtype, (None, *ITEMSIZE), "dtype")
    if isinstance(machine, str):
        return MACHINES[check_choice(machine, MACHINES, "machine")][dtype or "float32"]
    if isinstance(machine, Mapping):
        names = {f.name for f in fields(Machine)}
        if not _NEEDED <= machine.keys() <= names:
            more = ", ".join(sorted(names - _NEEDED))
            raise TypeError(
                f"a machine must have flops and bandwidth, and may have {more}, got {dict(machine)}."
            )
        machine = Machine(**machine)
    if not isinstance(machine, Machine):
        raise TypeError(f"a machine must be a name, a Machine or its attributes, got {machine!r}.")
    if dtype not in (None, machine.dtype):
        raise ValueError(f"dtype must be that of the machine, {machine.dtype!r}, got {dtype!r}.")
    return machine


def machine_of(kind: str, dtype: str, chosen: AnyMachine | None = None) -> Machine:
    """The machine to plan for, given a dtype and a type of device in torch's notation.

    Plans for other accelerators use the CUDA machine. A machine in `chosen` takes precedence, whatever its
    dtype.
    """
    if chosen is None:
        chosen = "cpu" if kind in ("cpu", "meta") else "cuda"
    return as_machine(chosen, dtype if isinstance(chosen, str) and dtype in ITEMSIZE else None)


def machine_entry(machine: AnyMachine) -> str | dict[str, Any]:
    """Convert a machine to JSON types for `as_machine`: its name, or its attributes."""
    read = as_machine(machine)
    return str(machine) if isinstance(machine, str) else asdict(read)


def in_words(seconds: float) -> str:
    """Format a time with a suitable unit."""
    unit, name = (1e-6, "us") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1.0, "s")
    return f"{seconds / unit:,.3g} {name}"


def predicted(seconds: float, machine: Machine) -> str:
    """Format a predicted time together with its machine."""
    return f"predicted time {in_words(seconds)} at {machine}"
