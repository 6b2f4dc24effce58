"""What is below a head, and which rows it is trained on."""

from __future__ import annotations

from dataclasses import dataclass


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
