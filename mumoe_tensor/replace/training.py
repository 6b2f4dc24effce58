"""Training of a layer to give the outputs that another one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from math import nan
from pathlib import Path

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.usage import Usage
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import evaluating, watch_calls
from mumoe_tensor.replace.activations import ActivationRows
from mumoe_tensor.training.checkpoint import Checkpoints
from mumoe_tensor.training.config import TrainConfig
from mumoe_tensor.training.log import Evaluation
from mumoe_tensor.training.trainer import evaluate, train

#: Inputs for each expert that a gate is fitted to, where there are more.
ROWS_PER_EXPERT = 16
#: Rows that are mapped at once.
BATCH = 1024


@dataclass(frozen=True)
class ExpertUse:
    """How many experts are used.

    Attributes
    ----------
    active : float
        Mean number of experts that a row gives a coefficient other than zero; NaN without a gate.
    dead : Tensor of int64
        Experts that no row gives one; of several levels, numbers into all combinations, the last level
        fastest.
    """

    active: float = nan
    dead: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Fit:
    """What came out of `fit`.

    Attributes
    ----------
    evaluations : list of Evaluation
        On the validation rows, while it was trained.
    nmse : float
        Normalised mean squared error of the layer on the validation rows, without the penalty.
    active : float
    dead : Tensor of int64
        See `ExpertUse`; on the validation rows.
    """

    evaluations: list[Evaluation]
    nmse: float
    active: float
    dead: Tensor


def fit(
    layer: nn.Module,
    rows: ActivationRows,
    config: TrainConfig | None = None,
    *,
    validation: ActivationRows,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Fit:
    """Train a layer, in place, to map the inputs of another one to its outputs.

    The loss is the normalised mean squared error: the sum of ``|y - layer(x)|²`` over that of ``|y - m|²``,
    where m is the mean of the outputs of the training rows. Before the first step the layer's ``bias``
    becomes m, and a gate that can be fitted, as `.NearestCentres`, is fitted to some of the inputs.

    Parameters
    ----------
    layer : Module
        Maps inputs of shape (rows, in_features) to outputs of shape (rows, out_features). Of `.Transcoder`,
        `.MixtureOfDecoders`, `.MixtureOfTransforms`, or any other class; its parameters are of float32. May
        have a ``gate`` and a ``bias`` of shape (out_features,).
    rows : ActivationRows
    config : TrainConfig, optional
    validation : ActivationRows
        Of other documents than `rows`.
    folder : str or Path, optional
        For checkpoints and curves, as of `.train`: the same call goes on from the last checkpoint.
    progress : bool, default False
        Show a bar with the time left (needs rich).

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If the outputs of all rows are the same, or as `.train`.
    """
    config, folder = config or TrainConfig(), None if folder is None else Path(folder)
    if not rows.variance > 0:
        raise ValueError("the outputs of the training rows must differ; all are the same.")
    loss = normalised_error(rows.variance)
    if folder is None or not Checkpoints(folder / "checkpoints").steps:
        _start(layer, rows, config.seed)
    evaluations = train(layer, rows, validation, config, loss=loss, folder=folder, progress=progress)
    with counting(layer) as use:
        nmse, _ = evaluate(layer, validation, batch_size=BATCH, loss=loss)
    found = use()
    return Fit(evaluations, nmse, found.active, found.dead)


def normalised_error(variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over rows of ``|y - output|² / variance``, as a function of outputs and y."""
    return lambda output, y: (output - y).square().sum() / (len(y) * variance)


@torch.no_grad()
def _start(layer: nn.Module, rows: ActivationRows, seed: int) -> None:
    """What a layer has before the first step."""
    bias, gate = getattr(layer, "bias", None), getattr(layer, "gate", None)
    if isinstance(bias, Tensor):
        bias.copy_(rows.mean)
    if isinstance(gate, ExpertGate) and hasattr(gate.gate, "fit"):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(rows), generator=generator)[: ROWS_PER_EXPERT * gate.out_features]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gate.fit(rows.batch(sample)[0].to(gate.weight.device))


@torch.no_grad()
def usage(layer: nn.Module, rows: ActivationRows) -> ExpertUse:
    """How many experts of a layer some rows use.

    Parameters
    ----------
    layer : Module
        Runs as in ``eval()``. Without a ``gate``, nothing is counted.
    rows : ActivationRows
    """
    device = next(layer.parameters()).device
    with counting(layer) as use, evaluating(layer):
        for numbers in torch.arange(len(rows)).split(BATCH):
            layer(rows.batch(numbers)[0].to(device))
    return use()


@contextmanager
def counting(layer: nn.Module) -> Iterator[Callable[[], ExpertUse]]:
    """While the context lasts, count the experts that every call of a layer uses; yields what they were."""
    gate = getattr(layer, "gate", None)
    if not isinstance(gate, ExpertGate) or not gate.num_experts:
        yield ExpertUse
        return
    counts = Usage(torch.Size(gate.num_experts).numel())

    def count(name: str, levels: tuple[Tensor, ...]) -> None:
        counts.update(reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), levels))

    def use() -> ExpertUse:
        return ExpertUse(
            counts.statistics().active * len(counts.uses), (counts.uses == 0).nonzero().flatten()
        )

    with watch_calls({"gate": gate}, after=count):
        yield use
