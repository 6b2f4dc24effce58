"""Models with layers of experts, and backbones that compute features for them."""

from mumoe_tensor.models.backbones import Backbone, load_backbone
from mumoe_tensor.models.gpt2 import GPT2, GPT2Config
from mumoe_tensor.models.heads import Head, load_head, save_head
from mumoe_tensor.models.mixer import Mixer, MixerConfig
from mumoe_tensor.models.saved import load_model, save_model

__all__ = [
    "GPT2",
    "Backbone",
    "GPT2Config",
    "Head",
    "Mixer",
    "MixerConfig",
    "load_backbone",
    "load_head",
    "load_model",
    "save_head",
    "save_model",
]
