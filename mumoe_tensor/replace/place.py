"""A trained replacement layer on disk, with the module it replaces."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from mumoe_tensor.files import whole_file
from mumoe_tensor.nn.saving import load, save
from mumoe_tensor.readers import checked, read_json, reading

NAME = "place.json"


@dataclass(frozen=True)
class SavedPlace:
    """The module that a saved layer replaces, and texts to evaluate it on.

    Attributes
    ----------
    model : str
        Folder of the language model; see `.load_language_model`.
    module : str
        Name of the module that the layer replaces.
    texts : str
        Path of texts that the layer was not trained on; see `.read_texts`.
    context : int
        Tokens per window.
    limit : float or None
        Outputs of the module with a larger norm are kept.
    """

    model: str
    module: str
    texts: str
    context: int
    limit: float | None = None


def is_saved(folder: Path) -> bool:
    """Whether a folder has a layer and its place."""
    return (folder / NAME).exists()


def save_in_place(layer: nn.Module, place: SavedPlace, folder: Path) -> None:
    """Write a layer, in the format of `mumoe_tensor.nn.load`, and its place."""
    save(layer, folder)
    with whole_file(folder / NAME) as file:
        file.write(json.dumps(asdict(place), indent=2).encode())


def load_in_place(folder: Path) -> tuple[nn.Module, SavedPlace]:
    """Read a layer written by `save_in_place`.

    Raises
    ------
    ValueError
        If a file is corrupt.
    """
    with reading(folder / NAME):
        place = checked(SavedPlace, read_json(folder / NAME))
    return load(folder), place
