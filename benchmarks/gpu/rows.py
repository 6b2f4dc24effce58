"""Shared definitions of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: A row of a stage's table, with one entry per column.
Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
MIB = 2**20
#: Rounds of a comparison, and seconds per turn and in total.
BRIEF: dict[str, Any] = {"rounds": 9, "turn": 1e-3, "limit": 0.2}
