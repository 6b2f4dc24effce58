"""The GPU check, ``python -m benchmarks.gpu``: stages in separate processes, each with a time limit."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Rounds of a comparison, and seconds per turn and in total.
BRIEF: dict[str, Any] = {"rounds": 9, "turn": 1e-3, "limit": 0.2}
