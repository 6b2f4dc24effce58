"""Saving and loading layers in transformers models with ``save_pretrained`` and ``from_pretrained``.

Import this module before loading a model. It registers a quantization method of transformers that puts the
layers into the empty model before its weights are loaded. Otherwise the weights do not fit, and loading
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
    """The description of the layers, stored as ``quantization_config`` in the config of a model.

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
    """Hooks that transformers calls before and after loading weights, and before saving them."""

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
            # Parameters that are offloaded to disk are read later.
            if key.startswith(below) and not (value.is_meta or getattr(value, "_is_hf_initialized", False))
        ]
        if missing:
            raise ValueError(f"the weights must have all factors of the layers; {missing} are missing.")
        # Otherwise transformers refuses `half`, `float` and training.
        model.is_quantized = False
        del model.quantization_method
        mark(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        _update_configs(model)
        config = getattr(model.config, "quantization_config", None)
        return (None if config is None else {**_empty(model, config.layers), **model.state_dict()}), {}


def mark(model: nn.Module) -> None:
    """Make a model and the transformers models inside it save their layers."""
    for module in _models(model):
        present = getattr(module, "hf_quantizer", None)
        if present is None:
            module.hf_quantizer = LayersQuantizer(LayersConfig({}))
        elif not isinstance(present, LayersQuantizer):
            warnings.warn(
                "save_pretrained does not save layers of experts in a quantised model, got one with "
                f"{type(present).__name__}; use mumoe_tensor.nn.save.",
                stacklevel=2,
            )
    with suppress(ValueError):  # which saving raises
        _update_configs(model)


def _models(model: nn.Module) -> list[Any]:
    """The transformers models in a model, including itself."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _update_configs(model: nn.Module) -> None:
    """Store the layers of a model, and of the models inside it, in their configs.

    A model and its base share one config, so a model is also saved with the layers that its base already had.
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
    """The name in `model` of a module from another model with the same base, or None."""
    prefix = f"{model.base_model_prefix}."
    names = {module_name for module_name, _ in model.named_modules()}
    return next((x for x in (name, name.removeprefix(prefix), prefix + name) if x in names), None)


def _empty(model: Any, layers: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a wrong shape under the names of the weights that the layers replaced.

    They make loading fail if this module has not been imported; otherwise transformers would silently
    initialise new weights.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=()):
        dense = type(model)(copy.deepcopy(model.config))
    places = dict(dense.named_modules())
    if new := [name for name in layers if name not in places]:
        raise ValueError(f"layers must replace modules that the model's config creates; {new} do not.")
    return {
        # transformers splits the weights of a stack of experts.
        f"{name}.{key}": torch.zeros((1, 2, 1) if value.ndim == 3 else (0,), dtype=model.dtype)
        for name in layers
        for key, value in places[name].named_parameters()
    }
