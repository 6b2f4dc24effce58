"""Checkpoints: everything a training run needs to resume as if it had not been interrupted.

A checkpoint is one safetensors file, so nothing is unpickled. The order of the rows, all random numbers and
the learning rate are functions of the step, so only the step is stored for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from mumoe_tensor.nn.experts import Experts, rename_factors
from mumoe_tensor.nn.weights import check_tensors, checksum_of_bytes, read_tensors, write_tensors
from mumoe_tensor.readers import parse_json

State = dict[str, Tensor]


class DamagedCheckpoint(ValueError):
    """A checkpoint is missing or corrupt."""


class Snapshot(NamedTuple):
    """The full state of a model and its optimizer, on the CPU; empty on all processes but the first.

    Attributes
    ----------
    model : dict of str to Tensor
    optimizer : dict of str to Tensor
        Keys are the name of a parameter, a slash, and the name of an optimizer state such as ``exp_avg``.
    """

    model: State
    optimizer: State


def model_state(model: nn.Module) -> State:
    """A copy of a model's state, gathered from all processes; empty on every process but the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items()}


def restore_model(model: nn.Module, state: State) -> None:
    """Load a state returned by `model_state` into a model; all processes load the first one's."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    options, renamed = _whole(), _renamed(model, state)
    # Torch accepts a state with missing tensors. (With several processes, only the first has a state.)
    odd = sorted(set(get_model_state_dict(model)) ^ set(renamed))
    if odd and (state or not options.broadcast_from_rank0):
        raise ValueError(f"the keys must be those of the model; {odd[0]} is missing or unknown.")
    set_model_state_dict(model, renamed, options=options)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """The state of a model and its optimizer, gathered from all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    kept = {
        f"{name}/{key}": value
        for name, values in state.get("state", {}).items()
        for key, value in values.items()
    }
    return Snapshot(model_state(model), kept)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: Snapshot) -> None:
    """Load a result of `snapshot` into a model and its optimizer; all processes load the first one's."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    restore_model(model, state.model)
    # (Torch does not allocate the optimizer's state while parameters have gradients.)
    optimizer.zero_grad(set_to_none=True)
    kept: dict[str, State] = {}
    for path, value in _renamed(model, state.optimizer).items():
        name, _, key = path.rpartition("/")
        kept.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    if len({frozenset(values) for values in kept.values()}) > 1 or not {*names.values()}.issuperset(kept):
        raise ValueError("the optimizer must have the same state entries for every parameter, and no others.")
    # The rest of the optimizer's state is its settings, which it was constructed with.
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    whole: Any = {"state": kept, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=_whole())


def _renamed(model: nn.Module, state: State) -> dict[str, Any]:
    """A state with the keys that earlier versions wrote renamed to the current ones."""
    renamed = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            rename_factors(renamed, f"{name}." if name else "")
    return renamed


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    shared = distributed.is_available() and distributed.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=shared)


class Checkpoints:
    """The checkpoints of a run: the last two, each named after its step.

    Parameters
    ----------
    folder : Path
    """

    kept = 2

    def __init__(self, folder: Path):
        self._folder = folder

    def path(self, step: int) -> Path:
        """The path of the checkpoint of a step."""
        return self._folder / f"step-{step:08d}.safetensors"

    @property
    def steps(self) -> list[int]:
        """The steps that have checkpoints, in ascending order."""
        return sorted(
            int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.safetensors")
        )

    def tidy(self) -> None:
        """Remove partial files left by a process that was killed while writing."""
        for path in self._folder.glob(".step-*"):
            path.unlink()

    def write(self, step: int, state: Snapshot, best: State, progress: dict[str, Any]) -> None:
        """Write a checkpoint atomically, with the best state so far, and remove all but the last two.

        If it cannot be written, the OSError names the step and the last good checkpoint.
        """
        parts = {"model": state.model, "optimizer": state.optimizer, "best": best}
        tensors = {
            f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()
        }
        try:
            write_tensors(self.path(step), tensors, {"checkpoint": json.dumps({"progress": progress})})
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written ({error.strerror or error}); "
                f"{self.last()}."
            ) from error
        for old in self.steps[: -self.kept]:
            self.path(old).unlink()

    def read(self, step: int) -> tuple[Snapshot, State, dict[str, Any]]:
        """Read the arguments that `write` was called with.

        Raises
        ------
        DamagedCheckpoint
            If there is no checkpoint of this step, or a tensor in it is corrupt; the message names the tensor
            and the last good checkpoint.
        """
        path = self.path(step)
        if not path.exists():
            raise DamagedCheckpoint(
                f"there is no checkpoint of step {step} in {self._folder}; {self.last()}."
            )
        parts: dict[str, State] = {"model": {}, "optimizer": {}, "best": {}}
        try:
            tensors, about = read_tensors(path)
            entries = parse_json(about.get("checkpoint", "{}"))
            if "progress" not in entries:
                raise ValueError("it must have the entry progress.")
            if "checksums" in entries:  # where version 0.1 stores them; they cover the bytes only
                check_tensors(tensors, entries["checksums"], checksum_of_bytes)
            for name, value in tensors.items():
                part, _, own = name.partition("/")
                if part not in parts:
                    raise ValueError(f"keys must start with one of {', '.join(parts)}; {name} does not.")
                parts[part][own] = value
            return Snapshot(parts["model"], parts["optimizer"]), parts["best"], entries["progress"]
        except (ValueError, OSError) as error:
            raise self.damaged(step, str(error)) from error

    def damaged(self, step: int, how: str) -> DamagedCheckpoint:
        """The error to raise for the checkpoint of a step."""
        path = self.path(step)
        how = how.removeprefix(f"{path}: ")
        return DamagedCheckpoint(
            f"the checkpoint of step {step}, {path}, cannot be read: {how} {self.last(step)}."
        )

    def last(self, before: int | None = None) -> str:
        """A phrase that names the last good checkpoint before a step, or the last of all."""
        for step in reversed(self.steps):
            if before is None or step < before:
                try:
                    self.read(step)
                except DamagedCheckpoint:
                    continue
                return f"the last good checkpoint is from step {step}, {self.path(step)}"
        return "there is no good checkpoint"
