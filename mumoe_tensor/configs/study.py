"""The config of a study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mumoe_tensor.configs.kinds import Levels

#: Names of `data` that are no files.
DIGITS, NO_DATA = "digits", "none"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is studied of a layer, and how; the options of ``mumoe-tensor study`` are these.

    Attributes
    ----------
    weight : str or None
        Weight of your own layer, as FILE:NAME, to fit the formats to. The file is of safetensors, NumPy or
        torch.save; a pattern such as 'layers.*.up_proj.weight' gives a stack of experts.
    transposed : bool
        Whether the file has the weight as in x out (Conv1D of GPT-2), not as out x in (nn.Linear).
    inputs : str or None
        Inputs of that layer, one per row, as FILE:NAME: formats are fitted to its outputs for these, too.
    experts : tuple of tuple of int
        Numbers of experts, one per level, as 256,64x64; none for a layer without experts. By default that of
        the layer, or of the stack. Batches are varied with the first.
    formats : tuple of str
        Tensor formats, as cp,tr, or as a list of their config entries in JSON; by default all.
    parameters : tuple of str
        Budgets: numbers of parameters, match for those of the dense layer, or multiples (0.5x). By default
        match,0.5x; of a weight 0.5x,0.25x,0.1x. Batches are varied with the first.
    batch : int
        Inputs of a forward pass and of a step.
    batches : tuple of int
        Further batches, forward only.
    devices : tuple of str
        Devices to measure on, as cpu,cuda; by default all available.
    seconds : float
        A timing stops after the round in which this time has passed, but not before three rounds. A forward
        pass alone has half the time.
    rounds : int
        Rounds of a timing at most.
    memory : float
        What takes more GiB is run with fewer dense experts or inputs, and its figures are estimated from
        those.
    top_k : int
        Experts that an input of the sparse mixture uses.
    machines : tuple of str
        Other machines to predict times for, as cuda,h200.
    data : str
        Data to train heads on: digits, an .npz file with x and y, or none, the default with a weight.
    head_hidden : int or None
        Hidden size of the heads; 0 for linear ones.
    head_formats : tuple of str
        Formats of the heads. By default the same as of the layer; of all formats those that split no size and
        have one term.
    head_experts : tuple of tuple of int
        Numbers of experts of the heads.
    head_parameters : tuple of str
        Budgets of the heads.
    seeds : int
        Trainings of each head.
    epochs : int
        Passes over the data in a training.
    learning_rate : float
        The largest one of a training.
    batch_size : int
        Rows of a step of a training; all rows if there are fewer than 128.
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
    head_hidden: int | None = 128  # a linear layer may have fewer parameters than a gate
    head_formats: tuple[str, ...] = ()
    head_experts: tuple[Levels, ...] = ((8,), (32,))
    head_parameters: tuple[str, ...] = ("0.5x", "match")
    seeds: int = 3
    epochs: int = 15
    learning_rate: float = 3e-3
    batch_size: int = 128
    sweeps: int = 10
    seed: int = 0


#: Small batches, few repetitions, short trainings, to see that all works.
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
