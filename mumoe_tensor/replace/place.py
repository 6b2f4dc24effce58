"""A trained layer on the disk, with the place it belongs to."""

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
    """What a saved layer is a replacement of.

    Attributes
    ----------
    model : str
        Folder of the language model, see `.load_language_model`.
    module : str
        Name of the module that the layer takes the place of.
    texts : str
        Path of texts that it was not trained on, see `.read_texts`.
    context : int
        Tokens of a window.
    limit : float or None
        Tokens for which the norm of the module's output is larger are left to the module.
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
    """Write a layer, which `mumoe_tensor.nn.load` reads, and its place."""
    save(layer, folder)
    with whole_file(folder / NAME) as file:
        file.write(json.dumps(asdict(place), indent=2).encode())


def load_in_place(folder: Path) -> tuple[nn.Module, SavedPlace]:
    """What `save_in_place` wrote.

    Raises
    ------
    ValueError
        If a file is damaged.
    """
    with reading(folder / NAME):
        place = checked(SavedPlace, read_json(folder / NAME))
    return load(folder), place
