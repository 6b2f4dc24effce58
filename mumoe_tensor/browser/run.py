"""The page of what `mumoe-tensor train` trained: a head, a Mixer or a GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.browser.collect import collect
from mumoe_tensor.browser.page import page
from mumoe_tensor.browser.plain import STRONGEST, Sample
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.nn.watch import gates_of
from mumoe_tensor.nn.weights import load_tensors, read_tensors
from mumoe_tensor.readers import read_arrays, read_json, reading
from mumoe_tensor.training.data import Dataset, as_pixels, split
from mumoe_tensor.training.features import extract
from mumoe_tensor.training.finished import read_head_run, read_run
from mumoe_tensor.training.folder import HEAD
from mumoe_tensor.training.images import DEVIATION, MEAN
from mumoe_tensor.training.settings import GPT2Run, MixerRun
from mumoe_tensor.training.tokens import Tokenizer, read_vocabulary_size

Progress = Callable[[int, int, str], None]
#: Validation rows to look at: of images, or of a language model so many tokens in whole windows.
ROWS, TOKENS = 2000, 65_536
#: Images, or tokens in whole windows, in which the effect of an expert is looked for.
EFFECT_IMAGES, EFFECT_TOKENS = 500, 2048
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
    rows: int | None = None,
    k: int = 8,
    removed: int = 16,
    progress: Progress | None = None,
) -> str:
    """Make the page of a run of ``mumoe-tensor train``, from rows that it was not trained on.

    Parameters
    ----------
    folder : str or Path
        That of the run.
    images : str or Path, optional
        Of a head on features: see `browse_head`.
    classes : sequence of str, optional
        Names of the classes of images.
    vocabulary : str or Path, default "data/gpt2-vocabulary"
        Of a GPT-2: the folder with the byte pairs, ``encoder.json`` and ``vocab.bpe``.
    rows : int, optional
        Validation rows to look at: 2000 images by default, or whole windows of at least 65,536 tokens.
    k : int, default 8
        Inputs to show for each expert.
    removed : int, default 16
        Of Mixer and GPT-2, experts of a level that are removed to see their effect: the most used ones; of
        a head, all are.
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
    folder, known = Path(folder), {}
    if (rows is not None and rows < 1) or k < 1 or removed < 0:
        raise ValueError(
            f"rows and k must be positive, and removed not negative, got {rows}, {k} and {removed}."
        )
    if (folder / "config.json").exists():
        known = read_json(folder / "config.json")
    if HEAD[0] in known:
        return browse_head(
            folder, images=images, classes=classes, rows=ROWS if rows is None else rows, k=k,
            progress=progress,
        )  # fmt: skip
    if images is not None:
        raise ValueError(f"images are for a head on features; {folder} has a run of another kind.")
    settings, model = read_run(folder)
    gates_of(model)  # without experts there is nothing to show
    if isinstance(settings, MixerRun):
        return _browse_mixer(settings, model, classes, ROWS if rows is None else rows, k, removed, progress)
    return _browse_gpt2(settings, model, Path(vocabulary), rows, k, removed, progress)


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
    passage = max(size for size in range(1, min(PASSAGE, context) + 1) if context % size == 0)
    looked = min(max(1, EFFECT_TOKENS // context), count)
    levels = collect(
        model, x, y, k=k, batch_size=max(1, 4096 // context), passage=passage, effects=removed > 0,
        removed=removed, effect_inputs=looked, progress=progress,
    )  # fmt: skip
    names = {int(token): decode(int(token)) for token in x.unique()}
    return page(
        levels,
        Texts([[names[token] for token in row] for row in x.reshape(-1, passage).tolist()]),
        title=f"{_times(config.experts)} experts in every block of a GPT-2, {config.format}",
        about=(
            f"{x.numel():,} tokens that it was not trained on. Shown are the passages of {passage} tokens "
            "whose most active token is the most active; tokens are shaded by the expert's coefficient, "
            "relative to the largest on the card. Bars: the tokens that the expert's coefficients go to, "
            "beyond their share of all tokens; in brackets, how many times that share. Loss: the change in "
            f"nats per token without the expert, {_told_effects(removed, config.experts)} on "
            f"{looked * context:,} tokens. Load: tokens with a coefficient of 0.5 or more."
        ),
        classes=names,
        written=_written(model, x[len(x) // 2], decode),
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
    setting, head = read_head_run(folder)
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
