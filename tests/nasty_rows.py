"""Rows of logits on which a gate is easily wrong."""

from __future__ import annotations

from functools import cache

import numpy as np

INF = np.inf


def slow(n: int, ratio: float, gap: float, first: float, second: float) -> np.ndarray:
    """Clouds each smaller and closer than the one before: Newton's method loses about one of them a step."""
    left = np.floor(max(n - 2, 1) * ratio ** np.arange(60))
    counts = -np.diff(np.append(left[left >= 1], 0)).astype(int)
    levels = np.cumsum(first * gap ** np.arange(-1, len(counts) - 1)) - first / gap
    return np.concatenate([[1, second * levels[-1]], np.repeat(levels, counts)])[:n]


@cache
def nasty(n: int) -> dict[str, np.ndarray]:
    """Rows of size n in float32."""
    rng = np.random.default_rng(n)
    normal, uniform = rng.standard_normal(n), rng.random(n)
    first = np.arange(n) == 0
    half = (np.arange(n) % 2 == 0) | first
    rows = {
        "all equal": np.full(n, 0.3),
        "normal": normal,
        "offset 1e4": 1e4 + normal,
        "offset -1e4": uniform - 1e4,
        "every second masked": np.where(half, normal, -INF),
        "all but one masked": np.where(first, 0.7, -INF),
        "masked by the least float": np.where(half, normal, np.finfo(np.float32).min),
        # The roots of one and of two equal large values, hit exactly by all others.
        "ties at the threshold": np.where(first, 0.0, -2.0),
        "ties at the threshold, sparsemax": np.where(first, 0.0, -1.0),
        "ties at a rounded threshold": np.where(np.arange(n) < 2, 0.0, -np.sqrt(2)),
        # The k-th largest has equals before and behind it.
        "few values": np.round(normal),
        "slow for entmax15": 2 * slow(n, 0.55, 0.492, 0.1, 4),
        "slow for sparsemax": slow(n, *((0.65, 0.446, 0.2, 2) if n < 2**16 else (0.6, 0.6, 0.05, 2))),
    }
    for scale in (1e-6, 1e-3, 1e-1, 1e1, 1e3, 1e6):
        rows[f"spread {scale:g}"] = scale * normal
    for share in (0.01, 0.3, 0.9):
        # A cloud that together has about this share of the mass, under one large value.
        rows[f"cloud of {share:g}"] = np.where(
            first, 2 * np.sqrt(1 - share), 2 * np.sqrt(share / n) + 1e-4 * uniform
        )
        rows[f"cloud of {share:g}, sparsemax"] = np.where(first, 1 - share, share / n + 1e-8 * uniform)
        rows[f"tied cloud of {share:g}"] = np.where(first, 2.00003 - 2 * share, 0.1)
    return {name: row.astype(np.float32) for name, row in rows.items()}
