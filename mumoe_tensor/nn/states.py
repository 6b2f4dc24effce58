"""Atomic loading of module states."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


class WholeState(nn.Module):
    """A module that stays unchanged when a state that does not fit is loaded.

    Other torch modules load everything that fits, and then raise an error.
    """

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as in every module, but change nothing if it does not fit.

        In a model that contains the layer, torch loads one module after another. Shapes, types and edits are
        then checked before the layer is changed, but after earlier modules have been loaded. torch reports
        missing and unexpected names after everything else has been loaded; this also applies to a layer with
        hooks that change the names in its state.

        Raises
        ------
        ValueError
            If shapes, types or edits do not match the config of the layer.
        RuntimeError
            If names are missing or unexpected, as in every module.
        """
        state = dict(state_dict)
        expected = self._expected(state, "")
        _check(state, expected)
        if strict and not any(module._load_state_dict_pre_hooks for module in self.modules()):
            missing = [name for name in expected if name not in state]
            unexpected = [name for name in state if name not in expected]
            if missing or unexpected:
                raise RuntimeError(
                    f"Error(s) in loading state_dict for {type(self).__name__}: Missing key(s): {missing}. "
                    f"Unexpected key(s): {unexpected}."
                )
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Called before the submodules load their states, so nothing has changed yet.
        _check(state_dict, self._expected(state_dict, prefix))
        self._make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _expected(self, state: MutableMapping[str, Any], prefix: str) -> dict[str, Any]:
        """The entries to be loaded, by name. Old names in the state are replaced by current ones."""
        expected = dict(self.state_dict(prefix=prefix, keep_vars=True))
        for name, child in self.named_children():
            if isinstance(child, WholeState):
                expected |= child._expected(state, f"{prefix}{name}.")
        return expected

    def _make_room(self, state: Mapping[str, Any], prefix: str) -> None:
        """Create submodules that exist only in a state that fits."""


def _check(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise an error that lists the expected entries of a state that do not fit."""
    wrong = []
    for name, present in expected.items():
        if name not in state or not isinstance(present, Tensor) or nn.parameter.is_lazy(present):
            continue
        value = state[name]
        if not torch.overrides.is_tensor_like(value):
            wrong.append(f"{name} is not a tensor but a {type(value).__name__}")
        elif value.layout != present.layout or (value.is_meta and not present.is_meta):
            where = "on the meta device" if value.is_meta else f"of layout {value.layout}"
            wrong.append(f"{name} must be a strided tensor with values, and is {where}")
        elif value.shape != present.shape and (present.ndim or value.shape != (1,)):  # as of old states
            wrong.append(f"{name} has shape {tuple(value.shape)} and should have {tuple(present.shape)}")
        elif (value.is_complex() and not present.is_complex()) or (
            present.is_floating_point() and not value.is_floating_point()
        ):
            wrong.append(f"{name} has dtype {value.dtype} and should have one like {present.dtype}")
    if wrong:
        raise ValueError(f"a state must match the config of the layer; {'; '.join(wrong)}.")
