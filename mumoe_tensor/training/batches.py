"""The batches of a training run: the rows of a step depend only on its number.

An interrupted run therefore resumes with the next rows, and several processes together see the same rows as
one process would.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.training.data import Rows

Batch = tuple[Tensor, Tensor]


def seed_of(*numbers: int) -> int:
    """A seed derived from several numbers, such as a seed, a step and a process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Batches(TorchDataset[list[Batch]]):
    """The batches of one process: for each step, a list with one batch for each accumulation part.

    The rows are reshuffled in each epoch; a last, incomplete batch is left out.

    Parameters
    ----------
    data : Rows
    config : TrainConfig
    process, processes : int
        Index of this process, and number of processes: each takes its share of every part.

    Attributes
    ----------
    per_epoch : int
        Steps per epoch.
    steps : int
        Steps in the whole run.

    Raises
    ------
    ValueError
        If there are fewer rows than `batch_size`, or a batch cannot be divided evenly.
    """

    def __init__(self, data: Rows, config: TrainConfig, process: int = 0, processes: int = 1):
        self._data, self._config, self._process, self._processes = data, config, process, processes
        self.per_epoch = len(data) // config.batch_size
        if not self.per_epoch:
            raise ValueError(f"a batch of {config.batch_size} needs at least as many rows, got {len(data)}.")
        # Mixup pairs neighbouring rows, and both rows of a pair must go to one process.
        together = processes * config.accumulation * (2 if config.mixup else 1)
        if config.batch_size % together:
            raise ValueError(
                f"batch_size must be a multiple of {together}, processes x accumulation"
                f"{' x 2' if config.mixup else ''}, got {config.batch_size}."
            )
        self.steps = config.epochs * self.per_epoch if config.steps is None else config.steps
        self._classes: int = getattr(data, "classes", 0)
        if config.mixup and not self._classes:
            raise ValueError("mixup needs data with classes; this data has none.")
        self._restart()

    def _restart(self) -> None:
        self._generator, self._epoch = torch.Generator().manual_seed(self._config.seed), -1
        self._order = torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """The indices of the rows of a step, over all processes."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch < self._epoch:
            self._restart()
        while self._epoch < epoch:
            self._order = torch.randperm(len(self._data), generator=self._generator)
            self._epoch += 1
        size = self._config.batch_size
        return self._order[batch * size : (batch + 1) * size]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        seed = self._config.seed
        parts = self.rows(step).chunk(self._config.accumulation)
        batches = []
        for k, part in enumerate(parts):
            # The random numbers that `batch` draws, too.
            torch.manual_seed(seed_of(seed, step, k, self._process))
            x, y = self._data.batch(part.chunk(self._processes)[self._process])
            if self._config.mixup:
                share = np.random.default_rng([seed, step, k]).beta(self._config.mixup, self._config.mixup)
                x, y = mixed(x, share), mixed(torch.nn.functional.one_hot(y, self._classes).float(), share)
            batches.append((x, y))
        return batches

    def after(self, step: int, *, pin_memory: bool = False) -> Iterator[list[Batch]]:
        """The batches from `step` on, prefetched by `config.workers` processes."""
        return iter(
            DataLoader(
                self, batch_size=None, sampler=range(step, self.steps), num_workers=self._config.workers,
                pin_memory=pin_memory,
            )
        )  # fmt: skip


def mixed(values: Tensor, share: float) -> Tensor:
    """Mix each row, with weight `share`, with its neighbour: the first with the second, and so on."""
    neighbours = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return share * values + (1 - share) * neighbours
