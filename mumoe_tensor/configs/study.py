"""The config of a study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mumoe_tensor.configs.kinds import Levels

#: Values of `data` that are not files.
DIGITS, NO_DATA = "digits", "none"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The settings of a study of a layer, which are also the options of ``mumoe-tensor study``.

    Attributes
    ----------
    weight : str or None
        Weight of an existing layer to fit the formats to, as FILE:NAME. The file is in the format of
        safetensors, NumPy or torch.save; a pattern such as 'layers.*.up_proj.weight' selects a stack of
        experts.
    transposed : bool
        Whether the weight is stored as in x out (Conv1D of GPT-2) instead of out x in (nn.Linear).
    inputs : str or None
        Inputs of that layer, one per row, as FILE:NAME. The formats are also fitted to its outputs for them.
    experts : tuple of tuple of int
        Numbers of experts, with one number per level, such as 256,64x64; none for a layer without experts. By
        default that of the layer or the stack. Batches are varied only for the first.
    formats : tuple of str
        Tensor formats, such as cp,tr, or a JSON list of their config entries; by default all.
    parameters : tuple of str
        Budgets: numbers of parameters, match for that of the dense layer, or multiples of it (0.5x). By
        default match,0.5x; with a weight 0.5x,0.25x,0.1x. Batches are varied only for the first.
    batch : int
        Inputs per forward pass and per training step.
    batches : tuple of int
        Further batches, forward only.
    devices : tuple of str
        Devices to measure on, such as cpu,cuda; by default all available.
    seconds : float
        Time after which a measurement stops, but not before its third round. A measurement of the forward
        pass alone has half of it.
    rounds : int
        Maximum number of rounds of a measurement.
    memory : float
        Memory in GiB. A layer that needs more is run with fewer dense experts or inputs, and its figures are
        extrapolated.
    top_k : int
        Active experts per input in the sparse mixture.
    machines : tuple of str
        Other machines to predict times for, such as cuda,h200.
    data : str
        Data to train heads on: digits, an .npz file with x and y, or none, which is the default with a
        weight.
    head_hidden : int
        Hidden size of the heads; 0 for linear ones.
    head_formats : tuple of str
        Formats of the heads. By default the formats of the layer; if the layer has all formats, those that
        split no sizes and have one term.
    head_experts : tuple of tuple of int
        Numbers of experts of the heads.
    head_parameters : tuple of str
        Budgets of the heads.
    seeds : int
        Training runs of each head.
    epochs : int
        Passes over the data in a training run.
    learning_rate : float
        Peak learning rate of a training run.
    batch_size : int
        Rows per step of a training run; all rows if there are fewer than 128.
    sweeps : int
        Maximum number of sweeps of a fit to the weight.
    seed : int
        The first seed.
    """

    weight: str | None = None
    transposed: bool = False
    inputs: str | None = None
    experts: tuple[Levels, ...]
    formats: tuple[str, ...]
    parameters: tuple[str, ...]
    batch: int = 512
    batches: tuple[int, ...] = (1, 8, 64)
    devices: tuple[str, ...]
    seconds: float = 0.4
    rounds: int = 15
    memory: float = 2.0
    top_k: int = 2
    machines: tuple[str, ...] = ()
    data: str = DIGITS
    head_hidden: int = 128  # a linear layer may have fewer parameters than a gate
    head_formats: tuple[str, ...] = ()
    head_experts: tuple[Levels, ...] = ((8,), (32,))
    head_parameters: tuple[str, ...] = ("0.5x", "match")
    seeds: int = 3
    epochs: int = 15
    learning_rate: float = 3e-3
    batch_size: int = 128
    sweeps: int = 10
    seed: int = 0


#: Small batches, few repetitions and short training runs, for a quick check that everything works.
QUICK: dict[str, Any] = {
    "batch": 32,
    "batches": (1, 8),
    "seconds": 0.05,
    "rounds": 3,
    "head_experts": ((8,),),
    "head_parameters": ("match",),
    "seeds": 1,
    "epochs": 1,
    "sweeps": 2,
}
