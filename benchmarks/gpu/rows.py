"""What the files of stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: One entry a column of a stage's table.
Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
MIB = 2**20
#: Rounds of a comparison, and seconds of a turn and of all of them.
BRIEF: dict[str, Any] = {"rounds": 9, "turn": 1e-3, "limit": 0.2}
