"""Readers for data with binary attributes: CelebA, Adult, and any file of embeddings."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.models.heads import centring
from mumoe_tensor.readers import read_arrays, read_text, reading
from mumoe_tensor.selections import Selection, read_selection
from mumoe_tensor.training.data import as_features

#: Number of rows in the official training, validation and test splits of CelebA, in file order.
CELEBA_PARTS = (162_770, 19_867, 19_962)
#: Columns of Adult. Of the skipped ones, fnlwgt is a sampling weight and education repeats education-num.
ADULT_NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours")
ADULT_CATEGORIES = ("workclass", "marital", "occupation", "relationship", "race", "country")
ADULT_SKIPPED = ("fnlwgt", "education")
ADULT_COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital", "occupation", "relationship",
    "race", "sex", "capital-gain", "capital-loss", "hours", "country", "income",
)  # fmt: skip

#: An attribute and its value, 0 or 1.
Side = tuple[str, int]


@dataclass(frozen=True)
class Population:
    """Inputs with binary labels and a binary group.

    Attributes
    ----------
    x : Tensor of float32 of shape (rows, features)
    y : Tensor of int64 of shape (rows, outputs)
        0 or 1.
    group : Tensor of int64 of shape (rows,)
        0 or 1.
    """

    x: Tensor
    y: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.group)

    def rows(self, index: Selection) -> Population:
        """Some of the rows.

        Parameters
        ----------
        index : sequence of int, slice, or mask of shape (len(self),)
            A row may occur more than once.
        """
        numbers = torch.tensor(read_selection(index, len(self), "rows", repeats=True), dtype=torch.long)
        return Population(self.x[numbers], self.y[numbers], self.group[numbers])


@dataclass(frozen=True)
class Task:
    """A prediction task, and the subpopulation on which a model should make no errors.

    Attributes
    ----------
    name : str
    training, validation, test : Population
    output : int
        Column of `y` that contains the label of the task.
    target : tuple of int
        Label and group that define the subpopulation.

    Raises
    ------
    ValueError
        If a part has no rows of the subpopulation, or one of its groups has no rows with label 1.
    """

    name: str
    training: Population
    validation: Population
    test: Population
    output: int
    target: tuple[int, int]

    def __post_init__(self) -> None:
        for part in ("training", "validation", "test"):
            rows: Population = getattr(self, part)
            if not bool(self.members(rows).any()):
                raise ValueError(
                    f"every part must have rows of the subpopulation; {part} of {self.name} has none."
                )
            if len(set(rows.group[self.labels(rows) == 1].tolist())) < 2:
                raise ValueError(
                    f"both groups must have rows with label 1; in {part} of {self.name} one group has none."
                )

    def labels(self, rows: Population) -> Tensor:
        """The labels of the task, of shape (rows,)."""
        return rows.y[:, self.output]

    def members(self, rows: Population) -> Tensor:
        """Mask of the rows in the subpopulation, bool of shape (rows,)."""
        label, group = self.target
        return (self.labels(rows) == label) & (rows.group == group)


def read_celeba(folder: Path, target: Side, group: Side, embeddings: Path | None = None) -> Task:
    """Read the attributes of CelebA, in the official split.

    Parameters
    ----------
    folder : Path
        Contains ``celeba.csv.zip``, with the columns ``filename`` and 40 attributes with values 1 and −1.
    target, group : tuple of str and int
        Attribute and value that define the label, and the group, of the subpopulation.
    embeddings : Path, optional
        An ``.npz`` file with ``x`` of shape (rows, features), in the order of the rows of the table. The
        embeddings are then the input, and all attributes are predicted. By default the other attributes are
        the input.

    Raises
    ------
    ValueError
        If the file does not contain the official rows, an attribute is unknown, or `embeddings` has another
        number of rows.
    """
    import pandas

    path = folder / "celeba.csv.zip"
    with reading(path):
        table = pandas.read_csv(path, compression="zip", encoding="utf-8-sig", index_col=False)
        if table.columns[0] != "filename" or len(table) != sum(CELEBA_PARTS):
            raise ValueError(
                f"a table must have the {sum(CELEBA_PARTS):,} rows of CelebA and the first column filename, "
                f"got {len(table):,} rows and the first column {table.columns[0]!r}."
            )
        table = table.drop(columns="filename")
        odd = [name for name in table.columns if not table[name].isin((-1, 1)).all()]
        if odd:
            raise ValueError(f"attributes must be 1 or -1; {odd[0]!r} has other values.")
    names = list(table.columns)
    output, by = (_column(names, side) for side in (target, group))
    values = torch.tensor(table.to_numpy(np.float32))
    ones = (values > 0).long()
    if embeddings is None:
        others = [k for k in range(len(names)) if k != output]
        whole = Population(values[:, others], ones[:, [output]], ones[:, by])
        output = 0
    else:
        whole = Population(_embeddings(embeddings, len(values)), ones, ones[:, by])
    first, second, _ = CELEBA_PARTS
    slices = (slice(first), slice(first, first + second), slice(first + second, None))
    task = _task("celeba", map(whole.rows, slices), target, group, output)
    return replace(task, name=f"{task.name} {embeddings.name}") if embeddings else task


def read_adult(folder: Path, target: Side, group: Side) -> Task:
    """Read the rows of Adult without missing values; a random fifth of the training rows is for validation.

    Parameters
    ----------
    folder : Path
        Contains ``adult.data`` and ``adult.test``.
    target, group : tuple of str and int
        ``("income", 1)`` for incomes above 50K, or ``("income", 0)``; ``("Male", 1)`` or ``("Male", 0)``.

    Raises
    ------
    ValueError
        If an attribute is unknown, or a file has other columns.
    """
    import pandas

    for side, name in ((target, "income"), (group, "Male")):
        _column([name], side)

    def read(name: str, skip: int) -> Any:
        lines = read_text(folder / name).splitlines()[skip:]
        with reading(folder / name):
            rows = [row for row in csv.reader(lines, skipinitialspace=True, strict=True) if row]
            for number, row in enumerate(rows, 1):
                if len(row) != len(ADULT_COLUMNS):
                    raise ValueError(
                        f"every row must have {len(ADULT_COLUMNS)} columns; row {number} has {len(row)}."
                    )
            table = pandas.DataFrame([row for row in rows if "?" not in row], columns=list(ADULT_COLUMNS))
            table[list(ADULT_NUMBERS)] = table[list(ADULT_NUMBERS)].apply(pandas.to_numeric)
            for column, values in (("sex", ("Male", "Female")), ("income", ("<=50K", ">50K"))):
                odd = set(table[column].str.removesuffix(".")) - set(values)
                if odd:
                    raise ValueError(f"{column} must be {' or '.join(values)}, got {sorted(odd)[0]!r}.")
        return table.drop(columns=list(ADULT_SKIPPED))

    labelled, test = read("adult.data", 0), read("adult.test", 1)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0)).numpy()
    count = len(labelled) // 5
    tables = [labelled.iloc[order[count:]], labelled.iloc[order[:count]], test]
    numbers = tables[0][list(ADULT_NUMBERS)]
    categories = {c: sorted(set(tables[0][c])) for c in ADULT_CATEGORIES}

    def population(table: Any) -> Population:
        scaled = (table[list(ADULT_NUMBERS)] - numbers.mean()) / numbers.std().replace(0, 1)
        one_hot = [table[c] == value for c, values in categories.items() for value in values]
        male = table["sex"] == "Male"
        x = np.column_stack([scaled.to_numpy(), *one_hot, male]).astype(np.float32)
        income = torch.tensor(table["income"].str.startswith(">50K").to_numpy()).long()
        return Population(torch.from_numpy(x), income[:, None], torch.tensor(male.to_numpy()).long())

    return _task("adult", map(population, tables), target, group)


def read_embeddings(path: Path, target: Side, group: Side) -> Task:
    """Read embeddings with binary attributes; a random fifth of the rows is for validation, another for test.

    Parameters
    ----------
    path : Path
        An ``.npz`` file with ``x`` of shape (rows, features) and, under the name of each attribute, an array
        of 0s and 1s of shape (rows,).
    target, group : tuple of str and int
        Attribute and value that define the label, and the group, of the subpopulation.

    Raises
    ------
    ValueError
        If an array is missing, or its shape or values are not as described.
    """
    x, *attributes = read_arrays(path, ("x", target[0], group[0]))
    with reading(path):
        if x.ndim != 2:
            raise ValueError(f"x must be of shape (rows, features), got {x.shape}.")
        for (name, _), values in zip((target, group), attributes, strict=True):
            if values.shape != x.shape[:1] or not np.isin(values, (0, 1)).all():
                raise ValueError(f"{name} must be 0 or 1 for each row of x, got shape {values.shape}.")
        features = as_features(x)
    label, by = (torch.from_numpy(values.astype(np.int64)) for values in attributes)
    test, validation, training = torch.randperm(
        len(x), generator=torch.Generator().manual_seed(0)
    ).tensor_split((len(x) // 5, len(x) // 5 * 2))
    mean, scale = centring(features[training])
    whole = Population((features - mean) / scale, label[:, None], by)
    parts = (whole.rows(part.tolist()) for part in (training, validation, test))
    return _task(path.name, parts, target, group)


def _column(names: list[str], side: Side) -> int:
    name, value = side
    if name not in names or value not in (0, 1):
        raise ValueError(f"an attribute must be one of {', '.join(names)}, 0 or 1; got {name}={value}.")
    return names.index(name)


def _task(data: str, parts: Iterable[Population], target: Side, group: Side, output: int = 0) -> Task:
    """The task of predicting the target, on the parts for training, validation and test."""
    name = f"{data} {target[0]}={target[1]} {group[0]}={group[1]}"
    training, validation, test = parts
    return Task(name, training, validation, test, output, (target[1], group[1]))


def _embeddings(path: Path, rows: int) -> Tensor:
    """Embeddings, centred and divided by one number; both are computed on the training rows."""
    (x,) = read_arrays(path, ("x",))
    with reading(path):
        if x.ndim != 2 or len(x) != rows:
            raise ValueError(f"x must have shape ({rows}, features), a row for each image, got {x.shape}.")
        features = as_features(x)
    mean, scale = centring(features[: CELEBA_PARTS[0]])
    return (features - mean) / scale
