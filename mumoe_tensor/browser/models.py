"""The page for any model, on general inputs or on texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.browser.collect import ExpertLevel, collect
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.browser.view import Sample, View, page
from mumoe_tensor.configs.page import check_counts
from mumoe_tensor.progress import Progress

#: Default number of experts shown per level of a language model, the most used ones.
EXPERTS = 256
#: Inputs, or tokens in whole windows, on which the effects of experts are measured.
EFFECT_INPUTS, EFFECT_TOKENS = 500, 2048
#: Maximum number of tokens per batch, unless a window has more; and tokens per passage.
BATCH_TOKENS, PASSAGE = 2048, 32


def browse_model(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    samples: Images | Texts | None = None,
    classes: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    grids: Mapping[str, tuple[int, int]] | None = None,
    k: int = 8,
    experts: int | None = None,
    removed: int = 16,
    batch_size: int = 256,
    pool: Literal["max", "mean"] = "max",
    threshold: float = 0.5,
    title: str = "",
    about: str = "",
    progress: Progress | None = None,
) -> str:
    """Make the page of the experts of any model, for given inputs.

    For a language model, see `browse_language_model`.

    Parameters
    ----------
    model : Module
        Takes inputs of shape (rows, ...), and has layers of experts. With `labels`, it must return logits of
        shape (rows, classes), or an object with an attribute `logits`.
    inputs : Tensor of shape (rows, ...)
    labels : Tensor of int of shape (rows,), optional
        Classes of the inputs.
    samples : Images or Texts, optional
        Images or texts to show for the inputs; by default their indices are shown.
    classes : sequence of str, optional
        Names of the classes.
    layers : sequence of str, optional
        Names of modules of the model; only experts in these are shown.
    grids : mapping of str to (int, int), optional
        Layers whose rows are patches of images; see `View`.
    k : int, default 8
        Inputs to show for each expert.
    experts : int, optional
        Number of experts per level to show, the most used first; all by default.
    removed : int, default 16
        With `labels`: number of experts per level, the most used first, whose removal is measured by its
        effect on the classes, on the first 500 inputs.
    batch_size : int, default 256
    pool : {"max", "mean"}, default "max"
        How to pool the coefficients of an input with several rows, such as patches or tokens.
    threshold : float, default 0.5
        Smallest coefficient with which a row counts for the load of an expert.
    title, about : str
        Heading, and a description of the inputs below it.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError, TypeError
        As in `collect`, or if a number is out of range, or classes or samples do not match the inputs.

    Examples
    --------
    >>> from mumoe_tensor.nn import MuMoE
    >>> model, x, y = MuMoE(16, 3, experts=4, rank=2), torch.rand(20, 16), torch.arange(20) % 3
    >>> browse_model(model, x, y, samples=Images(x.reshape(20, 4, 4)), classes=["a", "b", "c"])[:15]
    '<!doctype html>'
    """
    check_counts(removed, k=k, batch_size=batch_size, experts=experts)
    if labels is not None and labels.numel():
        check_names(classes, int(labels.max()) + 1)
    device = next((p.device for p in model.parameters()), inputs.device)
    return page(
        view_model(
            model, inputs.to(device), labels if labels is None else labels.to(device), samples=samples,
            classes=classes, layers=layers, grids=grids, k=k, experts=experts, removed=removed,
            batch_size=batch_size, pool=pool, threshold=threshold, progress=progress,
            title=title or f"Experts of {type(model).__name__}", about=about or f"{len(inputs):,} inputs.",
        )
    )  # fmt: skip


def view_model(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None,
    *,
    samples: Images | Texts | None,
    classes: Sequence[str],
    title: str,
    about: str,
    k: int,
    removed: int | None,
    layers: Sequence[str] | None = None,
    grids: Mapping[str, tuple[int, int]] | None = None,
    experts: int | None = None,
    batch_size: int = 256,
    pool: Literal["max", "mean"] = "max",
    threshold: float = 0.5,
    effect_inputs: int | None = EFFECT_INPUTS,
    progress: Progress | None,
) -> View:
    """See `browse_model`."""
    levels = collect(
        model, inputs, labels, k=k, pool=pool, batch_size=batch_size, removed=removed,
        effect_inputs=effect_inputs, layers=layers, threshold=threshold, progress=progress,
    )  # fmt: skip
    legend = []
    if any(level.rows is not None for level in levels):
        how = "largest" if pool == "max" else "mean"
        legend.append(f"The coefficient of an input is the {how} coefficient of its rows.")
    if labels is not None:
        remark = "the ratio of the two"
        if removed != 0:
            count = len(inputs[:effect_inputs])
            remark = "the change in their accuracy without it, in points. Effect: the sum of these changes, "
            remark += f"{measured(removed, levels)} on {count:,} inputs"
        legend.append(
            "Bars: the classes whose share of the expert's coefficients exceeds their share of the inputs; "
            f"in parentheses, {remark}."
        )
    legend.append(f"Load: rows with a coefficient of at least {threshold:g}.")
    return View(
        levels, samples, title=title, about=about, legend=" ".join(legend), classes=classes,
        grids=grids or {}, experts=experts,
    )  # fmt: skip


def measured(removed: int | None, levels: list[ExpertLevel]) -> str:
    """A phrase that says for which experts effects were measured."""
    if removed == 0:
        return "not measured,"
    if removed is None or all(removed >= len(level.top) for level in levels):
        return "measured"
    return f"measured for the {removed} most used experts of each level"


def check_names(classes: Sequence[str], count: int) -> None:
    """Check that there is a name for every class, or no names."""
    if classes and len(classes) != count:
        raise ValueError(f"classes must be empty or have {count} names, one per class; got {len(classes)}.")


def browse_language_model(
    model: nn.Module,
    decode: Callable[[list[int]], str],
    windows: Tensor,
    layers: Sequence[str] | None = None,
    *,
    k: int = 8,
    experts: int = EXPERTS,
    removed: int = 16,
    title: str = "",
    about: str = "",
    progress: Progress | None = None,
) -> str:
    """Make the page of the experts of a causal language model from any library, such as transformers.

    Parameters
    ----------
    model : Module
        Maps token ids of shape (rows, tokens) to logits, or to an object with an attribute `logits`. Has
        layers of experts, such as those of ``mumoe_tensor.replace``.
    decode : callable
        Maps a list of token ids to their text, like the method of a tokenizer.
    windows : Tensor of int of shape (rows, tokens)
        Token ids of the texts. They are shown in passages of 32 tokens; the rest of a window is left out.
    layers : sequence of str, optional
        Names of the modules of the model whose experts are shown; all by default.
    k : int, default 8
        Passages to show for each expert.
    experts : int, default 256
        Number of experts per level to show, the most used first; each adds about 4 kB to the page.
    removed : int, default 16
        Number of experts per level, the most used first, whose removal is measured by its effect on the loss,
        on the first 2,048 tokens (whole windows). Each takes at least two forward passes.
    title, about : str
        Heading, and a description of the texts below it.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If a layer has no experts, there are no windows, they have fewer than two tokens, or a number is out
        of range.
    TypeError
        If tokens are not integers.
    """
    check_counts(removed, k=k, experts=experts)
    return page(
        view_language_model(
            model, decode, windows, layers, k=k, experts=experts, removed=removed, title=title, about=about,
            progress=progress,
        )
    )  # fmt: skip


def view_language_model(
    model: nn.Module,
    decode: Callable[[list[int]], str],
    windows: Tensor,
    layers: Sequence[str] | None = None,
    *,
    k: int,
    removed: int,
    title: str,
    about: str,
    experts: int | None = EXPERTS,
    threshold: float = torch.finfo(torch.float32).tiny,
    written: Sample | None = None,
    progress: Progress | None,
) -> View:
    """See `browse_language_model`."""
    windows = read_labels(windows, what="tokens")
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(
            f"windows must have shape (rows, tokens) with at least two tokens; got {tuple(windows.shape)}."
        )
    windows = windows.to(next(model.parameters()).device)
    passage = min(PASSAGE, windows.shape[1] - 1)
    context = (windows.shape[1] - 1) // passage * passage
    x, y = windows[:, :context], windows[:, 1 : context + 1]
    looked = min(max(1, EFFECT_TOKENS // context), len(x))
    levels = collect(
        model, x, y, k=k, batch_size=max(1, BATCH_TOKENS // context), passage=passage, removed=removed,
        effect_inputs=looked, layers=layers, threshold=threshold, progress=progress,
    )  # fmt: skip
    names = {token: decode([token]) for token in x.unique().tolist()}
    return View(
        levels,
        Texts([[names[token] for token in row] for row in x.reshape(-1, passage).tolist()]),
        title=title or f"Experts of {', '.join(layers or [type(model).__name__])}",
        about=about or f"{x.numel():,} tokens.",
        legend=(
            f"Passages of {passage} tokens are ranked by their largest coefficient; tokens are shaded by the "
            "expert's coefficient, relative to the largest on the card. Bars: the tokens whose share of the "
            "expert's coefficients exceeds their share of all tokens; in parentheses, the ratio of the two. "
            f"Loss: the change in nats per token without the expert, {measured(removed, levels)} on "
            f"{looked * context:,} tokens. Load: tokens with a coefficient "
            f"{'of at least 0.5' if threshold == 0.5 else 'above zero'}."
        ),
        classes=names,
        written=written,
        experts=experts,
    )
