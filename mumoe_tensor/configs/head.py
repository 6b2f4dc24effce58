"""A head, what is below it, and which rows it is trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mumoe_tensor.configs.kinds import Budget, FormatEntry, Levels, Rank

#: The name of a head without experts, where others have that of a format.
LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class HeadModelConfig:
    """The head itself, see `.models.Head`.

    Attributes
    ----------
    format : str or dict
        Tensor format of the experts; linear for a dense head.
    experts : tuple of int
        Number of experts, e.g. 64, or 8x8 for two levels.
    hidden : int or None
        Hidden size of a head of two layers. By default the head has one layer.
    rank : tuple of int and None, or None
        Rank, one number per bond; ? for the one that --parameters determines, e.g. 4,4,?. By default the
        smallest at which an expert can have full rank.
    parameters : int or str or None
        Instead of a rank: a number of parameters, match for those of the dense head, or a multiple as 2x.
        Gate and biases count.
    gate : str
        Gate function: entmax15, sparsemax or softmax.
    gate_norm : {"batch", "layer", "none"}
        Norm of the gate's logits: batch, layer or none.
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
    """Where the features of a head come from, and how many are for training.

    Attributes
    ----------
    labels : str or None
        Labels of images in IDX.
    backbone : str or None
        Network below the head, where inputs are images: efficientnet-lite0, which the command line takes by
        default, or a model of timm.
    weights : str or None
        File of the network's weights; the command line takes what ``mumoe-tensor data`` fetched by default.
    size : int
        Height and width that images are scaled to, in pixels.
    train_backbone : bool
        Whether to train the network too, not the head alone.
    validation : float
        Share of the rows held out for validation.

    Raises
    ------
    ValueError
        If choices do not fit together.
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
                "a backbone needs a name and a file of weights, got "
                f"backbone={self.backbone!r} and weights={self.weights!r}."
            )
        if self.backbone is None and (self.train_backbone or self.labels is not None):
            raise ValueError("images need a backbone below the head; without one inputs are features.")
        if self.size < 1:
            raise ValueError(f"the size of images must be positive, got {self.size}.")
