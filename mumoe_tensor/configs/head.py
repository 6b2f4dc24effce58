"""A head, its backbone, and the split of its data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mumoe_tensor.configs.kinds import Budget, FormatEntry, Levels, Rank

#: The format name for a head without experts.
LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class HeadModelConfig:
    """The settings of the head itself, see `.models.Head`.

    Attributes
    ----------
    format : str or dict
        Tensor format of the experts; linear for a dense head.
    experts : tuple of int
        Number of experts, such as 64, or 8x8 for two levels.
    hidden : int or None
        Hidden size of a head with two layers. By default the head has one layer.
    rank : tuple of int and None, or None
        Rank, one number per bond; ? for the number that --parameters determines, such as 4,4,?. By default
        the smallest rank at which an expert can have full rank.
    parameters : int or str or None
        Instead of a rank: a number of parameters, match for that of the dense head, or a multiple such as 2x.
        Gate and biases are included.
    gate : str
        Gate function: entmax15, sparsemax or softmax.
    gate_norm : {"batch", "layer", "none"}
        Normalization of the gate's logits: batch, layer or none.
    """

    format: FormatEntry = "cp"
    experts: Levels = (64,)
    hidden: int | None = None
    rank: Rank | None = None
    parameters: Budget | None = None
    gate: str = "entmax15"
    gate_norm: Literal["batch", "layer", "none"] = "batch"

    def arguments(self) -> dict[str, Any]:
        """Arguments of `.models.Head`, without those that a dense head ignores."""
        ignored = ("experts", "gate", "gate_norm") if self.format == LINEAR else ()
        return {name: value for name, value in asdict(self).items() if name not in ignored}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The source of a head's features, and the split into training and validation.

    Attributes
    ----------
    labels : str or None
        An IDX file with the labels of images.
    backbone : str or None
        Network that computes the features of images: efficientnet-lite0, the default on the command line, or
        the name of a timm model.
    weights : str or None
        File of the backbone's weights; the command line defaults to the file that ``mumoe-tensor data``
        fetches.
    size : int
        Height and width that images are scaled to, in pixels.
    train_backbone : bool
        Whether to train the backbone together with the head.
    validation : float
        Fraction of the rows held out for validation.

    Raises
    ------
    ValueError
        If the attributes are inconsistent.
    """

    labels: str | None = None
    backbone: str | None = None
    weights: str | None = None
    size: int = 64
    train_backbone: bool = False
    validation: float = 0.2

    def __post_init__(self) -> None:
        if (self.backbone is None) != (self.weights is None):
            raise ValueError(
                "a backbone must have a name and a file of weights, got "
                f"backbone={self.backbone!r} and weights={self.weights!r}."
            )
        if self.backbone is None and (self.train_backbone or self.labels is not None):
            raise ValueError("images need a backbone; without one, inputs must be features.")
        if self.size < 1:
            raise ValueError(f"the size of images must be positive, got {self.size}.")
