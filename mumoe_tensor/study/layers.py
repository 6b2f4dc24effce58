"""The published layers to study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mumoe_tensor.checks import as_positive
from mumoe_tensor.spec import LayerSpec


@dataclass(frozen=True)
class Layer:
    """A dense linear layer, or an MLP of two with a GELU between, that mixtures are to replace.

    Attributes
    ----------
    title : str
        Its name in headings.
    spec : LayerSpec
        Spec of the dense layer; see `dense`.
    experts : int
        Default number of experts in a study.

    Raises
    ------
    ValueError
        If the layer has experts.
    """

    title: str
    spec: LayerSpec
    experts: int = 256

    def __post_init__(self) -> None:
        spec = self.spec
        if spec != dense(spec.in_features, spec.out_features, spec.hidden, spec.bias):
            raise ValueError(f"a layer to study must be dense, got {spec!r}.")
        object.__setattr__(self, "experts", as_positive(self.experts, "experts"))  # the class is frozen

    def __str__(self) -> str:
        return f"{self.title}, {' → '.join(map(str, features(self.spec)))}"

    @property
    def kind(self) -> str:
        """Name of the dense layer in sentences."""
        return "linear layer" if self.spec.hidden is None else "dense MLP"

    # In ``study.json``, a layer is a flat object of title, sizes and experts.

    def entry(self) -> dict[str, Any]:
        """Plain data from which pydantic makes the layer again."""
        sizes = {name: getattr(self.spec, name) for name in ("in_features", "out_features", "hidden", "bias")}
        return {"title": self.title, **sizes, "experts": self.experts}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return handler.generate_schema(_from_entry)


def _from_entry(
    title: str,
    in_features: int,
    out_features: int,
    hidden: int | None = None,
    experts: int = 256,
    bias: bool = True,
) -> Layer:
    return Layer(title, dense(in_features, out_features, hidden, bias), experts)


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
    "gpt2-mlp": Layer("GPT-2 MLP", dense(768, 768, hidden=3072)),
    "clip-head": Layer("CLIP ViT-B/32 head", dense(768, 1000)),
    "mixer-s16-token": Layer("MLP-Mixer S-16 token MLP", dense(196, 196, hidden=256), experts=64),
    "mixer-s16-channel": Layer("MLP-Mixer S-16 channel MLP", dense(512, 512, hidden=2048), experts=64),
}


def get_layer(layer: str | Layer) -> Layer:
    """Look up a published layer by name; a `Layer` is returned unchanged.

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
        raise TypeError(f"a layer must be a name or a Layer, got {layer!r}.")
    if layer not in LAYERS:
        raise ValueError(f"unknown layer {layer!r}; the layers are {', '.join(map(repr, LAYERS))}.")
    return LAYERS[layer]
