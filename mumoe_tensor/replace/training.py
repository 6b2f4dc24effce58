"""Train a layer to reproduce the outputs of another layer."""

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

#: Maximum number of inputs per expert to which a gate is fitted.
ROWS_PER_EXPERT = 8


@dataclass(frozen=True)
class Fit:
    """The result of `fit`.

    Attributes
    ----------
    evaluations : list of Evaluation
        Evaluations on the validation rows during training.
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
    """Train a layer in place to map the inputs of another layer to its outputs.

    The loss is the normalised mean squared error: the sum of ``|y - layer(x)|²`` divided by the sum of
    ``|y - m|²``, where m is the mean output over the training rows. Before the first step, the layer's
    ``bias`` is set to m. If the gate does not normalise its logits, as with `.ReLUTopK`, and its bias is
    still zero, the bias is set so that the mean input has zero logits. A gate with a method ``fit``, such as
    `.NearestCentres`, is fitted to a sample of the inputs.

    Parameters
    ----------
    layer : Module
        A `.Transcoder`, `.MixtureOfDecoders`, `.MixtureOfTransforms`, or any other module that maps inputs of
        shape (rows, in_features) to outputs of shape (rows, out_features). Its parameters must be in float32.
        It may have a ``gate`` and a ``bias`` of shape (out_features,).
    rows : ActivationRows, or Activations of one module
    config : TrainConfig, optional
    validation : ActivationRows, or Activations of one module, optional
        Rows of other documents. By default, every tenth document of `rows` is held out.
    folder : str or Path, optional
        Folder for checkpoints and curves, as in `.train`. The same call resumes from the last checkpoint.
    penalty : float, default 0.0
        Weight of an additional penalty: the mean over rows of ``sum_n tanh(|a_n| |W_n|)``, with the Frobenius
        norms of the experts. It is meant for gates with thresholds, such as `.JumpReLU`, and requires a layer
        with a `mixture`.
    progress : bool, default False
        Show a progress bar (requires rich).

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If the layer does not map the inputs to outputs of that size, its parameters are not in float32, all
        rows have the same outputs, a penalty is given for a layer without experts, the activations are of
        several modules, there are fewer than ten documents to hold one out, or as in `.train`.
    TypeError
        If `layer` is not a module, or `rows` are not activations.
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
        raise TypeError(f"rows must be ActivationRows or Activations, got {type(rows).__name__}.")
    if len(rows.modules) != 1:
        raise ValueError(
            f"rows must be of one module; the activations are of {', '.join(rows.modules)}: pass those of "
            "one, as activations[name]."
        )
    return rows[rows.modules[0]]


def _held_out(rows: ActivationRows) -> tuple[ActivationRows, ActivationRows]:
    """The rows to train on, and the rows of every tenth document."""
    documents = rows.documents.unique()
    if len(documents) < 10:
        raise ValueError(
            f"holding out every tenth document needs at least ten; the rows are from {len(documents)}: pass "
            "`validation`."
        )
    is_held = torch.arange(len(documents)) % 10 == 9
    return rows.take(documents[~is_held].tolist()), rows.take(documents[is_held].tolist())


def normalised_error(variance: float) -> Loss:
    """The loss function that returns the mean over rows of ``|y - output|² / variance``."""
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
            f"the parameters of a layer to fit must be in float32, got {', '.join(map(str, others))}. "
            "For products in bfloat16, use a config with precision='bf16'."
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
    """Initialise biases and gates from the training rows before the first step."""
    bias, gate = getattr(layer, "bias", None), getattr(layer, "gate", None)
    if isinstance(bias, Tensor) and bias.shape == rows.mean.shape:
        bias.copy_(rows.mean)
    if not isinstance(gate, ExpertGate):
        return
    gate_bias = getattr(gate, "bias", None)
    if gate_bias is not None and gate.gate_norm == "none" and not gate_bias.any():
        # Otherwise the mean input would choose the same experts for all rows, and the others would never
        # learn.
        gate_bias.copy_(-gate.weight @ rows.input_mean.to(gate.weight))
    if isinstance(gate, ExpertGate) and hasattr(gate.gate, "fit"):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(rows), generator=generator)[: ROWS_PER_EXPERT * gate.out_features]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gate.fit(rows.batch(sample)[0].to(gate.weight.device))
