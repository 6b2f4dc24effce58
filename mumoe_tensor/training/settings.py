"""Settings of a run, read from TOML: a model, its data and its training."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.models.gpt2 import GPT2, GPT2Config
from mumoe_tensor.models.mixer import Mixer, MixerConfig
from mumoe_tensor.models.saved import load_model, save_model
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.readers import checked, read_toml, reading
from mumoe_tensor.training.data import Rows
from mumoe_tensor.training.images import ImageData
from mumoe_tensor.training.job import Job, made, parameters_of
from mumoe_tensor.training.tokens import TokenData

#: Folder of the packaged settings.
CONFIGS = Path(__file__).parents[1] / "configs"


class _ModelRun(ABC):
    """The shared part of runs of a Mixer and of a GPT-2."""

    kind: ClassVar[str]
    network: ClassVar[type[Any]]
    result: ClassVar[str] = "model.safetensors"
    train: TrainConfig
    model: Any

    def make_model(self, device: torch.device | str | None = None) -> nn.Module:
        """The model, with weights drawn from torch's random numbers."""
        model: nn.Module = self.network(self.model, device=device)
        return model

    @abstractmethod
    def read_data(self) -> tuple[Rows, Rows]:
        """Read rows for training and for validation."""

    def job(self, *, progress: bool = False) -> Job:
        """Read the data and make the model, initialized with the seed in the training settings."""
        rows = self.read_data()
        # All blocks are alike, so two models determine the parameter count at any depth.
        first, second = (self._parameters(depth) for depth in (1, 2))
        parameters = first + (self.model.depth - 1) * (second - first)
        return Job(made(self.make_model, self.train.seed, parameters), *rows, self.train)

    def _parameters(self, depth: int) -> int:
        return parameters_of(lambda: self.network(replace(self.model, depth=depth)))

    def about(self, model: Any) -> dict[str, Any]:
        """Parameter count, and ranks by name."""
        ranks = {name: value for name, value in asdict(model.config).items() if name.endswith("rank")}
        return {
            "parameters": num_parameters(model),
            "ranks": {name: None if value is None else list(value) for name, value in ranks.items()},
        }

    def save(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained model."""
        whole: Any = self.make_model("meta")
        whole.load_state_dict(state, assign=True)
        save_model(whole, folder / self.result)

    def load(self, folder: Path) -> nn.Module:
        """Read a model written by `save`; raises a ValueError if it does not match the settings."""
        model: Any = load_model(folder / self.result)
        with reading(folder / self.result):
            for name, asked in vars(self.model).items():
                there = getattr(model.config, name, None)
                if asked is not None and asked != there:
                    raise ValueError(
                        f"the model must match config.json; {name} is {there!r} in the model, {asked!r} "
                        "in the config."
                    )
        return model


@dataclass(frozen=True)
class MixerRun(_ModelRun):
    """Settings of a Mixer, its images and its training.

    Attributes
    ----------
    data : ImageData
    model : MixerConfig
    train : TrainConfig
    """

    kind: ClassVar[str] = "mixer"
    network: ClassVar[type[Any]] = Mixer
    data: ImageData
    model: MixerConfig = field(default_factory=MixerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def read_data(self) -> tuple[Rows, Rows]:
        """Read rows for training and for validation.

        Raises
        ------
        ValueError
            If the images do not match the model, or as in `ImageData.read`.
        """
        model = self.model
        parts = self.data.read(model.image_size)
        for rows in parts:
            x, _ = rows.batch(torch.zeros(1, dtype=torch.int64))
            expected = (model.channels, model.image_size, model.image_size)
            if x.shape[1:] != expected or rows.classes > model.classes:
                raise ValueError(
                    f"the model takes images of shape {expected} and up to {model.classes} classes; "
                    f"{self.data.inputs} has shape {tuple(x.shape[1:])} and {rows.classes} classes."
                )
        return parts


@dataclass(frozen=True)
class GPT2Run(_ModelRun):
    """Settings of a GPT-2, its texts and its training.

    Attributes
    ----------
    data : TokenData
    model : GPT2Config
    train : TrainConfig
    """

    kind: ClassVar[str] = "gpt2"
    network: ClassVar[type[Any]] = GPT2
    data: TokenData
    model: GPT2Config = field(default_factory=GPT2Config)
    train: TrainConfig = field(default_factory=TrainConfig)

    def read_data(self) -> tuple[Rows, Rows]:
        """Read windows for training and for validation; raises the errors of `TokenData.read`."""
        return self.data.read(self.model.context, self.model.vocabulary)


Settings = MixerRun | GPT2Run
RUNS: dict[str, type[MixerRun] | type[GPT2Run]] = {run.kind: run for run in (MixerRun, GPT2Run)}


def packaged(kind: str) -> list[str]:
    """Names of the packaged settings.

    Parameters
    ----------
    kind : {"mixer", "gpt2"}
    """
    return sorted(path.stem for path in CONFIGS.glob(f"{kind}*.toml"))


def read_settings(kind: str, config: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read the settings of a run.

    Parameters
    ----------
    kind : {"mixer", "gpt2"}
    config : str or Path, optional
        A TOML file with the tables ``data``, ``model`` and ``train``, or the name of packaged settings, see
        `packaged`. By default, the settings named `kind`.
    overrides : sequence of str
        Such as ``train.epochs=3``: a key, and a value as in TOML. Strings need no quotes; ``none`` stands for
        None, in a file too.

    Returns
    -------
    MixerRun or GPT2Run

    Raises
    ------
    ValueError
        If there are no such settings, or a key is unknown or has a wrong value; the message names it.
    """
    names, name = packaged(kind), str(kind if config is None else config)
    if name not in names and not name.endswith(".toml"):
        raise ValueError(f"settings must be a TOML file or one of {', '.join(names)}; got {name!r}.")
    tables = read_toml(CONFIGS / f"{name}.toml" if name in names else name)
    for override in overrides:
        place, equals, text = override.partition("=")
        table, dot, key = place.strip().partition(".")
        if not (equals and dot and key):
            raise ValueError(
                f"an override must be a table, a key and a value, such as train.epochs=3; got {override!r}."
            )
        if isinstance(tables.setdefault(table, {}), dict):
            tables[table][key] = _value(text.strip())
    # (With overrides, the error may be in one of them.)
    with nullcontext() if name in names or overrides else reading(name):
        return _settings(RUNS[kind], tables)


def _value(text: str) -> Any:
    """Parse a TOML value; anything else is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def settings_of(mapping: Mapping[str, Any]) -> Settings:
    """Settings from their kind and tables; "none" stands for None where None is allowed.

    Raises
    ------
    ValueError
        If the kind or a key is unknown, or a value is wrong.
    """
    tables = dict(mapping)
    kind = tables.pop("kind", None)
    if kind not in RUNS:
        raise ValueError(f"kind: must be {' or '.join(RUNS)}, got {kind!r}.")
    return _settings(RUNS[kind], tables)


def _settings(run: type[MixerRun] | type[GPT2Run], tables: dict[str, Any]) -> Settings:
    types = get_type_hints(run)
    for table in {part.name for part in fields(run)} & tables.keys():
        if isinstance(tables[table], dict):
            hints = get_type_hints(types[table])
            tables[table] = {
                key: None if value == "none" and NoneType in get_args(hints.get(key)) else value
                for key, value in tables[table].items()
            }
    return checked(run, tables)
