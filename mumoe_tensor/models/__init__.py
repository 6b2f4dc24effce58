"""Whole models with layers of experts, and the networks whose features these see."""

from mumoe_tensor.models.backbones import Backbone, load_backbone
from mumoe_tensor.models.heads import Head, load_head, save_head

__all__ = ["Backbone", "Head", "load_backbone", "load_head", "save_head"]
