"""The dense layers to study."""

from __future__ import annotations

from dataclasses import dataclass

from mumoe_tensor.checks import as_positive
from mumoe_tensor.spec import LayerSpec


@dataclass(frozen=True)
class Layer:
    """A dense linear layer, or an MLP of two with a GELU between, that mixtures are to replace.

    Attributes
    ----------
    title : str
        Its name in headings.
    in_features, out_features : int
    hidden : int, optional
        Hidden size of an MLP.
    bias : bool, default True
    experts : int, default 256
        Default number of experts in a study.

    Raises
    ------
    ValueError
        If a size is not positive.
    """

    title: str
    in_features: int
    out_features: int
    hidden: int | None = None
    bias: bool = True
    experts: int = 256

    def __post_init__(self) -> None:
        spec = self.spec
        for name in ("in_features", "out_features", "hidden"):
            object.__setattr__(self, name, getattr(spec, name))  # the class is frozen
        object.__setattr__(self, "experts", as_positive(self.experts, "experts"))

    def __str__(self) -> str:
        return f"{self.title}, {' → '.join(map(str, features(self.spec)))}"

    @property
    def spec(self) -> LayerSpec:
        """The layer without experts."""
        return dense(self.in_features, self.out_features, self.hidden, self.bias)

    @property
    def kind(self) -> str:
        """Name of the dense layer in sentences."""
        return "linear layer" if self.hidden is None else "dense MLP"


def dense(in_features: int, out_features: int, hidden: int | None = None, bias: bool = True) -> LayerSpec:
    """The spec of a linear layer or, with a hidden size, of an MLP."""
    return LayerSpec(
        "dense", experts=(), in_features=in_features, hidden=hidden, out_features=out_features, bias=bias
    )


def features(spec: LayerSpec) -> tuple[int, ...]:
    """Feature sizes from input to output: two, or three for an MLP."""
    return (spec.in_features, *(layer.out_features for layer in spec.layers))


#: Layers by their names on the command line, in published sizes: Radford et al. (2019) for GPT-2 124M,
#: Tolstikhin et al. (2021) for MLP-Mixer S-16 at 224 px, Radford et al. (2021) for CLIP ViT-B/32 features.
LAYERS = {
    "gpt2-mlp": Layer("GPT-2 MLP", 768, 768, hidden=3072),
    "clip-head": Layer("CLIP ViT-B/32 head", 768, 1000),
    "mixer-s16-token": Layer("MLP-Mixer S-16 token MLP", 196, 196, hidden=256, experts=64),
    "mixer-s16-channel": Layer("MLP-Mixer S-16 channel MLP", 512, 512, hidden=2048, experts=64),
}
