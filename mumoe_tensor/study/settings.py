"""The setting of a study, which is stored in `study.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch

from mumoe_tensor.checks import as_positive, as_python, check_choice, check_flag
from mumoe_tensor.configs.kinds import Levels
from mumoe_tensor.configs.study import DIGITS, NO_DATA, QUICK, StudyConfig
from mumoe_tensor.contraction.machine import MACHINES
from mumoe_tensor.formats import Format
from mumoe_tensor.formats.registry import formats as registered
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.formats.text import format_text, read_format
from mumoe_tensor.readers import checked, read_json, reading
from mumoe_tensor.spec import LayerSpec, as_budget, expert_counts
from mumoe_tensor.study.layers import LAYERS, Layer
from mumoe_tensor.study.weights import read_covariance, read_weight

#: Settings to which values can be added in a finished study.
GROWING = (
    "experts", "formats", "parameters", "batches", "devices", "head_experts", "head_parameters",
    "head_formats", "machines",
)  # fmt: skip
#: Default formats for a matrix without experts, where formats with unsplit modes would all be low rank.
OF_MATRICES = (
    "lowrank", "kron", "monarch", "btt", "tt-matrix", "tucker-matrix", "cp-matrix",
    '{"name":"sum","formats":["monarch","lowrank"]}', '{"name":"sum","formats":["kron","lowrank"]}',
)  # fmt: skip
#: Format that is added to the registered ones by default for mixtures: one with a matrix shared by all
#: experts.
SHARED = '{"name":"sum","formats":[{"name":"shared","format":"lowrank"},"cp"]}'


@dataclass(frozen=True, kw_only=True)
class Setting(StudyConfig):
    """A layer and the config of its study, with all defaults filled in; made by `prepare`.

    Attributes
    ----------
    layer : Layer
        The dense layer.

    Raises
    ------
    ValueError
        If a name is unknown, or a number is out of range.
    """

    layer: Layer

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "top_k", "seeds", "epochs", "batch_size", "sweeps"):
            as_positive(getattr(self, name), name)
        for n in self.batches:
            as_positive(n, "every entry of batches")
        for name in ("seconds", "memory", "learning_rate"):
            if not (getattr(self, name) > 0 and isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, for batch norm in training; got {self.batch}.")
        for name in ("seed", "head_hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("experts", "formats", "parameters", "head_experts"):
            if not getattr(self, name):
                raise ValueError(f"a study needs at least one entry of {name}, got none.")
        for text in (*self.parameters, *self.head_parameters):
            as_budget(text, self.layer.spec.dense_parameters)
        for device in self.devices:
            check_choice(device, ("cpu", "cuda"), "device of a study")
        for machine in self.machines:
            check_choice(machine, MACHINES, "machine")

    @property
    def whole(self) -> LayerSpec:
        """The base of relative budgets: the dense layer, or the dense experts of a stack of weights."""
        return replace(self.layer.spec, experts=self.experts[0] if self.weight else ())

    @property
    def budgets(self) -> tuple[int, ...]:
        """Distinct numbers of parameters."""
        return tuple(dict.fromkeys(as_budget(text, self.whole.parameters) for text in self.parameters))

    @property
    def data_name(self) -> str:
        """Name of the data in headings."""
        return Path(self.data).name

    @property
    def title(self) -> str:
        """The setting in one line."""
        counts = ", ".join(" × ".join(f"{n:,}" for n in levels) or "no" for levels in self.experts)
        return f"{self.layer}; {counts} experts, batch {self.batch:,}, float32"

    def check_available(self) -> None:
        """Raise a ValueError or OSError if a file or a device does not exist."""
        if self.data not in (DIGITS, NO_DATA) and not Path(self.data).is_file():
            raise ValueError(
                f"data must be digits, none, or an .npz file with x and y; there is no file {self.data!r}."
            )
        if "cuda" in self.devices and not torch.cuda.is_available():
            raise ValueError("device 'cuda' needs a CUDA device and a CUDA build of torch; there is none.")
        if self.weight is not None:
            read_weight(self.weight, self.transposed)
        if self.inputs is not None:
            read_covariance(self.inputs, self.layer.in_features)

    def with_all_of(self, other: Setting) -> Setting:
        """The setting with the formats, experts, budgets, batches and devices of another added.

        Raises
        ------
        ValueError
            If the other setting differs in anything else.
        """
        joined = {name: dict.fromkeys((*getattr(other, name), *getattr(self, name))) for name in GROWING}
        grown: dict[str, Any] = {name: tuple(values) for name, values in joined.items()}
        both = replace(self, **grown)
        if replace(other, **grown) != both:
            names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
            others = ", ".join(name for name in names if name not in GROWING)
            raise ValueError(f"studies may only differ in {', '.join(GROWING)}; these differ in {others}.")
        return both

    def to_json(self) -> str:
        """The setting as text for `from_json`."""
        entries = asdict(self)
        return json.dumps({"layer": entries["layer"], **entries}, indent=2) + "\n"  # the layer first

    @classmethod
    def from_json(cls, path: str | Path) -> Setting:
        """Read the setting of a study.

        Raises
        ------
        ValueError
            If the file is not a setting; the message names the invalid entry.
        """
        entries = read_json(path)
        with reading(path):
            return checked(cls, entries)


def prepare(layer: str | Layer | None = None, *, quick: bool = False, **options: Any) -> Setting:
    """Check options and fill in defaults, without measuring anything.

    Parameters
    ----------
    layer : str or Layer, optional
        A name in `LAYERS`, or another layer; by default the layer of `weight`, or else ``"gpt2-mlp"``.
    quick : bool, default False
        Small batches, few repetitions and short training runs, for a quick check that everything works.
    **options
        Attributes of `.StudyConfig`; None stands for the default. `formats` also accepts `.Format` objects.
        `experts` and `head_experts` accept a number, or a sequence whose entries are numbers of experts, or
        sequences with one number per level.

    Returns
    -------
    Setting

    Raises
    ------
    ValueError, TypeError
        If a name is unknown, a size is not a positive integer, or the weight cannot be read.
    """
    if unknown := options.keys() - {f.name for f in fields(StudyConfig)}:
        raise TypeError(f"a study has no setting {', '.join(map(repr, sorted(unknown)))}.")
    given = {name: as_python(value) for name, value in options.items() if value is not None}
    stack: Levels | None = None
    if "weight" in given:
        for name in {"weight", "inputs"} & given.keys():
            given[name] = str(given[name])
        transposed = given.get("transposed", False)
        check_flag(transposed, "transposed")
        layer, stack = _layer_of(given["weight"], transposed, layer)
    elif "inputs" in given or given.get("transposed"):
        raise ValueError("inputs and transposed can only be used with a weight, which they describe.")
    if not isinstance(layer, Layer):
        layer = LAYERS[check_choice("gpt2-mlp" if layer is None else layer, LAYERS, "layer")]
    defaults: dict[str, Any] = {
        "experts": [layer.experts] if stack is None else [stack],
        "parameters": ("match", "0.5x") if stack is None else ("0.5x", "0.25x", "0.1x"),
        "devices": ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",),
        "data": DIGITS if stack is None else NO_DATA,
    }
    values = defaults | (QUICK if quick else {}) | given
    for name in {"experts", "head_experts"} & values.keys():
        values[name] = _counts(values[name])
    if stack is not None and any(prod(levels) != prod(stack) for levels in values["experts"]):
        raise ValueError(
            f"the numbers of experts must multiply to the {prod(stack):,} matrices of the weight, got "
            f"{values['experts']}; a single matrix has none."
        )
    everything = OF_MATRICES if values["experts"] == ((),) else (*registered(), SHARED)
    whole = [name for name, format in registered().items() if _is_whole(format)]
    values["head_formats"] = _formats(values.get("head_formats") or values.get("formats", whole))
    values["formats"] = _formats(values.get("formats", everything))
    for name in {"parameters", "head_parameters"} & values.keys():
        listed = [values[name]] if isinstance(values[name], (str, int)) else values[name]
        values[name] = tuple(map(str, listed))
    if "batches" in values:
        values["batches"] = tuple(sorted(set(values["batches"])))
    for name in ("devices", "machines"):
        values[name] = tuple(dict.fromkeys(values.get(name, ())))
    return Setting(layer=layer, **values | {"data": str(values["data"])})


def _layer_of(source: str, transposed: bool, layer: str | Layer | None) -> tuple[Layer, Levels]:
    """The layer of a weight, and the numbers of experts in a stack."""
    *experts, in_features, out_features = read_weight(source, transposed).shape
    title = source.rpartition(":")[2] if not Path(source).exists() else Path(source).stem
    read = Layer(title, in_features, out_features, bias=False, experts=prod(experts))
    if layer not in (None, read):
        raise ValueError(f"the layer must match the weight, which is of {read}; got {layer}.")
    return read, tuple(experts)


def _formats(listed: Iterable[Any]) -> tuple[str, ...]:
    formats = (read_format(f) if isinstance(f, str) else get_format(f) for f in listed)
    return tuple(dict.fromkeys(map(format_text, formats)))


def _is_whole(format: Format) -> bool:
    """Whether a format has one term without split modes."""
    return not format.is_split and len(format.summands(1)) == 1


def _counts(experts: Any) -> tuple[Levels, ...]:
    listed = [experts] if isinstance(experts, int) else experts
    return tuple(dict.fromkeys(map(expert_counts, listed)))
