"""Layers within models of transformers: ``save_pretrained`` writes them and ``from_pretrained`` reads them.

Import this module before a model is loaded. It registers a method of transformers' quantizers, which puts the
layers into the empty model before its weights are loaded. Without it the weights do not fit, and loading
fails.
"""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.extras import check_torchvision, require
from mumoe_tensor.nn.described import describe, rebuild
from mumoe_tensor.nn.saving import VERSION, check_version

require("transformers")
check_torchvision()

from transformers import PreTrainedModel  # noqa: E402
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "mumoe_tensor"


@register_quantization_config(METHOD)
class LayersConfig(QuantizationConfigMixin):
    """The description of the layers, as the entry ``quantization_config`` of a model's config.

    Parameters
    ----------
    layers : dict
        See `.describe`.
    """

    def __init__(self, layers: dict[str, Any], version: int = VERSION, quant_method: str = METHOD):
        self.quant_method: Any = quant_method
        self.version, self.layers = version, layers
        check_version(vars(self))


@register_quantizer(METHOD)
class LayersQuantizer(HfQuantizer):
    """What transformers calls before and after it loads weights, and before it saves them."""

    quantization_config: LayersConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._names: list[str] = []
        dense = []
        for name, entry in self.quantization_config.layers.items():
            place = _place(model, name)
            if place is None:  # in another head
                continue
            old = model.get_submodule(place)
            dense += [f"{place}.{key}" for key, _ in old.named_parameters()]
            model.set_submodule(place, rebuild(entry, device="meta").train(old.training))
            self._names.append(place)
        prefix = f"{model.base_model_prefix}."
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(rf"(^|\.){re.escape(key.removeprefix(prefix))}$" for key in dense),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        state = model.state_dict(keep_vars=True)
        below = tuple(f"{name}." for name in self._names)
        missing = [
            key
            for key, value in state.items()
            # (What is offloaded to disk is read later.)
            if key.startswith(below) and not (value.is_meta or getattr(value, "_is_hf_initialized", False))
        ]
        if missing:
            raise ValueError(f"the weights must have all factors of the layers; {missing} are missing.")
        # Else transformers refuses `half`, `float` and training.
        model.is_quantized = False
        del model.quantization_method
        mark(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        _update_configs(model)
        config = getattr(model.config, "quantization_config", None)
        return (None if config is None else {**_empty(model, config.layers), **model.state_dict()}), {}


def mark(model: nn.Module) -> None:
    """Let the models of transformers with layers, a model and those within it, save them."""
    for module in _models(model):
        present = getattr(module, "hf_quantizer", None)
        if present is None:
            module.hf_quantizer = LayersQuantizer(LayersConfig({}))
        elif not isinstance(present, LayersQuantizer):
            warnings.warn(
                "save_pretrained does not write layers of experts within a quantised model, as one of "
                f"{type(present).__name__}; use mumoe_tensor.nn.save.",
                stacklevel=2,
            )
    with suppress(ValueError):  # which saving raises
        _update_configs(model)


def _models(model: nn.Module) -> list[Any]:
    """The models of transformers in a model, itself first."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _update_configs(model: nn.Module) -> None:
    """Write the layers in a model into its config, and those in models within it into theirs.

    A model and its base have one config. So a model is also saved with the layers that its base had before.
    """
    outermost: dict[int, Any] = {}
    for module in _models(model):
        if isinstance(getattr(module, "hf_quantizer", None), LayersQuantizer):
            outermost.setdefault(id(module.config), module)
    for module in outermost.values():
        layers = describe(module)
        if layers:
            module.config.quantization_config = LayersConfig(layers)
        else:
            vars(module.config).pop("quantization_config", None)


def _place(model: Any, name: str) -> str | None:
    """The name in a model of a module in another with the same base, or None if there is no such module."""
    prefix = f"{model.base_model_prefix}."
    names = {module_name for module_name, _ in model.named_modules()}
    return next((x for x in (name, name.removeprefix(prefix), prefix + name) if x in names), None)


def _empty(model: Any, layers: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that fit nowhere under the names of the weights that the layers replaced.

    They make loading fail where this module has not been imported: transformers would draw new weights.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=()):
        dense = type(model)(copy.deepcopy(model.config))
    places = dict(dense.named_modules())
    if new := [name for name in layers if name not in places]:
        raise ValueError(f"layers must replace modules that the config of the model makes; {new} do not.")
    return {
        # (transformers splits those of a stack of experts into parts.)
        f"{name}.{key}": torch.zeros((1, 2, 1) if value.ndim == 3 else (0,), dtype=model.dtype)
        for name in layers
        for key, value in places[name].named_parameters()
    }
