"""The setting of a study, which `study.json` has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from mumoe_tensor.checks import as_positive, as_python
from mumoe_tensor.formats import Format
from mumoe_tensor.formats.registry import formats as registered
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.formats.text import format_text, read_format
from mumoe_tensor.readers import checked, read_json, reading
from mumoe_tensor.spec import as_budget, expert_counts
from mumoe_tensor.study.layers import Layer, get_layer

Levels = tuple[int, ...]
#: Names of `data` that are no files.
DIGITS, NO_DATA = "digits", "none"


@dataclass(frozen=True)
class Setting:
    """Everything that a study measures depends on.

    Attributes
    ----------
    layer : Layer
        The dense layer.
    experts : tuple of tuple of int
        Experts to study it with, one number a level. Batches are varied and peak memory is measured with the
        first.
    formats : tuple of str
        Names, or config entries as JSON of formats with settings.
    parameters : str
        The budget; see `.LayerSpec.fitted`.
    batch : int
        Inputs of a forward pass and of a step.
    batches : tuple of int
        Further batches, forward only.
    squares : tuple of int
        Sizes of the square layers that are set against `torch.nn.Linear`.
    square_batches : tuple of int
    square_experts : int
    seconds : float
        A timing stops after the round in which this time has passed, but not before three rounds. A forward
        pass alone has half the time.
    rounds : int
        Rounds of a timing at most.
    memory : float
        Subjects whose parameters and gradients take more GiB are not run.
    top_k : int
        Experts that an input of the sparse mixture uses.
    devices : tuple of str
    seed : int
    data : str
        ``"digits"``, the path of an ``.npz`` file with x and y, or ``"none"``.
    head_hidden : int or None
        Size between the two layers of the heads that are trained; None for one layer.
    head_experts : tuple of tuple of int
    head_parameters : tuple of str
        Budgets of the heads.
    seeds : int
        Trainings of each head.
    epochs : int
        Epochs of a training.
    learning_rate : float
        The largest one of a training.
    batch_size : int
        Rows of a step of a training; all, where these are fewer than the default.
    head_formats : tuple of str
        Formats of the heads that are trained.
    """

    layer: Layer
    experts: tuple[Levels, ...]
    formats: tuple[str, ...]
    parameters: str
    batch: int
    batches: tuple[int, ...]
    squares: tuple[int, ...]
    square_batches: tuple[int, ...]
    square_experts: int
    seconds: float
    rounds: int
    memory: float
    top_k: int
    devices: tuple[str, ...]
    seed: int
    data: str
    head_hidden: int | None
    head_experts: tuple[Levels, ...]
    head_parameters: tuple[str, ...]
    seeds: int
    epochs: int
    learning_rate: float
    batch_size: int = 128
    head_formats: tuple[str, ...] = ()

    @property
    def data_name(self) -> str:
        """Name of the data in headings."""
        return Path(self.data).name

    @property
    def title(self) -> str:
        """The setting in one line."""
        counts = ", ".join(" × ".join(f"{n:,}" for n in levels) or "no" for levels in self.experts)
        return f"{self.layer}; {counts} experts, batch {self.batch:,}, float32"

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps({**vars(self), "layer": self.layer.entry()}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> Setting:
        """Read the setting of a study.

        Raises
        ------
        ValueError
            If the file is no setting; it names what is wrong.
        """
        entries = read_json(path)
        with reading(path):
            setting = checked(cls, entries)
            values = {f.name: getattr(setting, f.name) for f in fields(cls)}
            return prepare(**values | {"head_hidden": setting.head_hidden or 0})


#: Defaults. None: `experts` follow from the layer, `devices` from the machine, `formats` are all registered
#: ones, and `head_formats` those of them that neither split modes, into parts that numbers of classes seldom
#: have, nor are sums.
DEFAULTS: dict[str, Any] = {
    "experts": None,
    "formats": None,
    "parameters": "match",
    "batch": 1024,
    "batches": (1, 8, 64, 512, 4096),
    "squares": (256, 512, 1024, 2048),
    "square_batches": (1, 32, 1024),
    "square_experts": 64,
    "seconds": 0.4,
    "rounds": 15,
    "memory": 2.0,
    "top_k": 2,
    "devices": None,
    "seed": 0,
    "data": DIGITS,
    "head_hidden": 128,  # a linear layer may have fewer parameters than a gate
    "head_experts": (8, 32),
    "head_parameters": ("0.5x", "match"),
    "seeds": 3,
    "epochs": 15,
    "learning_rate": 3e-3,
    "batch_size": Setting.batch_size,
    "head_formats": None,
}
#: Small batches, few repetitions, short trainings, to see that all works.
QUICK: dict[str, Any] = {
    "batch": 32,
    "batches": (1, 8),
    "squares": (64, 128),
    "square_batches": (1, 8),
    "square_experts": 8,
    "seconds": 0.05,
    "rounds": 3,
    "head_experts": (8,),
    "head_parameters": ("match",),
    "seeds": 1,
    "epochs": 1,
}


def prepare(layer: str | Layer = "gpt2-mlp", *, quick: bool = False, **options: Any) -> Setting:
    """Check options and fill in defaults. Nothing is measured yet.

    Parameters
    ----------
    layer : str or Layer, default "gpt2-mlp"
        A name in `LAYERS`, or another layer.
    quick : bool, default False
        Small batches, few repetitions, short trainings, to see that all works.
    **options
        The attributes of `Setting`; what is left out or None has its default. `experts` and `head_experts`
        may be a number or a sequence, in which a sequence in the place of a number has one number a level.
        By default `experts` are those of the layer, a quarter and four times as many. `formats` may be any
        formats; `head_formats` are the same where `formats` are set. `head_hidden` may be 0, for heads of one
        layer.

    Returns
    -------
    Setting

    Raises
    ------
    ValueError, TypeError
        If a name is unknown, a size is not a positive integer, or a file or a device is not there.
    """
    layer = get_layer(layer)
    if unknown := set(options) - set(DEFAULTS):
        raise TypeError(f"a study has no setting {', '.join(map(repr, sorted(unknown)))}.")
    values = DEFAULTS | (QUICK if quick else {}) | _as_python(options)
    values["experts"] = _counts(_or(values["experts"], _around(layer, quick)))
    heads = values["head_formats"] or values["formats"]
    if heads is None:
        heads = [name for name, format in registered().items() if _is_whole(format)]
    for name, listed in (("formats", _or(values["formats"], registered())), ("head_formats", heads)):
        values[name] = tuple(dict.fromkeys(format_text(_format(format)) for format in listed))
    if not values["formats"]:
        raise ValueError("a study needs at least one format, got none.")
    values["data"] = data = str(values["data"])
    if data not in (DIGITS, NO_DATA) and not Path(data).is_file():
        raise ValueError(
            f"data must be digits, none, or an .npz file with x and y; there is no file {data!r}."
        )
    values["head_experts"] = _counts(values["head_experts"])
    values["head_hidden"] = (
        as_positive(values["head_hidden"], "head_hidden") if values["head_hidden"] else None
    )
    for name in ("batch", "square_experts", "rounds", "top_k", "seeds", "epochs", "batch_size"):
        as_positive(values[name], name)
    for name in ("batches", "squares", "square_batches"):
        values[name] = tuple(sorted({as_positive(n, f"every entry of {name}") for n in values[name]}))
    for name in ("seconds", "memory", "learning_rate"):
        if not (values[name] > 0 and isfinite(values[name])):
            raise ValueError(f"{name} must be positive and finite, got {values[name]}.")
    if values["batch"] < 2:
        raise ValueError(f"batch must be at least 2, for the batch norm of a step; got {values['batch']}.")
    if values["seed"] < 0:
        raise ValueError(f"seed must not be negative, got {values['seed']}.")
    values["parameters"] = str(values["parameters"])
    values["head_parameters"] = tuple(map(str, values["head_parameters"]))
    for text in (values["parameters"], *values["head_parameters"]):
        as_budget(text, layer.spec.dense_parameters)
    values["devices"] = _devices(values["devices"])
    return Setting(layer=layer, **values)


def _as_python(options: dict[str, Any]) -> dict[str, Any]:
    """Options in types of JSON; None stands for the default."""
    return {name: as_python(value) for name, value in options.items() if value is not None}


def _format(format: Any) -> Format:
    return read_format(format) if isinstance(format, str) else get_format(format)


def _is_whole(format: Format) -> bool:
    """Whether a format has one term, whose modes are not split."""
    return not format.is_split and len(format.summands(1)) == 1


def _or(value: Any, default: Any) -> Any:
    """The default in the place of None alone; empty values and zeros are checked later."""
    return default if value is None else value


def _around(layer: Layer, quick: bool) -> list[int]:
    """The layer's number of experts, a quarter and four times as many."""
    return [layer.experts] if quick else [layer.experts, max(layer.experts // 4, 2), 4 * layer.experts]


def _counts(experts: Any) -> tuple[Levels, ...]:
    listed = [experts] if isinstance(experts, int) else list(experts)
    if not listed:
        raise ValueError("a study needs at least one number of experts, got none.")
    return tuple(dict.fromkeys(expert_counts(levels) for levels in listed))


def _devices(devices: Sequence[str] | None) -> tuple[str, ...]:
    if devices is None:
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name in devices:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"a device of a study is 'cpu' or 'cuda', got {name!r}.")
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' needs a CUDA device and a build of torch for it; there is none.")
    return tuple(dict.fromkeys(devices))
