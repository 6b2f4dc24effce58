"""What a page shows of a model, and the same as plain values that the script of the page reads."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.browser.collect import ExpertLevel
from mumoe_tensor.browser.samples import Images, Texts

#: Labels that a card shows, and experts of a token of a written text that are kept.
BARS, STRONGEST = 5, 8
#: Experts whose labels are sorted at once.
ROWS = 256
#: Entries of a heat map at most, a byte each: of more classes than fit the most frequent are drawn.
MAP = 2**21


@dataclass(frozen=True)
class Sample:
    """A text that a language model wrote, and the coefficients of its experts.

    Attributes
    ----------
    tokens : list of str
    given : int
        Tokens that the model was given and did not write.
    coefficients : dict of (str, int) to Tensor of shape (tokens, N)
        By layer and level, as of `ExpertLevel`.
    about : str
        How it was drawn.
    """

    tokens: list[str]
    given: int
    coefficients: Mapping[tuple[str, int], Tensor]
    about: str = ""


@dataclass(frozen=True)
class View:
    """The experts of one model, as a page shows them.

    Attributes
    ----------
    levels : list of ExpertLevel
        As of `collect`.
    samples : Images or Texts, optional
        What the inputs look like; without, only their numbers are shown. Tokens of texts are shaded by
        the expert's coefficients.
    title, about : str
        Above the experts.
    legend : str, optional
        How to read a card.
    classes : sequence or mapping of int to str, optional
        Names of the classes, or of tokens; their numbers by default.
    grids : mapping of str to (int, int), optional
        Layers that see the patches of images, and how many of these an image has below and beside each other:
        patches are shaded by the expert's coefficients.
    written : Sample, optional
        A text that the model wrote, shown above the experts.
    experts : int, optional
        Show the most used so many experts of a level only, and none that no input uses; all by default.

    Raises
    ------
    ValueError
        If there are fewer samples than inputs.
    """

    levels: list[ExpertLevel]
    samples: Images | Texts | None = None
    title: str = "Experts"
    about: str = ""
    legend: str = ""
    classes: Sequence[str] | Mapping[int, str] = ()
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    written: Sample | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        last = max((int(level.top.max()) for level in self.levels), default=-1)
        if self.samples is not None and last >= len(self.samples):
            raise ValueError(
                f"there must be a sample for every input; input {last} of {len(self.samples)} is shown."
            )

    @property
    def is_language(self) -> bool:
        """Whether labels are tokens."""
        return any(level.is_language for level in self.levels)

    def plain(self) -> dict[str, Any]:
        """All of it as values that JSON has."""
        levels = [self._level(level) for level in self.levels]
        cards = [expert for level in levels for expert in level["experts"]]
        used = sorted({top["i"] for expert in cards for top in expert["top"]})
        labels = {label for expert in cards for label, *_ in expert["bars"]}
        labels |= {label for level in levels if level["map"] for label in level["map"]["labels"]}
        names = self.classes if isinstance(self.classes, Mapping) else dict(enumerate(self.classes))
        return {
            "levels": levels,
            "samples": {} if self.samples is None else {index: self.samples.shown(index) for index in used},
            "classes": {label: names[label] for label in sorted(labels) if label in names},
            "grids": self.grids,
            "language": self.is_language,
            "sample": None if self.written is None else _plain_sample(self.written, self.levels),
        }

    def _level(self, level: ExpertLevel) -> dict[str, Any]:
        usage, experts = level.usage, _most_used(level.usage.mean, self.experts)
        effects = _effects(level)
        columns = zip(
            experts, usage.mean[experts].tolist(), usage.load[experts].tolist(), _bars(level, experts),
            [None] * len(experts) if effects is None else effects[experts].tolist(),
            _tops(level, experts, isinstance(self.samples, Texts) or level.layer in self.grids), strict=True,
        )  # fmt: skip
        return {
            "layer": level.layer or "model",
            "level": level.level,
            "total": len(level.top),
            "dead": usage.dead,
            "active": round(usage.active * len(level.top), 2),
            "entropy": round(usage.entropy, 3),
            # Coefficients that sum to one are shares; others may be of any size.
            "shares": not abs(float(usage.mean.sum()) - 1) > 1e-3,
            "experts": [
                {
                    "n": n,
                    "mean": round(mean, 6),
                    "load": round(load, 6),
                    "bars": bars,
                    "clarity": clarity,
                    "effect": None if effect is None or isnan(effect) else round(effect, 6),
                    "top": top,
                }
                for n, mean, load, (bars, clarity), effect, top in columns
            ],
            "map": None if level.is_language else _plain_map(level, experts),
        }


def _most_used(mean: Tensor, most: int | None) -> list[int]:
    if most is None:
        return [*range(len(mean))]
    used = mean.argsort(descending=True, stable=True)[: min(most, int((mean > 0).sum()))]
    return used.sort().values.tolist()


def _tops(level: ExpertLevel, experts: list[int], is_shaded: bool) -> list[list[dict[str, Any]]]:
    """The inputs of each expert, with the coefficients of their rows if these are shown."""
    rows: Any = [[()] * level.top.shape[1]] * len(experts)
    if is_shaded and level.rows is not None:
        rows = level.rows[experts].tolist()
    tops = zip(level.top[experts].tolist(), level.coefficients[experts].tolist(), rows, strict=True)
    return [
        [
            {"i": index, "a": round(a, 4), "rows": [round(x, 3) for x in of_input]}
            for index, a, of_input in zip(*top, strict=True)
            if index >= 0
        ]
        for top in tops
    ]


def _effects(level: ExpertLevel) -> Tensor | None:
    """Sums of the changes of the classes, or changes of the loss; NaN for an expert that was not removed."""
    if level.effects is None or level.effects.ndim == 1:
        return level.effects
    sums = level.effects.nan_to_num(0.0, float("inf"), -float("inf")).abs().sum(1)
    return sums.masked_fill(level.effects.isnan().all(1), float("nan"))


def _bars(level: ExpertLevel, experts: list[int]) -> list[tuple[list[list[Any]], float]]:
    """Labels that coefficients go to beyond their frequency, as (label, share, remark); the largest share.

    The largest share comes first. The remark is the change of the class's accuracy without the expert, or
    where this was not measured how many times larger the share is than that among all inputs or tokens.
    """
    if level.sums is None or level.labels is None or level.frequency is None:
        return [([], 0.0)] * len(experts)
    frequency, is_label = level.frequency, level.labels >= 0  # the rare ones together are no label
    bars: list[tuple[list[list[Any]], float]] = []
    for chunk in torch.tensor(experts).split(ROWS):
        sums = level.sums[chunk]
        shares = sums / sums.sum(1, keepdim=True) * is_label
        beyond = (shares - frequency * is_label).argsort(dim=1, descending=True, stable=True)[:, :BARS]
        order = shares.gather(1, beyond).argsort(dim=1, descending=True, stable=True)
        places = beyond.gather(1, order)
        of_bars = zip(
            sums.any(1).tolist(), shares.amax(1).tolist(), level.labels[places].tolist(),
            shares.gather(1, places).tolist(), frequency[places].tolist(), _changes(level, chunk, places),
            strict=True,
        )  # fmt: skip
        for is_used, most, *columns in of_bars:
            listed = [
                [label, round(share, 5), _remark(share, usual, change)]
                for label, share, usual, change in zip(*columns, strict=True)
                if share > 0
            ]
            bars.append((listed, round(most, 5)) if is_used else ([], 0.0))
    return bars


def _changes(level: ExpertLevel, experts: Tensor, places: Tensor) -> list[list[float | None]]:
    if level.effects is None or level.effects.ndim == 1:
        return [[None] * places.shape[1]] * len(places)
    return level.effects[experts].gather(1, places).tolist()


def _remark(share: float, usual: float, change: float | None) -> str:
    if change is None:
        return f"×{share / usual:.1f}" if usual else ""
    return "" if isnan(change) else f"{100 * change:+.1f}"


def _plain_map(level: ExpertLevel, experts: list[int]) -> dict[str, Any] | None:
    """The share of each class in the coefficients of each expert: bytes, 255 for all of them, in base64."""
    if level.sums is None or level.labels is None or level.frequency is None or not experts:
        return None
    most = max(1, MAP // len(experts))
    places = level.frequency.argsort(descending=True, stable=True)[:most].sort().values
    sums = level.sums[experts].double().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
    shares = (sums / sums.sum(1, keepdim=True).clamp_min(1e-30))[:, places]
    data = np.round(255 * shares.numpy()).astype(np.uint8)
    return {"labels": level.labels[places].tolist(), "data": b64encode(data.tobytes()).decode()}


def _plain_sample(sample: Sample, levels: list[ExpertLevel]) -> dict[str, Any]:
    """A written text: of every level and token the strongest experts, as (number, coefficient)."""
    strongest = []
    for level in levels:
        of_level = sample.coefficients[level.layer, level.level]
        values, experts = of_level.topk(min(STRONGEST, of_level.shape[1]))
        strongest.append(
            [
                [[int(n), round(float(a), 3)] for n, a in zip(ns, each, strict=True) if not a <= 0]
                for ns, each in zip(experts, values, strict=True)
            ]
        )
    return {"tokens": sample.tokens, "given": sample.given, "levels": strongest}
