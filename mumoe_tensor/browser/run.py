"""The page of a head that `mumoe-tensor train head` trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mumoe_tensor.browser.collect import collect
from mumoe_tensor.browser.page import page
from mumoe_tensor.browser.samples import Images
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.models.heads import load_head
from mumoe_tensor.training.data import Dataset, read_idx, read_npz, split
from mumoe_tensor.training.features import extract


def browse_head(
    folder: str | Path,
    *,
    images: str | Path | None = None,
    classes: Sequence[str] = (),
    rows: int = 2000,
    k: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> str:
    """Make the page of a trained head, from rows that it was not trained on.

    Parameters
    ----------
    folder : str or Path
        That of the run.
    images : str or Path, optional
        An ``.npz`` file with the images of the features as x, in the same order; y is not used. A run that
        was trained on images has its own.
    classes : sequence of str, optional
        Names of the classes.
    rows : int, default 2000
        Validation rows to look at.
    k : int, default 8
        Inputs to show for each expert.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If the folder has no finished run, the head has no experts, or images and features differ in number.
    """
    folder = Path(folder)
    if not (folder / "head.safetensors").exists() or not (folder / "config.json").exists():
        raise ValueError(f"{folder} must have a finished run: config.json and head.safetensors.")
    if rows < 1 or k < 1:
        raise ValueError(f"rows and k must be positive, got {rows} and {k}.")
    setting = json.loads((folder / "config.json").read_text(encoding="utf-8"))["setting"]
    head = load_head(folder / "head.safetensors")
    has_labels = setting["labels"] is not None
    data = read_idx(setting["inputs"], setting["labels"]) if has_labels else read_npz(setting["inputs"])
    _, kept = split(data, setting["validation"], seed=0)
    kept = kept.rows(torch.arange(min(rows, len(kept))))
    samples = None
    if images is not None:
        pictures = read_npz(images)
        if len(pictures) != len(data):
            raise ValueError(
                f"there must be an image for every input; {images} has {len(pictures)}, the run {len(data)}."
            )
        # Split as the features are, so in the same order.
        _, shown = split(Dataset(pictures.x, data.y), setting["validation"], seed=0)
        samples = Images(shown.x[: len(kept)].numpy() / max(1.0, float(pictures.x.max())))
    elif kept.x.ndim == 3:
        samples = Images(kept.x.numpy())
    if setting["backbone"] is not None:
        weights = folder / "backbone.safetensors"
        backbone = load_backbone(setting["backbone"], setting["weights"], setting["size"])
        if weights.exists():
            from safetensors.torch import load_file

            backbone.load_state_dict(load_file(weights))
        kept = extract(backbone, kept)
    levels = collect(head, kept.x.flatten(1), kept.y, k=k, progress=progress)
    experts = " × ".join(map(str, head.config.get("experts", ())))
    return page(
        levels,
        samples,
        title=f"{experts} experts of a {head.config['format']} head",
        about=(
            f"{len(kept):,} rows that the head was not trained on. Bars: the classes of the inputs that use "
            "an expert; in brackets, the change of their accuracy without it, in points. Effect: the sum of "
            "these changes. Load: inputs with a coefficient of 0.5 or more."
        ),
        classes=classes,
    )
