"""Accuracy of the worst subpopulation against accuracy of all, for a classifier of age on images of faces.

Oldfield et al. (2024), bias correction; lines and markers as in ``bias_correction``.

Settings: embeddings of UTKFace by EfficientNet-Lite2, CP with 128 experts of rank 512, strengths from 0 to 8,
5 seeds, means over test rows; at the chosen strength the 95 % interval. See ``docs/experiments/faces.md``.
"""

from __future__ import annotations

from mumoe_tensor.ledger import Row
from paper_figures.bias_correction import FACES, draw, means

__all__ = ["draw", "rows"]


def rows(quick: bool) -> list[Row]:
    """Rows of the tasks with faces, see `means`."""
    return means(FACES)
