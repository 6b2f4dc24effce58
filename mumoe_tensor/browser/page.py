"""Experts on one page that needs no network; cards are drawn as they come into sight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mumoe_tensor.browser.collect import ExpertLevel
from mumoe_tensor.browser.plain import Sample, plain_levels, plain_sample
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.pages import render


def page(
    levels: list[ExpertLevel],
    samples: Images | Texts | None = None,
    *,
    title: str = "Experts",
    about: str = "",
    classes: Sequence[str] | Mapping[int, str] = (),
    grids: Mapping[str, tuple[int, int]] | None = None,
    written: Sample | None = None,
    experts: int | None = None,
) -> str:
    """Make a page of experts.

    Parameters
    ----------
    levels : list of ExpertLevel
        As of `collect`.
    samples : Images or Texts, optional
        What the inputs look like; without, only their numbers are shown. Tokens of texts are shaded by
        the expert's coefficients.
    title, about : str
        Above the experts.
    classes : sequence or mapping of int to str, optional
        Names of the classes, or of tokens; their numbers by default.
    grids : mapping of str to (int, int), optional
        Layers that see the patches of images, and how many of these an image has below and beside each other:
        patches are shaded by the expert's coefficients.
    written : Sample, optional
        A text that the model wrote, shown above the experts.
    experts : int, optional
        Show the most used so many experts of a level only, and none that no input uses; all by default.

    Returns
    -------
    str
        HTML with everything in it.

    Raises
    ------
    ValueError
        If there are fewer samples than inputs.
    """
    grids = grids or {}
    plain = plain_levels(levels, True if isinstance(samples, Texts) else grids, experts)
    cards = [expert for level in plain for expert in level["experts"]]
    used = sorted({top["i"] for expert in cards for top in expert["top"]})
    if samples is not None and used and used[-1] >= len(samples):
        raise ValueError(
            f"there must be a sample for every input; input {used[-1]} of {len(samples)} is shown."
        )
    labels = sorted({label for expert in cards for label, *_ in expert["bars"]})
    known = classes if isinstance(classes, Mapping) else dict(enumerate(classes))
    is_language = any(level.is_language for level in levels)
    data: dict[str, Any] = {
        "levels": plain,
        "samples": {} if samples is None else {index: samples.shown(index) for index in used},
        "classes": {label: known[label] for label in labels if label in known},
        "grids": grids,
        "language": is_language,
        "text": isinstance(samples, Texts),
        "sample": None if written is None else plain_sample(written, levels),
    }
    label = "token" if is_language else "class"
    return render("experts.html", title=title, about=about, label=label, written=written, data=data)
