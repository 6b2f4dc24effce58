"""Draw figures: ``python -m paper_figures [NAME ...] [--quick] [--out FOLDER]``."""

from functools import partial
from importlib import import_module
from pathlib import Path

from paper_figures.common import run

FIGURES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "__main__", "common")
)

if __name__ == "__main__":
    run({name: partial(import_module, f"paper_figures.{name}") for name in FIGURES})
