"""Inputs and outputs of a model's modules for many texts, stored on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import check_choice
from mumoe_tensor.nn.watch import module_of, watch_calls
from mumoe_tensor.progress import Progress
from mumoe_tensor.replace.moments import Moments
from mumoe_tensor.replace.shards import Shards, collect_shards, held, rows_of_each
from mumoe_tensor.selections import Selection, read_selection

KIND = "activations"
#: Entry of every shard: the number of rows of each text.
COUNTS = "counts"
Dtype = Literal["float16", "bfloat16", "float32"]
#: Rows read at a time when all rows are scanned.
CHUNK = 8192


class ActivationRows:
    """Inputs and outputs of a module as training data. A row is a token of a text, or a patch of an image.

    Parameters
    ----------
    shards : sequence of (Tensor, Tensor)
        Inputs of shape (rows, in_features) and outputs of shape (rows, out_features) of each shard.
    documents : Tensor of int64
        Index of the text of each row, over all shards.
    numbers : Tensor of int64, optional
        Indices of the rows to select; all by default.

    Attributes
    ----------
    in_features, out_features : int
    documents : Tensor of int64 of shape (len(self),)
    """

    def __init__(
        self, shards: Sequence[tuple[Tensor, Tensor]], documents: Tensor, numbers: Tensor | None = None
    ):
        self._shards, self._documents = shards, documents
        self._numbers = torch.arange(len(documents), device="cpu") if numbers is None else numbers
        self._stops = torch.tensor([len(x) for x, _ in shards], device="cpu").cumsum(0)
        self.documents = documents[self._numbers]
        (self.in_features, self.out_features) = (part.shape[-1] for part in shards[0])

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of selected rows, in the given order, in float32.

        Parameters
        ----------
        rows : Tensor of int, or anything else that indexes a tensor
            A row may occur more than once.

        Returns
        -------
        Tensor of shape (n, in_features)
        Tensor of shape (n, out_features)
        """
        return self._read(0, rows), self._read(1, rows)

    def _read(self, side: int, rows: Selection) -> Tensor:
        """Inputs (side 0) or outputs (side 1) of selected rows; each shard is read sequentially."""
        numbers, order = self._numbers[rows].sort()
        values = torch.empty(len(numbers), self._shards[0][side].shape[-1], device="cpu")
        edges = torch.searchsorted(numbers, self._stops).tolist()
        start = first = 0
        for shard, edge, stop in zip(self._shards, edges, self._stops.tolist(), strict=True):
            if edge > start:
                values[order[start:edge]] = shard[side][numbers[start:edge] - first].float()
            start, first = edge, stop
        return values

    def below(self, limit: float) -> ActivationRows:
        """The rows whose outputs have a norm of at most `limit`; see `median_norm`.

        Raises
        ------
        ValueError
            If there are no such rows.
        """
        is_below = self._norms <= limit
        if not is_below.any():
            raise ValueError(f"some outputs must have norms of at most the limit, {limit:.3g}; none have.")
        return ActivationRows(self._shards, self._documents, self._numbers[is_below])

    @property
    def median_norm(self) -> float:
        """The median norm of the outputs.

        In language models, the outputs of a few tokens, usually the first of a text, are a thousand times
        larger (Sun et al., "Massive Activations in Large Language Models", COLM 2024). They would dominate a
        squared error; ``rows.below(5 * rows.median_norm)`` excludes them.
        """
        return float(self._norms.median())

    @cached_property
    def _norms(self) -> Tensor:
        parts = torch.arange(len(self), device="cpu").split(CHUNK)
        return torch.cat([self._read(1, part).norm(dim=1) for part in parts])

    def take(self, documents: Selection) -> ActivationRows:
        """The rows of some texts.

        Parameters
        ----------
        documents : sequence of int, slice, or mask
            Indices of texts, as in the attribute `documents`.

        Raises
        ------
        ValueError
            If the texts have no rows.
        """
        numbers = read_selection(documents, int(self._documents[-1]) + 1, "documents")
        chosen = torch.tensor(numbers, dtype=torch.long, device="cpu")
        rows = self._numbers[torch.isin(self.documents, chosen)]
        if not len(rows):
            raise ValueError("the selected documents must have rows; they have none.")
        return ActivationRows(self._shards, self._documents, rows)

    @property
    def mean(self) -> Tensor:
        """The mean of the outputs, of shape (out_features,)."""
        return self._moments[1].mean.float()

    @property
    def input_mean(self) -> Tensor:
        """The mean of the inputs, of shape (in_features,)."""
        return self._moments[0].mean.float()

    @property
    def variance(self) -> float:
        """The mean squared distance of the outputs from their mean."""
        return self._moments[1].spread / len(self)

    @cached_property
    def _moments(self) -> tuple[Moments, Moments]:
        """Moments of the inputs and the outputs."""
        both = Moments(), Moments()
        for rows in torch.arange(len(self), device="cpu").split(CHUNK):
            for moments, part in zip(both, self.batch(rows), strict=True):
                moments.update(part)
        return both


class Activations:
    """Inputs and outputs of a model's modules, which stay on disk until their rows are read.

    Parameters
    ----------
    folder : str or Path
        Folder that `collect` wrote.

    Attributes
    ----------
    modules : tuple of str
        Names of the modules; ``activations[name]`` is the `ActivationRows` of a module.
    documents : Tensor of int64 of shape (len(self),)
        Index of the text of each row.

    Raises
    ------
    ValueError
        If the folder has no activations, or collecting them has not finished.

    Examples
    --------
    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
    >>> texts = torch.randint(9, (6, 5))
    >>> with TemporaryDirectory() as folder:
    ...     store = Activations.collect(model, "1", texts, folder)
    ...     rows = store["1"].take(range(4))
    ...     x, y = rows.batch([0, 1, 2])
    >>> len(store), len(rows), x.shape
    (30, 20, torch.Size([3, 4]))
    """

    def __init__(self, folder: str | Path):
        self._shards = Shards(Path(folder), KIND)
        self.modules: tuple[str, ...] = tuple(self._shards.about["modules"])
        counts = torch.cat([tensors[COUNTS] for tensors in self._shards.tensors])
        self.documents = torch.arange(len(counts), device="cpu").repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, module: str) -> ActivationRows:
        if module not in self.modules:
            raise KeyError(f"the modules with activations are {', '.join(self.modules)}; got {module!r}.")
        shards = [(part[f"{module}/inputs"], part[f"{module}/outputs"]) for part in self._shards.tensors]
        return ActivationRows(shards, self.documents)

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        modules: str | Sequence[str],
        texts: Sequence[Tensor],
        folder: str | Path,
        *,
        batch_size: int = 8,
        dtype: Dtype = "float16",
        shard_rows: int = 16384,
        progress: Progress | None = None,
    ) -> Self:
        """Write the inputs and outputs of modules to a folder, in one pass over texts.

        After an interruption, the same call resumes after the last complete shard. If the collection is
        finished, the call only checks that model, modules and texts are the same. Only one shard is in
        memory, with copies while it is written.

        Parameters
        ----------
        model : Module
            Called with batches of texts, in evaluation mode.
        modules : str or sequence of str
            Names of modules of the model. Each maps its first argument, of shape (rows, features) or (texts,
            ..., features), to such a tensor or to a tuple that starts with one, and is called once in a
            forward pass. After the first batch, a forward pass stops when the last of the modules has
            returned.
        texts : sequence of Tensor
            Inputs of the model without the batch axis, such as the token ids of a text, or an image.
        folder : str or Path
        batch_size : int, default 8
            Maximum number of texts in a batch. Only consecutive texts of the same shape share a batch.
        dtype : {"float16", "bfloat16", "float32"}
            Dtype of the stored values.
        shard_rows : int, default 16384
            A shard is written once it has this many rows.
        progress : callable, optional
            Called as ``progress(done, total, text)``, where ``done`` and ``total`` count texts.

        Returns
        -------
        Activations

        Raises
        ------
        ValueError
            If a module does not exist, is not called exactly once, or returns something else; if a value is
            not finite in the dtype; if a text is empty, or has token ids of shape (1, tokens); or if the
            folder has activations of another model, other modules or other texts.
        TypeError
            If a text is not a tensor.
        OSError
            If another process is writing to the folder, or a file cannot be written.
        """
        names = (modules,) if isinstance(modules, str) else tuple(dict.fromkeys(modules))
        if not names:
            raise ValueError("modules must not be empty, got none.")
        check_choice(dtype, get_args(Dtype), "dtype")
        watched = {name: module_of(model, name) for name in names}
        is_first = True

        def tensors_of(batch: Tensor) -> tuple[int, Mapping[str, Tensor]]:
            nonlocal is_first
            stops, is_first = not is_first, False
            return _Recorder(watched, len(batch), getattr(torch, dtype), stops).run(model, batch)

        about = {"kind": KIND, "modules": [*names], "dtype": dtype}
        collect_shards(
            model, texts, Path(folder), about, tensors_of,
            batch_size=batch_size, shard_rows=shard_rows, progress=progress,
        )  # fmt: skip
        return cls(folder)


class _Recorder:
    """Records the inputs and outputs of modules in one forward pass."""

    def __init__(self, modules: Mapping[str, nn.Module], texts: int, dtype: torch.dtype, stops: bool):
        self._modules, self._texts, self._dtype, self._stops = modules, texts, dtype, stops
        self._tensors: dict[str, Tensor] = {}

    def run(self, model: nn.Module, batch: Tensor) -> tuple[int, Mapping[str, Tensor]]:
        """The number of rows, and all recorded tensors."""
        with suppress(_Enough), watch_calls(self._modules, self._before, self._after):
            model(batch)
        if missing := [name for name in self._modules if f"{name}/outputs" not in self._tensors]:
            raise ValueError(f"a module must be called in every forward pass; {', '.join(missing)} is not.")
        counts = {name: len(rows) for name, rows in self._tensors.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"inputs and outputs must have the same number of rows, got {counts}.")
        rows, *_ = counts.values()
        return rows, {COUNTS: rows_of_each(rows, self._texts, "a module"), **self._tensors}

    def _before(self, name: str, arguments: dict[str, Any]) -> None:
        if f"{name}/inputs" in self._tensors:
            raise ValueError(f"a module must be called once in a forward pass; {name!r} is called again.")
        self._keep(f"{name}/inputs", _first(arguments))

    def _after(self, name: str, result: Any) -> None:
        self._keep(f"{name}/outputs", _first(result))
        if self._stops and len(self._tensors) == 2 * len(self._modules):
            raise _Enough

    def _keep(self, name: str, value: Any) -> None:
        is_read = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if not is_read or (value.ndim > 2 and len(value) != self._texts):
            is_tensor = isinstance(value, Tensor)
            got = f"{value.dtype} of {tuple(value.shape)}" if is_tensor else type(value).__name__
            raise ValueError(
                "the first argument and the output of a module must be float tensors of shape "
                f"(rows, features) or ({self._texts} texts, ..., features); {name} is {got}."
            )
        self._tensors[name] = held(value.reshape(-1, value.shape[-1]), self._dtype, name)


def _first(value: Any) -> Any:
    """The first entry of a tuple, or of a mapping such as the outputs of transformers modules."""
    while isinstance(value, (tuple, Mapping)) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


class _Enough(Exception):
    """Stops a forward pass."""
