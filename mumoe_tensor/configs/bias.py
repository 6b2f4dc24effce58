"""The config of the bias-correction experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mumoe_tensor.checks import as_positive


@dataclass(frozen=True)
class Recipe:
    """Settings for making, training and correcting the models.

    Attributes
    ----------
    epochs, batch_size : int
    seeds : int
        Number of training runs of each model.
    experts, rank : int
        Number of experts and rank of the μMoE, in the CP format.
    hidden : int
        Size between the two maps of the high-rank linear model.
    learning_rates, repetitions, alphas : tuple
        Candidates, of which one is chosen on validation rows; for α see fairlearn's
        `AdversarialFairnessClassifier`.
    strengths : tuple of float
        Average amounts that corrections add to the logits of the subpopulation; the first is 0.

    Raises
    ------
    ValueError, TypeError
        If `seeds` is not a positive integer.
    """

    epochs: int
    batch_size: int
    seeds: int = 5
    experts: int = 128
    rank: int = 512
    hidden: int = 1024
    learning_rates: tuple[float, ...] = (0.001, 0.01, 0.1)
    repetitions: tuple[int, ...] = (4, 16, 64)
    alphas: tuple[float, ...] = (0.01, 0.1, 1.0)
    strengths: tuple[float, ...] = tuple(k / 4 for k in range(33))

    def __post_init__(self) -> None:
        as_positive(self.seeds, "seeds")

    def quick(self) -> Recipe:
        """A small and short recipe for the same data, for a quick check that everything works."""
        return replace(
            self, epochs=1, seeds=1, experts=8, rank=16, hidden=16, learning_rates=(0.01,), repetitions=(4,),
            alphas=(0.1,), strengths=(0.0, 2.0, 4.0),
        )  # fmt: skip


#: Recipes by the name of the data.
RECIPES = {"celeba": Recipe(epochs=6, batch_size=2048), "adult": Recipe(epochs=20, batch_size=512)}
