"""Training of a layer to give the outputs that another one gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_finite
from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.replace.activations import ActivationRows, Activations
from mumoe_tensor.replace.penalty import Penalized
from mumoe_tensor.replace.usage import BATCH, counted, use_of
from mumoe_tensor.training.checkpoint import Checkpoints
from mumoe_tensor.training.log import Evaluation
from mumoe_tensor.training.trainer import Loss, evaluate, train

#: Inputs for each expert that a gate is fitted to, where there are more.
ROWS_PER_EXPERT = 8


@dataclass(frozen=True)
class Fit:
    """What came out of `fit`.

    Attributes
    ----------
    evaluations : list of Evaluation
        On the validation rows, while it was trained.
    nmse : float
        Normalised mean squared error of the layer on the validation rows, without the penalty.
    active : float or None
    dead : tuple of int
        See `ExpertUse`; on the validation rows.
    """

    evaluations: list[Evaluation]
    nmse: float
    active: float | None
    dead: tuple[int, ...]


def fit(
    layer: nn.Module,
    rows: ActivationRows | Activations,
    config: TrainConfig | None = None,
    *,
    validation: ActivationRows | Activations | None = None,
    folder: str | Path | None = None,
    penalty: float = 0.0,
    progress: bool = False,
) -> Fit:
    """Train a layer, in place, to map the inputs of another one to its outputs.

    The loss is the normalised mean squared error: the sum of ``|y - layer(x)|²`` over that of ``|y - m|²``,
    where m is the mean of the outputs of the training rows. Before the first step the layer's ``bias``
    becomes m. That of a gate without a norm, as `.ReLUTopK`, gives the mean input logits of zero, unless the
    bias has been set. A gate that can be fitted, as `.NearestCentres`, is fitted to some of the inputs.

    Parameters
    ----------
    layer : Module
        Maps inputs of shape (rows, in_features) to outputs of shape (rows, out_features). Of `.Transcoder`,
        `.MixtureOfDecoders`, `.MixtureOfTransforms`, or any other class; its parameters are of float32. May
        have a ``gate`` and a ``bias`` of shape (out_features,).
    rows : ActivationRows, or Activations of one module
    config : TrainConfig, optional
    validation : ActivationRows, or Activations of one module, optional
        Of other documents than `rows`. By default every tenth document of `rows`, which is not trained on.
    folder : str or Path, optional
        For checkpoints and curves, as of `.train`: the same call goes on from the last checkpoint.
    penalty : float, default 0.0
        Weight of the penalty that the loss has besides: the mean over rows of ``sum_n tanh(|a_n| |W_n|)``
        with the Frobenius norms of the experts, for gates with thresholds, as `.JumpReLU`. Of layers with a
        `mixture`.
    progress : bool, default False
        Show a bar with the time left (needs rich).

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If the layer does not map the inputs to outputs of that size, its parameters are not of float32, the
        outputs of all rows are the same, there is a penalty and no expert, the activations are of several
        modules, there are fewer than ten documents to hold some out, or as `.train`.
    TypeError
        If the layer is no module, or rows are no activations.
    """
    config, folder = config or TrainConfig(), None if folder is None else Path(folder)
    if as_finite(penalty, "penalty") < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}.")
    rows, validation = _of_one_module(rows), None if validation is None else _of_one_module(validation)
    if validation is None:
        rows, validation = _held_out(rows)
    if not rows.variance > 0:
        raise ValueError("the outputs of the training rows must differ; all are the same.")
    _check(layer, rows)
    error = normalised_error(rows.variance)
    model, loss = (Penalized(layer), _penalized(error, penalty)) if penalty else (layer, error)
    if folder is None or not Checkpoints(folder / "checkpoints").steps:
        _start(layer, rows, config.seed)
    evaluations = train(model, rows, validation, config, loss=loss, folder=folder, progress=progress)
    with torch.random.fork_rng(), counted(layer) as usages:
        torch.manual_seed(config.seed)  # for gates that draw experts
        nmse, _ = evaluate(layer, validation, batch_size=BATCH, loss=error)
    return Fit(evaluations, nmse, **use_of(usages)._asdict())


def _of_one_module(rows: ActivationRows | Activations) -> ActivationRows:
    if isinstance(rows, ActivationRows):
        return rows
    if not isinstance(rows, Activations):
        raise TypeError(f"rows must be Activations or those of a module, got {type(rows).__name__}.")
    if len(rows.modules) != 1:
        raise ValueError(
            f"a layer is fitted to one module; the activations are of {', '.join(rows.modules)}: give those "
            "of one, as activations[name]."
        )
    return rows[rows.modules[0]]


def _held_out(rows: ActivationRows) -> tuple[ActivationRows, ActivationRows]:
    """All rows but those of every tenth document, and these."""
    documents = rows.documents.unique()
    if len(documents) < 10:
        raise ValueError(
            f"to hold out every tenth document there must be ten; the rows are of {len(documents)}: give "
            "`validation`."
        )
    is_held = torch.arange(len(documents)) % 10 == 9
    return rows.take(documents[~is_held].tolist()), rows.take(documents[is_held].tolist())


def normalised_error(variance: float) -> Loss:
    """The mean over rows of ``|y - output|² / variance``, as a function of outputs and y."""
    return lambda output, y: (output - y).square().sum() / (len(y) * variance)


def _penalized(error: Loss, penalty: float) -> Any:
    """The loss of a `Penalized` layer."""
    return lambda outputs, y: error(outputs[0], y) + penalty * outputs[1]


@torch.no_grad()
def _check(layer: nn.Module, rows: ActivationRows) -> None:
    """Check that a layer maps the inputs to outputs of the right size."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"a layer must be a torch.nn.Module, got {layer!r}.")
    parameters = list(layer.parameters())
    if others := {p.dtype for p in parameters} - {torch.float32}:
        raise ValueError(
            f"the parameters of a layer to fit must be of float32, got {', '.join(map(str, others))}. "
            "A config with precision='bf16' makes products in bfloat16."
        )
    x = rows.batch([0, len(rows) - 1])[0].to(parameters[0].device)
    with evaluating(layer), torch.random.fork_rng():
        shape = tuple(layer(x).shape)
    if shape != (2, rows.out_features):
        raise ValueError(
            f"a layer must map inputs of {rows.in_features} features to outputs of {rows.out_features} "
            f"features; it maps {tuple(x.shape)} to {shape}."
        )


@torch.no_grad()
def _start(layer: nn.Module, rows: ActivationRows, seed: int) -> None:
    """What a layer has before the first step."""
    bias, gate = getattr(layer, "bias", None), getattr(layer, "gate", None)
    if isinstance(bias, Tensor) and bias.shape == rows.mean.shape:
        bias.copy_(rows.mean)
    if not isinstance(gate, ExpertGate):
        return
    gate_bias = getattr(gate, "bias", None)
    if gate_bias is not None and gate.gate_norm == "none" and not gate_bias.any():
        # What all inputs have in common would choose the same experts for all, and the others never learn.
        gate_bias.copy_(-gate.weight @ rows.input_mean.to(gate.weight))
    if isinstance(gate, ExpertGate) and hasattr(gate.gate, "fit"):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(rows), generator=generator)[: ROWS_PER_EXPERT * gate.out_features]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gate.fit(rows.batch(sample)[0].to(gate.weight.device))
