"""What a page shows of a model, and the same as plain values that the script of the page reads."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mumoe_tensor.browser.collect import ExpertLevel
from mumoe_tensor.browser.samples import Images, Texts

#: Labels that a card shows, and experts of a token of a written text that are kept.
BARS, STRONGEST = 5, 8
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
        is_shaded = isinstance(self.samples, Texts) or level.layer in self.grids
        usage, experts = level.usage, _most_used(level.usage.mean, self.experts)
        return {
            "layer": level.layer or "model",
            "level": level.level,
            "total": len(level.top),
            "dead": usage.dead,
            "active": round(usage.active * len(level.top), 2),
            "entropy": round(usage.entropy, 3),
            # Coefficients that sum to one are shares; others may be of any size.
            "shares": not abs(float(usage.mean.sum()) - 1) > 1e-3,
            "experts": [_plain_expert(level, n, is_shaded) for n in experts],
            "map": None if level.is_language else _plain_map(level, experts),
        }


def _most_used(mean: Tensor, most: int | None) -> list[int]:
    if most is None:
        return [*range(len(mean))]
    used = mean.argsort(descending=True, stable=True)[: min(most, int((mean > 0).sum()))]
    return used.sort().values.tolist()


def _plain_expert(level: ExpertLevel, n: int, is_shaded: bool) -> dict[str, Any]:
    bars, clarity = _bars(level, n)
    return {
        "n": n,
        "mean": round(float(level.usage.mean[n]), 6),
        "load": round(float(level.usage.load[n]), 6),
        "clarity": clarity,
        "bars": bars,
        "effect": _effect(level, n),
        "top": _top(level, n, is_shaded),
    }


def _top(level: ExpertLevel, n: int, is_shaded: bool) -> list[dict[str, Any]]:
    top = zip(level.top[n].tolist(), level.coefficients[n].tolist(), strict=True)
    shown = [{"i": index, "a": round(a, 4), "rows": []} for index, a in top if index >= 0]
    if is_shaded and level.rows is not None:
        for each, rows in zip(shown, level.rows[n].tolist(), strict=False):
            each["rows"] = [round(x, 3) for x in rows]
    return shown


def _effect(level: ExpertLevel, n: int) -> float | None:
    """Sum of the changes of the classes, or the change of the loss; None if the expert was not removed."""
    if level.effects is None or level.effects[n].isnan().all():
        return None
    effects = level.effects[n].nan_to_num(0.0, float("inf"), -float("inf"))
    return round(float(effects.abs().sum() if effects.ndim else effects), 6)


def _bars(level: ExpertLevel, n: int) -> tuple[list[list[Any]], float]:
    """Labels that coefficients go to beyond their frequency, as (label, share, remark); the largest share.

    The largest share comes first. The remark is the change of the class's accuracy without the expert, or of
    a token how many times larger its share is than that among all tokens.
    """
    if level.sums is None or level.labels is None or level.frequency is None or not level.sums[n].any():
        return [], 0.0
    shares = level.sums[n] / level.sums[n].sum()
    shares[level.labels < 0] = 0.0  # the rare ones together are no label
    beyond = (shares - level.frequency).argsort(descending=True, stable=True)[:BARS]
    bars = []
    for place in beyond[shares[beyond].argsort(descending=True, stable=True)].tolist():
        share, usual = float(shares[place]), float(level.frequency[place])
        remark = ""
        if level.effects is not None and level.effects.ndim == 2:
            change = float(level.effects[n, place])
            remark = "" if change != change else f"{100 * change:+.1f}"
        elif usual:
            remark = f"×{share / usual:.1f}"
        if share > 0:
            bars.append([int(level.labels[place]), round(share, 5), remark])
    return bars, round(float(shares.max()), 5)


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
    found = []
    for level in levels:
        of_level = sample.coefficients[level.layer, level.level]
        values, experts = of_level.topk(min(STRONGEST, of_level.shape[1]))
        found.append(
            [
                [[int(n), round(float(a), 3)] for n, a in zip(ns, each, strict=True) if not a <= 0]
                for ns, each in zip(experts, values, strict=True)
            ]
        )
    return {"tokens": sample.tokens, "given": sample.given, "levels": found}
