"""Coefficients of a model's gates for many texts, stored on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn

from mumoe_tensor.checks import as_finite
from mumoe_tensor.nn.watch import gates_of, watch_coefficients
from mumoe_tensor.progress import Progress
from mumoe_tensor.replace.shards import Shards, collect_shards, held, rows_of_each

KIND = "coefficients"


class CoefficientRows:
    """The coefficients above the threshold in one level of a gate. A row is a token, or a patch.

    Attributes
    ----------
    num_experts : int
    documents : Tensor of int64 of shape (len(self),)
        Index of the text of each row.
    """

    def __init__(self, shards: Sequence[Mapping[str, Tensor]], key: str, num_experts: int):
        self.num_experts = num_experts
        self._parts = [(shard[f"{key}/values"], shard[f"{key}/indices"]) for shard in shards]
        self._lengths = [shard[f"{key}/lengths"] for shard in shards]
        counts = torch.cat([shard[f"{key}/counts"] for shard in shards])
        self.documents = torch.arange(len(counts), device="cpu").repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.documents)

    def rows(self, start: int = 0, stop: int | None = None) -> csr_array:
        """Selected rows as a sparse SciPy array; by default all rows.

        Returns
        -------
        scipy.sparse.csr_array of float32 of shape (stop - start, num_experts)
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        parts, first = [csr_array((0, self.num_experts), dtype=np.float32)], 0
        for (values, indices), lengths in zip(self._parts, self._lengths, strict=True):
            begin, end = (min(max(k - first, 0), len(lengths)) for k in (start, stop))
            if begin < end:
                edges = np.concatenate([[0], lengths.numpy().cumsum(dtype=np.int64)])
                of_rows = slice(edges[begin], edges[end])
                starts = edges[begin : end + 1] - edges[begin]
                part = values[of_rows].numpy(), indices[of_rows].numpy(), starts
                parts.append(csr_array(part, shape=(end - begin, self.num_experts)))
            first += len(lengths)
        return vstack(parts, format="csr")


class Coefficients:
    """Coefficients of a model's gates, which stay on disk until their rows are read.

    Parameters
    ----------
    folder : str or Path
        Folder that `collect_coefficients` wrote.

    Attributes
    ----------
    gates : dict of str to tuple of int
        Names of the gates, and their numbers of experts per level. ``coefficients[name]`` is the
        `CoefficientRows` of a gate's first level, and ``coefficients[name, level]`` that of any level.
    threshold : float

    Raises
    ------
    ValueError
        If the folder has no coefficients, or collecting them has not finished.
    """

    def __init__(self, folder: str | Path):
        self._shards = Shards(Path(folder), KIND)
        self.gates = {name: tuple(experts) for name, experts in self._shards.about["gates"].items()}
        self.threshold: float = self._shards.about["threshold"]

    def __getitem__(self, gate: str | tuple[str, int]) -> CoefficientRows:
        name, level = (gate, 0) if isinstance(gate, str) else gate
        if level not in range(len(self.gates.get(name, ()))):
            raise KeyError(f"the gates are {self.gates}; got level {level} of {name!r}.")
        return CoefficientRows(self._shards.tensors, f"{name}/{level}", self.gates[name][level])


@torch.no_grad()
def collect_coefficients(
    model: nn.Module,
    texts: Sequence[Tensor],
    folder: str | Path,
    *,
    threshold: float = 0.0,
    batch_size: int = 8,
    shard_rows: int = 16384,
    progress: Progress | None = None,
) -> Coefficients:
    """Write the coefficients of every gate of a model to a folder, in one pass over texts.

    After an interruption, the same call resumes; see `.Activations.collect`.

    Parameters
    ----------
    model : Module
        Called with batches of texts, in evaluation mode. Each gate must be called once in a forward pass.
    texts : sequence of Tensor
        Inputs of the model without the batch axis.
    folder : str or Path
    threshold : float, default 0.0
        Only coefficients with a larger magnitude are stored.
    batch_size : int, default 8
        Maximum number of texts in a batch. Only consecutive texts of the same shape share a batch.
    shard_rows : int, default 16384
        A shard is written once it has the coefficients of this many rows, counted over all gates.
    progress : callable, optional
        Called as ``progress(done, total, text)``, where ``done`` and ``total`` count texts.

    Raises
    ------
    ValueError
        If the model has no gate, a gate is not called exactly once, or the folder has coefficients of another
        model, other texts or another threshold.
    OSError
        If another process is writing to the folder, or a file cannot be written.
    """
    threshold = as_finite(threshold, "threshold")
    gates = {name: gate.num_experts for name, gate in gates_of(model).items() if gate.num_experts}

    def tensors_of(batch: Tensor) -> tuple[int, Mapping[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        rows = 0

        def keep(name: str, levels: tuple[Tensor, ...]) -> None:
            nonlocal rows
            for level, coefficients in enumerate(levels):
                key = f"{name}/{level}"
                if f"{key}/values" in tensors:
                    raise ValueError(
                        f"a gate must be called once in a forward pass; {name!r} is called again."
                    )
                rows += len(coefficients)
                tensors.update(_sparse(key, coefficients, threshold, len(batch)))

        with watch_coefficients(model, keep):
            model(batch)
        if missing := [name for name in gates if f"{name}/0/values" not in tensors]:
            raise ValueError(f"a gate must be called in every forward pass; {', '.join(missing)} is not.")
        return rows, tensors

    about: dict[str, Any] = {
        "kind": KIND, "gates": {name: [*experts] for name, experts in gates.items()}, "threshold": threshold
    }  # fmt: skip
    collect_shards(
        model, texts, Path(folder), about, tensors_of,
        batch_size=batch_size, shard_rows=shard_rows, progress=progress,
    )  # fmt: skip
    return Coefficients(folder)


def _sparse(key: str, coefficients: Tensor, threshold: float, texts: int) -> dict[str, Tensor]:
    """Compressed sparse rows with row lengths instead of row starts, so that they can be concatenated."""
    coefficients = held(coefficients, torch.float32, key)
    is_kept = coefficients.abs() > threshold
    return {
        f"{key}/values": coefficients[is_kept],
        f"{key}/indices": is_kept.nonzero()[:, 1].int(),
        f"{key}/lengths": is_kept.sum(1).int(),
        f"{key}/counts": rows_of_each(len(coefficients), texts, key),
    }
