"""What a machine does in a second: what plans weigh, and predicted times are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mumoe_tensor.checks import as_finite, as_integer, check_choice

#: Bytes of an element.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Machine:
    """A device computing in one dtype.

    Parameters
    ----------
    flops : float
        FLOPs a second of matrix products, multiply and add counted apart.
    bandwidth : float
        Bytes a second that are read or written.
    launch : float, default 0
        Seconds that an operation takes besides: on a GPU the launch of its kernel, on a CPU the call of it.
    dtype : {"float64", "float32", "bfloat16", "float16"}, default "float32"
    element : int, default 0
        FLOPs that an element read or written is worth where orders of contraction are compared; 0 for those
        done while its bytes are moved.
    gate_passes : int, default 8
        How often the functions of a gate, norm and entmax15, read and write their logits, each time as an
        operation of its own.

    Raises
    ------
    ValueError, TypeError
        If a figure is not a positive number (`launch` and `element` may be 0), or the dtype is another.

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
        """Time of an operation by the roofline: that of its FLOPs or of its moves, and the launch."""
        moving = elements * ITEMSIZE[self.dtype] / self.bandwidth
        return max(flops / self.flops, moving) + self.launch


def _gpu(bandwidth: float, **flops: float) -> dict[str, Machine]:
    # Launches take some 4 us. One kernel makes coefficients of logits; the norm may be another.
    return {dtype: Machine(each, bandwidth, 4e-6, dtype, gate_passes=2) for dtype, each in flops.items()}


#: Machines by name and dtype.
MACHINES: dict[str, dict[str, Machine]] = {
    # One core of an Intel Xeon (Sapphire Rapids), by `python -m benchmarks.machine`. An element is worth
    # less than its bytes take: products read and write while they compute.
    "cpu": {
        "float64": Machine(80e9, 20e9, 1.2e-5, "float64", element=16, gate_passes=20),
        "float32": Machine(160e9, 20e9, 1.2e-5, "float32", element=16, gate_passes=25),
        "bfloat16": Machine(1000e9, 20e9, 1.2e-5, "bfloat16", gate_passes=43),
        "float16": Machine(140e9, 20e9, 1.2e-5, "float16", gate_passes=40),
    },
    # NVIDIA A100 SXM 80 GB, by its data sheet; it stands for all GPUs.
    "cuda": _gpu(2.039e12, float64=19.5e12, float32=19.5e12, bfloat16=312e12, float16=312e12),
    # NVIDIA H200: products in bfloat16 and copies as measured, products in other dtypes by its data sheet
    # (float16 as bfloat16).
    "h200": _gpu(4.3e12, float64=67e12, float32=67e12, bfloat16=790e12, float16=790e12),
}

#: What is planned for where nothing else is named.
CPU = MACHINES["cpu"]["float32"]

_NEEDED = {"flops", "bandwidth"}
#: A machine, its attributes in a mapping, or a name in `MACHINES`.
AnyMachine = str | Machine | Mapping[str, Any]


def as_machine(machine: AnyMachine, dtype: str | None = None) -> Machine:
    """The machine of a name for a dtype, by default float32; others as they are.

    Raises
    ------
    ValueError
        If there is no machine of this name; if a machine computes in another dtype than the one named.
    TypeError
        If it is neither a name nor a machine nor the attributes of one.
    """
    check_choice(dtype, (None, *ITEMSIZE), "dtype")
    if isinstance(machine, str):
        return MACHINES[check_choice(machine, MACHINES, "machine")][dtype or "float32"]
    if isinstance(machine, Mapping):
        names = {f.name for f in fields(Machine)}
        if not _NEEDED <= machine.keys() <= names:
            more = ", ".join(sorted(names - _NEEDED))
            raise TypeError(
                f"a machine must have flops and bandwidth, and may have {more}; got {dict(machine)}."
            )
        machine = Machine(**machine)
    if not isinstance(machine, Machine):
        raise TypeError(f"a machine must be a name, a Machine or its attributes, got {machine!r}.")
    if dtype not in (None, machine.dtype):
        raise ValueError(f"dtype must be that of the machine, {machine.dtype!r}, got {dtype!r}.")
    return machine


def machine_of(kind: str, dtype: str, chosen: AnyMachine | None = None) -> Machine:
    """The machine to plan for where arrays have a dtype and are on a kind of device, as torch names it.

    Every accelerator is planned for as CUDA is. A machine that is chosen comes first, whatever its dtype.
    """
    if chosen is None:
        chosen = "cpu" if kind in ("cpu", "meta") else "cuda"
    return as_machine(chosen, dtype if isinstance(chosen, str) and dtype in ITEMSIZE else None)


def machine_entry(machine: AnyMachine) -> str | dict[str, Any]:
    """A machine as JSON has it, and as `as_machine` reads it: its name or its attributes."""
    read = as_machine(machine)
    return str(machine) if isinstance(machine, str) else asdict(read)


def in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, name = (1e-6, "us") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1.0, "s")
    return f"{seconds / unit:,.3g} {name}"


def predicted(seconds: float, machine: Machine) -> str:
    """A predicted time, and what it is predicted for."""
    return f"predicted time {in_words(seconds)} at {machine}"
