"""Accuracy of each class without an expert, on validation rows: see ``docs/experiments/heads.md``.

python -m paper_figures.experiments.removal
"""

from __future__ import annotations

from mumoe_tensor.analysis import ablation_effects
from mumoe_tensor.ledger import Row
from paper_figures.experiments import command
from paper_figures.experiments.heads import LOOKED_AT, Run, learning_rate, parts, trained
from paper_figures.experiments.tables import write_table

TABLE = "heads_removal"


def changes(run: Run) -> list[Row]:
    """Change in the accuracy of every class on the validation rows, removing one expert at a time."""
    head, *_ = trained(run, learning_rate(run))
    _, validation = parts()
    effects = ablation_effects(head, head, [(validation.x, validation.y)], 10)
    return [
        {"experts": run.experts[0], "expert": expert, "label": label, "change": round(change, 6)}
        for expert, row in enumerate(effects.tolist())
        for label, change in enumerate(row)
    ]


def remove_all() -> None:
    """Remove every expert of the layers of seed 0 whose images are shown."""
    write_table(TABLE, [row for n in LOOKED_AT for row in changes(Run("single", "cp", (n,)))])


STEPS = remove_all

if __name__ == "__main__":
    command.run("removal")
