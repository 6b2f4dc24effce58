"""The published layers a study can be made of."""

from __future__ import annotations

from dataclasses import dataclass

from mumoe_tensor.checks import as_positive


@dataclass(frozen=True)
class Layer:
    """Sizes of a dense layer, or of a block of two with GELU between, that a mixture takes the place of.

    Attributes
    ----------
    title : str
        What it is, for headings.
    in_features, out_features : int
    hidden : int or None
        Size between the two layers of a block.
    experts : int
        Number of experts it is studied with unless another is asked for.
    """

    title: str
    in_features: int
    out_features: int
    hidden: int | None = None
    experts: int = 256

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes from the input to the output."""
        return tuple(n for n in (self.in_features, self.hidden, self.out_features) if n is not None)

    @property
    def kind(self) -> str:
        """What the dense original is called."""
        return "linear layer" if self.hidden is None else "dense MLP"

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "experts"):
            object.__setattr__(self, name, as_positive(getattr(self, name), name))  # (it is frozen)
        if self.hidden is not None:
            object.__setattr__(self, "hidden", as_positive(self.hidden, "hidden"))

    def __str__(self) -> str:
        return f"{self.title}, {' → '.join(map(str, self.sizes))}"


#: By the name the command line takes. Sizes as published: Radford et al. (2019) for GPT-2 124M, Tolstikhin
#: et al. (2021) for MLP-Mixer S-16 at 224 px, Radford et al. (2021) for the CLIP ViT-B/32 features.
LAYERS = {
    "gpt2-mlp": Layer("GPT-2 MLP", 768, 768, hidden=3072),
    "clip-head": Layer("CLIP ViT-B/32 head", 768, 1000),
    "mixer-s16-token": Layer("MLP-Mixer S-16 token MLP", 196, 196, hidden=256, experts=64),
    "mixer-s16-channel": Layer("MLP-Mixer S-16 channel MLP", 512, 512, hidden=2048, experts=64),
}


def get_layer(layer: str | Layer) -> Layer:
    """Look a published layer up by its name; a `Layer` is returned as it is.

    Parameters
    ----------
    layer : str or Layer

    Raises
    ------
    ValueError
        If no layer has that name.
    TypeError
        If `layer` is neither a name nor a `Layer`.
    """
    if isinstance(layer, Layer):
        return layer
    if not isinstance(layer, str):
        raise TypeError(f"a layer is a name or a Layer instance, got {layer!r}.")
    if layer not in LAYERS:
        raise ValueError(f"unknown layer {layer!r}; the layers are {', '.join(map(repr, LAYERS))}.")
    return LAYERS[layer]
