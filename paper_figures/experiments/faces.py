"""Embeddings of faces for ``mumoe-tensor bias``; the protocol is ``docs/experiments/faces.md``.

    python -m paper_figures.experiments.faces

Reads the files ``data/utkface/AGE_GENDER_*.jpg`` and the weights that `make data` fetches. Writes
``data/faces.npz`` with features x and the attributes old and male.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mumoe_tensor.files import whole_file
from paper_figures.experiments import command
from paper_figures.experiments.embeddings import embed
from paper_figures.experiments.tables import DATA

#: Minimum age of an old face.
OLD = 50


def labels(paths: list[Path]) -> tuple[list[int], list[int]]:
    """The attributes old and male, 0 or 1, from file names AGE_GENDER_…, where a gender of 0 is male.

    Raises
    ------
    ValueError
        If a name has another form.
    """
    old, male = [], []
    for path in paths:
        age, gender, *_ = path.name.split("_")
        if not age.isdecimal() or gender not in ("0", "1"):
            raise ValueError(f"files must be named AGE_GENDER_…, got {path.name}.")
        old.append(int(int(age) >= OLD))
        male.append(int(gender == "0"))
    return old, male


def embed_faces() -> None:
    """Write the embeddings."""
    paths = sorted(path for path in (DATA / "utkface").glob("*.jpg") if path.name.count("_") >= 3)
    old, male = labels(paths)
    features = embed(list(zip(paths, old, strict=True))).x
    with whole_file(DATA / "faces.npz") as file:
        np.savez(file, x=features.numpy(), old=np.array(old), male=np.array(male))
    print(f"{len(paths):,} faces: {sum(old):,} old, {sum(male):,} male")


STEPS = embed_faces

if __name__ == "__main__":
    command.run("faces")
