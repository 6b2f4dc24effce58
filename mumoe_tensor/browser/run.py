"""The page of what `mumoe-tensor train` trained: a head, a Mixer or a GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.browser.collect import collect
from mumoe_tensor.browser.page import page
from mumoe_tensor.browser.plain import STRONGEST, Sample
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.models.heads import Head
from mumoe_tensor.nn.watch import gates_of
from mumoe_tensor.nn.weights import load_tensors, read_tensors
from mumoe_tensor.readers import read_arrays, reading
from mumoe_tensor.replace import Replaced, load_language_model, read_texts, splice, windows
from mumoe_tensor.replace.place import is_saved, load_in_place
from mumoe_tensor.training.data import Dataset, as_pixels, split
from mumoe_tensor.training.features import extract
from mumoe_tensor.training.finished import read_run
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.images import DEVIATION, MEAN
from mumoe_tensor.training.settings import GPT2Run, MixerRun
from mumoe_tensor.training.tokens import Tokenizer, read_vocabulary_size

Progress = Callable[[int, int, str], None]
#: Validation rows to look at: of images, or of a language model so many tokens in whole windows.
ROWS, TOKENS = 2000, 65_536
#: Images, or tokens in whole windows, in which the effect of an expert is looked for.
EFFECT_IMAGES, EFFECT_TOKENS = 500, 2048
#: Tokens whose logits are in memory at once, if a window has not more.
BATCH_TOKENS = 2048
#: Tokens of a passage that is shown, at most; of the start of the text that is written; and of that text.
PASSAGE, GIVEN, WRITTEN = 32, 16, 128
#: How that text is drawn.
TEMPERATURE, TOP_K = 0.8, 40


def browse(
    folder: str | Path,
    *,
    images: str | Path | None = None,
    classes: Sequence[str] = (),
    vocabulary: str | Path = "data/gpt2-vocabulary",
    texts: str | Path | None = None,
    rows: int | None = None,
    k: int = 8,
    removed: int = 16,
    progress: Progress | None = None,
) -> str:
    """Make the page of a run of ``mumoe-tensor train``, or of a layer of ``mumoe-tensor replace``.

    The inputs are rows that it was not trained on.

    Parameters
    ----------
    folder : str or Path
        That of the run, or of the layer.
    images : str or Path, optional
        Of a head on features: see `browse_head`.
    classes : sequence of str, optional
        Names of the classes of images.
    vocabulary : str or Path, default "data/gpt2-vocabulary"
        Of a GPT-2: the folder with the byte pairs, ``encoder.json`` and ``vocab.bpe``.
    texts : str or Path, optional
        Of a layer that replaces another: see `.read_texts`; by default the test texts of its grid.
    rows : int, optional
        Validation rows to look at: 2000 images by default, or whole windows of at least 65,536 tokens.
    k : int, default 8
        Inputs to show for each expert.
    removed : int, default 16
        Of Mixer, GPT-2 and layers that replace others, experts of a level that are removed to see their
        effect: the most used ones; of a head, all are.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If the folder has no finished run, or its model has no experts, or an argument does not fit it.
    """
    folder = Path(folder)
    if (rows is not None and rows < 1) or k < 1 or removed < 0:
        raise ValueError(
            f"rows and k must be positive, and removed not negative, got {rows}, {k} and {removed}."
        )
    if (folder / "grid.json").exists():
        raise ValueError(f"a layer of replace has a folder of its own: choose one in {folder / 'layers'}.")
    if is_saved(folder):
        return _browse_replaced(folder, texts, rows, k, removed, progress)
    if texts is not None:
        raise ValueError(f"texts are for a layer that replaces another; {folder} has a run of another kind.")
    settings, model = read_run(folder)
    if isinstance(settings, HeadSetting):
        return browse_head(
            folder, images=images, classes=classes, rows=ROWS if rows is None else rows, k=k,
            progress=progress,
        )  # fmt: skip
    if images is not None:
        raise ValueError(f"images are for a head on features; {folder} has a run of another kind.")
    gates_of(model)  # without experts there is nothing to show
    if isinstance(settings, MixerRun):
        return _browse_mixer(settings, model, classes, ROWS if rows is None else rows, k, removed, progress)
    return _browse_gpt2(settings, model, Path(vocabulary), rows, k, removed, progress)


def _browse_replaced(
    folder: Path, texts: str | Path | None, rows: int | None, k: int, removed: int, progress: Progress | None
) -> str:
    layer, place = load_in_place(folder)
    model, tokenizer = load_language_model(place.model)
    path = place.texts if texts is None else texts
    tokens, _ = windows(read_texts(path), tokenizer, place.context)
    count = -(-TOKENS // place.context) if rows is None else rows
    limit = inf if place.limit is None else place.limit
    with splice(model, place.module, Replaced(model.get_submodule(place.module), layer, limit)):
        return browse_language_model(
            model, tokenizer.decode, torch.stack(tokens[:count]), [f"{place.module}.layer"], k=k,
            removed=removed,
            title=f"{type(layer).__name__} in the place of {place.module}",
            about=f"Texts: {Path(path).name}.", progress=progress,
        )  # fmt: skip


def _check_names(classes: Sequence[str], count: int) -> None:
    if classes and len(classes) != count:
        raise ValueError(f"there must be a name for each of {count} classes, or none; got {len(classes)}.")


def _browse_mixer(
    settings: MixerRun,
    model: Any,
    classes: Sequence[str],
    rows: int,
    k: int,
    removed: int,
    progress: Progress | None,
) -> str:
    _check_names(classes, model.config.classes)
    _, kept = settings.read_data()
    x, y = kept.batch(torch.arange(min(rows, len(kept))))
    levels = collect(
        model, x, y, k=k, pool="mean", effects=removed > 0, removed=removed, effect_inputs=EFFECT_IMAGES,
        progress=progress,
    )  # fmt: skip
    config = model.config
    side = config.image_size // config.patch
    pixels = x.permute(0, 2, 3, 1)
    if Path(settings.data.inputs).is_dir():  # whose images are normalised
        pixels = pixels * torch.tensor(DEVIATION) + torch.tensor(MEAN)
    elif not settings.data.scale:
        least, most = pixels.aminmax()
        pixels = (pixels - least) / (most - least).clamp_min(1e-30)
    looked = min(EFFECT_IMAGES, len(x))
    return page(
        levels,
        Images((pixels[..., 0] if config.channels == 1 else pixels).numpy()),
        title=f"{_times(config.experts)} experts in every block of a Mixer, {config.format}",
        about=(
            f"{len(x):,} images that it was not trained on. An expert of a token_mlp sees the channels of an "
            "image, each over all patches; one of a channel_mlp sees the patches. An image counts with the "
            "mean coefficient of its channels or patches; patches are shaded by theirs, relative to the "
            "largest on the card. Bars: the classes that the expert's coefficients go to, beyond their share "
            "of the images; in brackets, the change of their accuracy without it, in points. Effect: the sum "
            f"of these changes, {_told_effects(removed, config.experts)} on {looked:,} images. "
            "Load: channels or patches with a coefficient of 0.5 or more."
        ),
        classes=classes,
        grids={f"blocks.{block}.channel_mlp": (side, side) for block in range(config.depth)},
    )


def _browse_gpt2(
    settings: GPT2Run,
    model: Any,
    vocabulary: Path,
    rows: int | None,
    k: int,
    removed: int,
    progress: Progress | None,
) -> str:
    _, kept = settings.read_data()
    config = model.config
    context = config.context
    decode = _decoder(settings, vocabulary)
    count = min(-(-TOKENS // context) if rows is None else rows, len(kept))
    x, y = kept.batch(torch.arange(count))
    return _page_of_tokens(
        model,
        x,
        y,
        decode,
        passage=max(size for size in range(1, min(PASSAGE, context) + 1) if context % size == 0),
        k=k,
        removed=removed,
        title=f"{_times(config.experts)} experts in every block of a GPT-2, {config.format}",
        about=f"{x.numel():,} tokens that it was not trained on.",
        written=_written(model, x[len(x) // 2], decode),
        progress=progress,
    )


def browse_language_model(
    model: nn.Module,
    decode: Callable[[list[int]], str],
    windows: Tensor,
    layers: Sequence[str],
    *,
    k: int = 8,
    experts: int = 256,
    removed: int = 16,
    title: str = "",
    about: str = "",
    progress: Progress | None = None,
) -> str:
    """Make the page of layers of experts in a causal language model of any library, as those of transformers.

    Parameters
    ----------
    model : Module
        Token numbers of shape (rows, tokens) to logits, as they are or as attribute `logits`. Has layers of
        experts, such as those of ``mumoe_tensor.replace``.
    decode : callable
        From a list of token numbers to their text, as the method of a tokenizer.
    windows : Tensor of int of shape (rows, tokens)
        Text to look at; passages of 32 tokens are shown, and what is left of a window is not looked at.
    layers : sequence of str
        Names of the modules of the model whose experts are shown.
    k : int, default 8
        Passages to show for each expert.
    experts : int, default 256
        Most used experts of a level to show. The page has about 4 kB for each.
    removed : int, default 16
        Most used experts of a level that are removed to see the effect on the loss, in the first 2,048 tokens
        (whole windows): each takes two or more forward passes.
    title, about : str
        Above the experts; `about` says what the text is.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If a layer has no experts, there is no window, it has fewer than two tokens, or a number is out of
        range.
    TypeError
        If tokens are no integers.
    """
    windows = read_labels(windows, what="tokens")
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(
            f"windows must be of shape (rows, tokens), of two tokens or more; got {tuple(windows.shape)}."
        )
    if k < 1 or experts < 1 or removed < 0:
        raise ValueError(
            f"k and experts must be positive, and removed not negative, got {k}, {experts} and {removed}."
        )
    windows = windows.to(next(model.parameters()).device)
    passage = min(PASSAGE, windows.shape[1] - 1)
    context = (windows.shape[1] - 1) // passage * passage
    return _page_of_tokens(
        model,
        windows[:, :context],
        windows[:, 1 : context + 1],
        lambda token: decode([token]),
        passage=passage,
        k=k,
        removed=removed,
        title=title or f"Experts of {', '.join(layers)}",
        about=about or f"{len(windows) * context:,} tokens.",
        layers=layers,
        experts=experts,
        threshold=torch.finfo(torch.float32).tiny,
        progress=progress,
    )


def _page_of_tokens(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    decode: Callable[[int], str],
    *,
    passage: int,
    k: int,
    removed: int,
    title: str,
    about: str,
    layers: Sequence[str] | None = None,
    experts: int | None = None,
    threshold: float = 0.5,
    written: Sample | None = None,
    progress: Progress | None,
) -> str:
    """The page of a language model, of tokens of shape (windows, tokens) and the ones that follow each."""
    rows = max(1, BATCH_TOKENS // x.shape[1])
    looked = min(max(1, EFFECT_TOKENS // x.shape[1]), len(x))
    levels = collect(
        model, x, y, k=k, batch_size=rows, passage=passage, effects=removed > 0, removed=removed,
        effect_inputs=looked, layers=layers, threshold=threshold, progress=progress,
    )  # fmt: skip
    counts = [
        f" {level.layer}, level {level.level + 1}: {level.usage.active * len(level.top):.1f} of "
        f"{len(level.top):,} experts are active for a token on average, {level.usage.dead:,} for no token."
        for level in levels
        if experts is not None
    ]
    names = {token: decode(token) for token in x.unique().tolist()}
    return page(
        levels,
        Texts([[names[token] for token in row] for row in x.reshape(-1, passage).tolist()]),
        title=title,
        about=(
            f"{about} Shown are the passages of {passage} tokens "
            "whose most active token is the most active; tokens are shaded by the expert's coefficient, "
            "relative to the largest on the card. Bars: the tokens that the expert's coefficients go to, "
            "beyond their share of all tokens; in brackets, how many times that share. Loss: the change in "
            "nats per token without the expert, "
            f"{_told_effects(removed, [len(level.top) for level in levels])} on "
            f"{looked * x.shape[1]:,} tokens. Load: tokens with a coefficient "
            f"{'of 0.5 or more' if threshold == 0.5 else 'above zero'}.{''.join(counts)}"
        ),
        classes=names,
        written=written,
        experts=experts,
    )


def _written(model: Any, start: Tensor, decode: Callable[[int], str]) -> Sample:
    """A text that the model wrote, within one context, after the first tokens of another text."""
    given = min(GIVEN, len(start) // 2) or 1
    steps = max(1, min(WRITTEN, len(start)) - given)
    top_k = min(TOP_K, model.config.vocabulary)
    tokens, found = model.generate(
        start[None, :given], steps, temperature=TEMPERATURE, top_k=top_k,
        generator=torch.Generator().manual_seed(0), return_coefficients=True,
    )  # fmt: skip
    return Sample(
        tokens=[decode(token) for token in tokens[0].tolist()],
        given=given,
        coefficients={
            (name.rpartition(".")[0], level): each[0]
            for name, of_gate in found.items()
            for level, each in enumerate(of_gate)
        },
        about=(
            f"After the {given} tokens in italics, of the validation text: temperature {TEMPERATURE}, the "
            f"{top_k} most probable tokens, seed 0. Of each token the {STRONGEST} most active experts are "
            "kept."
        ),
    )


def _decoder(settings: GPT2Run, folder: Path) -> Callable[[int], str]:
    """From a token to its text. Ids that no text has, which fill a vocabulary up, are marked as such."""
    about = Path(settings.data.validation).with_name("tokens.json")
    tokenizer = Tokenizer(folder, read_vocabulary_size(about) if about.exists() else None)

    def decode(token: int) -> str:
        return tokenizer.decode([token]) if token < tokenizer.vocabulary else "�"

    return decode


def _times(experts: Sequence[int]) -> str:
    return " × ".join(map(str, experts))


def _told_effects(removed: int, experts: Sequence[int]) -> str:
    if not removed:
        return "not looked for,"
    if removed >= max(experts):
        return "measured"
    return f"measured for the {removed} most used experts of a level"


def browse_head(
    folder: str | Path,
    *,
    images: str | Path | None = None,
    classes: Sequence[str] = (),
    rows: int = 2000,
    k: int = 8,
    progress: Progress | None = None,
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
    if rows < 1 or k < 1:
        raise ValueError(f"rows and k must be positive, got {rows} and {k}.")
    setting, head = read_run(folder)
    if not isinstance(setting, HeadSetting) or not isinstance(head, Head):
        raise ValueError(f"this must be a run of train head; {folder} has one of train {setting.kind}.")
    data = setting.read_data()
    _, kept = split(data, setting.validation, seed=0)
    kept = kept.rows(torch.arange(min(rows, len(kept))))
    samples = None
    if images is not None:
        (pictures,) = read_arrays(images, ("x",))
        with reading(images):
            if pictures.shape[:1] != (len(data),):
                raise ValueError(
                    f"there must be an image for every input; x has shape {pictures.shape}, the run has "
                    f"{len(data)} inputs."
                )
            # Split as the features are, so in the same order.
            _, shown = split(Dataset(as_pixels(pictures), data.y), setting.validation, seed=0)
            samples = Images(shown.x[: len(kept)].numpy())
    elif kept.x.ndim == 3:
        samples = Images(kept.x.numpy())
    if setting.backbone is not None and setting.weights is not None:
        backbone = load_backbone(setting.backbone, setting.weights, setting.size)
        if setting.train_backbone:
            weights = folder / "backbone.safetensors"
            tensors, _ = read_tensors(weights)
            with reading(weights):
                load_tensors(backbone, tensors)
        kept = extract(backbone, kept)
    _check_names(classes, head.config["classes"])
    levels = collect(head, kept.x.flatten(1), kept.y, k=k, progress=progress)
    return page(
        levels,
        samples,
        title=f"{_times(head.config.get('experts', ()))} experts of a {head.config['format']} head",
        about=(
            f"{len(kept):,} rows that the head was not trained on. Bars: the classes that the expert's "
            "coefficients go to, beyond their share of the rows; in brackets, the change of their accuracy "
            "without it, in points. Effect: the sum of these changes. Load: inputs with a coefficient of 0.5 "
            "or more."
        ),
        classes=classes,
    )
