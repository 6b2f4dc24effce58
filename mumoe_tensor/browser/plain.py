"""Experts, and a text that a model wrote, as the plain values that the page reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mumoe_tensor.browser.collect import ExpertLevel

#: Labels that a card shows, and experts of a token of a written text that are kept.
BARS, STRONGEST = 5, 8


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


def plain_levels(
    levels: list[ExpertLevel], shaded: bool | Mapping[str, Any], most: int | None = None
) -> list[dict[str, Any]]:
    """Levels, layer after layer.

    Parameters
    ----------
    levels : list of ExpertLevel
    shaded : bool, or mapping of layers
        Whether the coefficients of single rows are shown, or the layers whose are.
    most : int, optional
        Only so many experts of a level: those with the largest mean coefficients, above zero.
    """
    return [
        {
            "layer": level.layer or "model",
            "level": level.level,
            "total": len(level.top),
            # Coefficients that sum to one are shares; others may be of any size.
            "shares": not abs(float(level.usage.mean.sum()) - 1) > 1e-3,
            "experts": [
                _plain_expert(level, n, shaded if isinstance(shaded, bool) else level.layer in shaded)
                for n in _most_used(level.usage.mean, most)
            ],
        }
        for level in levels
    ]


def _most_used(mean: Tensor, most: int | None) -> list[int]:
    if most is None:
        return [*range(len(mean))]
    used = mean.argsort(descending=True, stable=True)[: min(most, int((mean > 0).sum()))]
    return used.sort().values.tolist()


def _plain_expert(level: ExpertLevel, n: int, is_shaded: bool) -> dict[str, Any]:
    shown = [(int(i), float(a)) for i, a in zip(level.top[n], level.coefficients[n], strict=True) if i >= 0]
    bars, clarity = _bars(level, n)
    return {
        "n": n,
        "mean": round(float(level.usage.mean[n]), 6),
        "load": round(float(level.usage.load[n]), 6),
        "clarity": clarity,
        "bars": bars,
        "effect": _effect(level, n),
        "top": [
            {
                "i": index,
                "a": round(a, 4),
                "rows": [round(x, 3) for x in level.rows.get((n, index), ())] if is_shaded else [],
            }
            for index, a in shown
        ],
    }


def _effect(level: ExpertLevel, n: int) -> float | None:
    """Sum of the changes of the classes, or the change of the loss; None if the expert was not removed."""
    if level.effects is None or level.effects[n].isnan().all():
        return None
    effects = level.effects[n].nan_to_num(0.0, float("inf"), -float("inf"))
    return round(float(effects.abs().sum() if effects.ndim else effects), 6)


def _bars(level: ExpertLevel, n: int) -> tuple[list[list[Any]], float]:
    """Labels that coefficients go to beyond their frequency, as (label, share, remark); the largest share.

    The remark is the change of the class's accuracy without the expert, or of a token how many times larger
    its share is than that among all tokens.
    """
    if level.sums is None or level.labels is None or level.frequency is None or not level.sums[n].any():
        return [], 0.0
    shares = level.sums[n] / level.sums[n].sum()
    bars = []
    for place in (shares - level.frequency).argsort(descending=True, stable=True)[:BARS].tolist():
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


def plain_sample(sample: Sample, levels: list[ExpertLevel]) -> dict[str, Any]:
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
    return {"tokens": sample.tokens, "given": sample.given, "about": sample.about, "levels": found}
