"""A grid of replacements: modules of a model, the layers that replace them, and their training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.ledger import Ledger, Row
from mumoe_tensor.readers import checked, read_toml, reading
from mumoe_tensor.replace.layers import MixtureOfDecoders, MixtureOfTransforms, Transcoder

LAYERS = {kind.__name__: kind for kind in (Transcoder, MixtureOfDecoders, MixtureOfTransforms)}
#: Seed of the runs that choose learning rates.
TUNING_SEED = 100
#: Columns of the tables.
KEY: dict[str, type] = {"module": str, "arm": str, "k": int, "seed": int}
SETTINGS: dict[str, type] = {"learning_rate": float, "penalty": float}
MEASURED: dict[str, type] = {"parameters": int, "experts": int, "nmse": float, "active": float, "dead": int}
TUNING = {"run": str, **KEY, **SETTINGS, **MEASURED, "seconds": float | None}
FRONTIER = {
    "run": str, **KEY, **SETTINGS, **MEASURED, "relative_error": float, "ce": float, "rise": float,
    "half": float, "rise_zeroed": float, "seconds": float,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A module to replace.

    Attributes
    ----------
    module : str
        Name of the module in the model.
    k : tuple of int
        Numbers of active experts.
    seeds : tuple of int
        Number of seeds for each entry of `k`.
    """

    module: str
    k: tuple[int, ...] = (32,)
    seeds: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        if not self.k or len(self.k) != len(self.seeds) or min(*self.k, *self.seeds) < 1:
            raise ValueError(
                f"k and seeds must have the same number of positive entries, got {self.k} and {self.seeds}."
            )


@dataclass(frozen=True)
class Arm:
    """A kind of layer.

    Attributes
    ----------
    layer : {"Transcoder", "MixtureOfDecoders", "MixtureOfTransforms"}
    options : dict
        Arguments of the layer's method `like`, other than k and parameters.
    gate : str, optional
        Gate to use instead of the layer's default: ``"random"`` or ``"nearest_centres"``.
    parameters : int, str or None, optional
        See `like`. The default is the grid's value. None if the options determine all sizes.
    learning_rates : tuple of float
        Candidates; the one with the lowest error on the validation texts is used.
    penalties : tuple of float
        Candidates; see `.fit`. They are chosen together with the learning rate, among the settings that leave
        at most K experts active on average.
    """

    layer: Literal["Transcoder", "MixtureOfDecoders", "MixtureOfTransforms"]
    options: dict[str, Any] = field(default_factory=dict)
    gate: str | None = None
    parameters: int | str | None = "grid"
    learning_rates: tuple[float, ...] = (1e-3,)
    penalties: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not self.learning_rates or not self.penalties:
            raise ValueError("learning_rates and penalties must have at least one number each.")
        if not all(0 < rate < inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}.")
        if not all(0 <= penalty < inf for penalty in self.penalties):
            raise ValueError(f"penalties must not be negative, got {self.penalties}.")

    @property
    def has_k(self) -> bool:
        """Whether the number of active experts is a setting of the layer."""
        return self.layer != "MixtureOfTransforms" and self.options.get("experts", True) not in ([], ())

    def make(self, block: nn.Module, k: int, parameters: int | str) -> Any:
        """Make the layer for a block, initialised with torch's global random numbers."""
        budget = parameters if self.parameters == "grid" else self.parameters
        options = {**self.options, "parameters": budget}
        if self.has_k:
            options |= {"k": k} if self.gate is None else {"gate": {"name": self.gate, "k": k}}
        return LAYERS[self.layer].like(block, **options)


@dataclass(frozen=True)
class Grid:
    """Modules to replace, the layers that replace them, and their training.

    Attributes
    ----------
    places : tuple of Place
    arms : dict of str to Arm
    context : int
        Tokens per window, at least two.
    parameters : int or str
        Parameters of a layer, as for its method `like`: ``"2x"`` for twice those of the replaced block.
    massive : float or None
        Outputs of the block with a norm above this multiple of the median are kept (see
        `.ActivationRows.median_norm`); None to replace all outputs.
    tuned_at : int
        The K at which learning rates and penalties are chosen, one of the K of the first place.
    train : TrainConfig
        Its learning rate and seed are ignored.
    """

    places: tuple[Place, ...]
    arms: dict[str, Arm]
    context: int = 256
    parameters: int | str = "2x"
    massive: float | None = 5.0
    tuned_at: int = 32
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.places or not self.arms:
            raise ValueError("a grid must have places and arms.")
        if self.context < 2:
            raise ValueError(f"context must be at least two tokens, got {self.context}.")
        if self.massive is not None and not self.massive > 0:
            raise ValueError(f"massive must be positive or none, got {self.massive}.")
        if self.tuned_at not in self.places[0].k:
            raise ValueError(
                f"tuned_at must be a K of the first place, {self.places[0].k}, got {self.tuned_at}."
            )
        if wrong := [name for name in self.arms if "/" in name]:
            raise ValueError(f"names of arms, used in folder names, must not contain a slash, got {wrong}.")
        names = [run.name for run in self.runs()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"runs must have different names, got more than one {', '.join(twice)}.")

    @classmethod
    def read(cls, path: str | Path) -> Grid:
        """Read a grid from TOML.

        Raises
        ------
        ValueError
            If a value is missing, unknown or wrong; the message names its key.
        """
        tables = read_toml(path)
        for table, name in [
            (tables, "massive"),
            *((arm, "parameters") for arm in tables.get("arms", {}).values()),
        ]:
            if isinstance(table, dict) and table.get(name) == "none":
                table[name] = None
        with reading(path):
            return checked(cls, tables)

    def runs(self) -> Iterator[Run]:
        """All runs, ordered by seed. Arms without K have one run per seed."""
        most = max(seeds for place in self.places for seeds in place.seeds)
        for seed in range(most):
            for place in self.places:
                for k, seeds in zip(place.k, place.seeds, strict=True):
                    for name, arm in self.arms.items():
                        # An arm without K runs together with the K at which it is tuned, or the first K.
                        alone = self.tuned_at if self.tuned_at in place.k else place.k[0]
                        if seed < seeds and (arm.has_k or k == alone):
                            yield Run(
                                place.module, name, k if arm.has_k or arm.penalties != (0.0,) else 0, seed
                            )

    def tuning_runs(self) -> Iterator[Run]:
        """The runs that choose a learning rate and a penalty, if an arm has several candidates."""
        for run in replace(self, places=(Place(self.places[0].module, (self.tuned_at,), (1,)),)).runs():
            arm = self.arms[run.arm]
            choices = [(rate, penalty) for rate in arm.learning_rates for penalty in arm.penalties]
            if len(choices) > 1:
                for rate, penalty in choices:
                    yield run._replace(seed=TUNING_SEED, learning_rate=rate, penalty=penalty)

    def chosen(self, run: Run, tuning: Ledger) -> Run:
        """A run with the chosen learning rate and penalty of its arm.

        Among the settings that leave at most K experts active on average over the validation texts, the one
        with the lowest error is chosen. If there are none, the one with the fewest active experts is chosen.
        """
        arm = self.arms[run.arm]
        rows = tuning.of(module=self.places[0].module, arm=run.arm)
        if not rows:
            return run._replace(learning_rate=arm.learning_rates[0], penalty=arm.penalties[0])
        sparse = [row for row in rows if row["active"] <= self.tuned_at]
        best = min(sparse or rows, key=lambda row: row["nmse" if sparse else "active"])
        if best["nmse"] == inf:
            raise FloatingPointError(f"{run.arm} diverges with every learning rate of the grid.")
        return run._replace(learning_rate=best["learning_rate"], penalty=best["penalty"])


class Run(NamedTuple):
    """One training run; k is 0 if the layer has none, and the settings are 0 until they are chosen."""

    module: str
    arm: str
    k: int
    seed: int
    learning_rate: float = 0.0
    penalty: float = 0.0

    @property
    def name(self) -> str:
        """The name of the run in tables and file names."""
        settings = [f"{x:g}" for x in (self.learning_rate, self.penalty) if self.seed == TUNING_SEED]
        return " ".join(
            [self.module, self.arm.replace(",", ""), f"K={self.k}", f"seed={self.seed}", *settings]
        )

    @property
    def key(self) -> Row:
        """The columns that identify the run, and its settings."""
        return {"run": self.name, **{name: getattr(self, name) for name in (*KEY, *SETTINGS)}}
