"""The setting of a study, which is stored in `study.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
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
from mumoe_tensor.study.layers import Layer, dense, get_layer
from mumoe_tensor.study.weights import read_covariance, read_weight

#: Settings to which values can be added in a finished study.
GROWING = (
    "experts", "formats", "parameters", "batches", "devices", "head_experts", "head_parameters",
    "head_formats", "machines",
)  # fmt: skip
#: Settings that files of earlier versions lack.
ADDED = {"batch_size", "head_formats", "weight", "transposed", "inputs", "sweeps", "machines"}


@dataclass(frozen=True, kw_only=True)
class Setting(StudyConfig):
    """A layer and the config of its study, with all defaults filled in; made by `prepare`.

    Attributes
    ----------
    layer : Layer
        The dense layer.
    """

    layer: Layer

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
        layer = {"layer": self.layer.entry()}
        return json.dumps(layer | vars(self) | layer, indent=2) + "\n"  # the layer first

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
            if missing := {f.name for f in fields(cls)} - entries.keys() - ADDED:
                raise ValueError(f"{min(missing)}: Field required.")
            setting = checked(cls, entries)
            values = {f.name: getattr(setting, f.name) for f in fields(cls)}
            return prepare(**values | {"head_hidden": setting.head_hidden or 0})


#: Default formats for a matrix without experts, where formats with unsplit modes would all be low rank.
OF_MATRICES = (
    "lowrank", "kron", "monarch", "btt", "tt-matrix", "tucker-matrix", "cp-matrix",
    '{"name":"sum","formats":["monarch","lowrank"]}', '{"name":"sum","formats":["kron","lowrank"]}',
)  # fmt: skip
#: Default formats for mixtures, besides the registered ones: a matrix shared by all experts.
SHARED = '{"name":"sum","formats":[{"name":"shared","format":"lowrank"},"cp"]}'
#: None if the default follows from other options.
DEFAULTS: dict[str, Any] = {f.name: None if f.default is MISSING else f.default for f in fields(StudyConfig)}


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
        If a name is unknown, a size is not a positive integer, or a file or a device does not exist.
    """
    if unknown := set(options) - set(DEFAULTS):
        raise TypeError(f"a study has no setting {', '.join(map(repr, sorted(unknown)))}.")
    values = DEFAULTS | (QUICK if quick else {}) | _as_python(options)
    experts: Any = None
    if values["weight"] is not None:
        layer, experts = _layer_of(layer, values)
        values |= {"data": options.get("data") or NO_DATA}
    elif values["inputs"] is not None or values["transposed"]:
        raise ValueError("inputs and transposed need a weight: they describe the layer that it is from.")
    layer = get_layer("gpt2-mlp" if layer is None else layer)
    values["experts"] = _counts(_or(values["experts"], [layer.experts] if experts is None else [experts]))
    if experts is not None and any(prod(levels) != prod(experts) for levels in values["experts"]):
        raise ValueError(
            f"the levels of experts must multiply to the {prod(experts):,} matrices of the weight, got "
            f"{values['experts']}; a single matrix has none."
        )
    everything = OF_MATRICES if values["experts"] == ((),) else (*registered(), SHARED)
    heads = values["head_formats"] or values["formats"]
    if heads is None:
        heads = [name for name, format in registered().items() if _is_whole(format)]
    for name, listed in (("formats", _or(values["formats"], everything)), ("head_formats", heads)):
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
    for name in ("batch", "rounds", "top_k", "seeds", "epochs", "batch_size", "sweeps"):
        as_positive(values[name], name)
    values["batches"] = tuple(sorted({as_positive(n, "every entry of batches") for n in values["batches"]}))
    for name in ("seconds", "memory", "learning_rate"):
        if not (values[name] > 0 and isfinite(values[name])):
            raise ValueError(f"{name} must be positive and finite, got {values[name]}.")
    if values["batch"] < 2:
        raise ValueError(f"batch must be at least 2, as batch norm needs in training; got {values['batch']}.")
    if values["seed"] < 0:
        raise ValueError(f"seed must not be negative, got {values['seed']}.")
    default = ("match", "0.5x") if experts is None else ("0.5x", "0.25x", "0.1x")
    values["parameters"] = _texts(_or(values["parameters"], default))
    values["head_parameters"] = _texts(values["head_parameters"])
    if not values["parameters"]:
        raise ValueError("a study needs at least one budget of parameters, got none.")
    for text in (*values["parameters"], *values["head_parameters"]):
        as_budget(text, layer.spec.dense_parameters)
    values["devices"] = _devices(values["devices"])
    values["machines"] = tuple(check_choice(name, MACHINES, "machine") for name in values["machines"])
    return Setting(layer=layer, **values)


def _layer_of(layer: str | Layer | None, values: dict[str, Any]) -> tuple[Layer, Levels]:
    """The layer of a weight, and the numbers of experts if the weight is a stack."""
    check_flag(values["transposed"], "transposed")
    source = values["weight"] = str(values["weight"])
    *experts, in_features, out_features = read_weight(source, values["transposed"]).shape
    title = source.rpartition(":")[2] if not Path(source).exists() else Path(source).stem
    read = Layer(title, dense(in_features, out_features, bias=False), prod(experts))
    if layer not in (None, read):
        raise ValueError(f"the layer must be the layer of the weight, {read}, got {layer}.")
    if values["inputs"] is not None:
        values["inputs"] = str(values["inputs"])
        read_covariance(values["inputs"], in_features)
    return read, tuple(experts)


def _texts(budgets: Any) -> tuple[str, ...]:
    """Budgets as text; also a single one."""
    return tuple(map(str, [budgets] if isinstance(budgets, (str, int)) else budgets))


def _as_python(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON types; None stands for the default."""
    return {name: as_python(value) for name, value in options.items() if value is not None}


def _format(format: Any) -> Format:
    return read_format(format) if isinstance(format, str) else get_format(format)


def _is_whole(format: Format) -> bool:
    """Whether a format has one term without split modes."""
    return not format.is_split and len(format.summands(1)) == 1


def _or(value: Any, default: Any) -> Any:
    """The default if the value is None; empty values and zeros are checked later."""
    return default if value is None else value


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
            raise ValueError(f"a device of a study must be 'cpu' or 'cuda', got {name!r}.")
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' needs a CUDA device and a CUDA build of torch; there is none.")
    return tuple(dict.fromkeys(devices))
