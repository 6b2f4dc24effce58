"""The page of a run of `mumoe-tensor train` or `mumoe-tensor replace`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mumoe_tensor.browser.models import check_names, view_language_model, view_model
from mumoe_tensor.browser.samples import Images
from mumoe_tensor.browser.view import STRONGEST, Sample, View, page
from mumoe_tensor.configs.page import PageConfig
from mumoe_tensor.models.backbones import load_backbone
from mumoe_tensor.models.heads import Head
from mumoe_tensor.nn.watch import gates_of
from mumoe_tensor.nn.weights import load_tensors, read_tensors
from mumoe_tensor.progress import Progress
from mumoe_tensor.readers import read_arrays, reading
from mumoe_tensor.replace import Replaced, load_language_model, read_texts, splice, windows
from mumoe_tensor.replace.place import is_saved, load_in_place
from mumoe_tensor.training.data import Dataset, as_pixels, split
from mumoe_tensor.training.features import extract
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.images import DEVIATION, MEAN, class_folders
from mumoe_tensor.training.run import read_run
from mumoe_tensor.training.settings import GPT2Run, MixerRun
from mumoe_tensor.training.tokens import Tokenizer, read_vocabulary_size

#: Default number of validation images and, for a language model, of tokens in whole windows.
ROWS, TOKENS = 2000, 65_536
#: Length of the prompt and of the whole generated text, in tokens.
GIVEN, WRITTEN = 16, 128
#: Sampling settings for that text.
TEMPERATURE, TOP_K = 0.8, 40
#: Maps token ids to their text.
Decode = Callable[[list[int]], str]


def browse(
    folder: str | Path,
    config: PageConfig | None = None,
    *,
    beside: str | Path | None = None,
    progress: Progress | None = None,
) -> str:
    """Make the page of a run of ``mumoe-tensor train``, or of a layer of ``mumoe-tensor replace``.

    The inputs are rows that the model was not trained on.

    Parameters
    ----------
    folder : str or Path
        Folder of the run, or of the layer.
    config : PageConfig, optional
        The content of the page.
    beside : str or Path, optional
        Another run, on inputs of the same kind, to compare with.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If the folder has no finished run, its model has no experts, or the config does not apply to it.
    """
    config = config or PageConfig()
    folders = [Path(each) for each in (folder, beside) if each is not None]
    return page(*(_view_run(each, config, progress) for each in folders))


def _view_run(folder: Path, config: PageConfig, progress: Progress | None) -> View:
    if (folder / "grid.json").exists():
        raise ValueError(f"the folder must be the folder of one layer; choose one in {folder / 'layers'}.")
    if is_saved(folder):
        return _view_replaced(folder, config, progress)
    if config.texts is not None:
        raise ValueError(
            f"texts can only be used with a replacement layer; {folder} has another kind of run."
        )
    settings, model = read_run(folder)
    if isinstance(settings, HeadSetting):
        assert isinstance(model, Head)
        return _view_head(folder, settings, model, config, progress)
    if config.images is not None:
        raise ValueError(
            f"images can only be used with a head on features; {folder} has another kind of run."
        )
    gates_of(model)  # raises for a model without experts
    if isinstance(settings, MixerRun):
        return _view_mixer(settings, model, config, progress)
    return _view_gpt2(settings, model, config, progress)


def _view_replaced(folder: Path, config: PageConfig, progress: Progress | None) -> View:
    layer, place = load_in_place(folder)
    model, tokenizer = load_language_model(place.model)
    path = place.texts if config.texts is None else config.texts
    tokens, _ = windows(read_texts(path), tokenizer, place.context)
    count = -(-TOKENS // place.context) if config.rows is None else config.rows
    limit = inf if place.limit is None else place.limit
    with splice(model, place.module, Replaced(model.get_submodule(place.module), layer, limit)):
        return view_language_model(
            model, tokenizer.decode, torch.stack(tokens[:count]), [f"{place.module}.layer"], k=config.shown,
            removed=config.removed, title=f"{type(layer).__name__} in place of {place.module}",
            about=f"Texts: {Path(path).name}.", progress=progress,
        )  # fmt: skip


def _view_mixer(settings: MixerRun, model: Any, config: PageConfig, progress: Progress | None) -> View:
    sizes = model.config
    check_names(config.classes, sizes.classes)
    _, kept = settings.read_data()
    x, y = kept.batch(torch.arange(min(config.rows or ROWS, len(kept))))
    side = sizes.image_size // sizes.patch
    pixels = x.permute(0, 2, 3, 1)
    if Path(settings.data.inputs).is_dir():  # its images are normalized
        pixels = pixels * torch.tensor(DEVIATION) + torch.tensor(MEAN)
    elif not settings.data.scale:
        least, most = pixels.aminmax()
        pixels = (pixels - least) / (most - least).clamp_min(1e-30)
    return view_model(
        model, x, y, samples=Images((pixels[..., 0] if sizes.channels == 1 else pixels).numpy()),
        title=f"{_times(sizes.experts)} experts in every block of a Mixer, {sizes.format}",
        about=(
            f"{len(x):,} images that the model was not trained on. The rows of a token_mlp are the channels "
            "of an image, over all patches; those of a channel_mlp are its patches, which are shaded."
        ),
        grids={f"blocks.{block}.channel_mlp": (side, side) for block in range(sizes.depth)}, pool="mean",
        classes=config.classes, k=config.shown, removed=config.removed, progress=progress,
    )  # fmt: skip


def _view_gpt2(settings: GPT2Run, model: Any, config: PageConfig, progress: Progress | None) -> View:
    _, kept = settings.read_data()
    sizes, context = model.config, model.config.context
    decode = _decoder(settings, config.vocabulary_files)
    count = min(-(-TOKENS // context) if config.rows is None else config.rows, len(kept))
    x, y = kept.batch(torch.arange(count))
    return view_language_model(
        model, decode, torch.cat([x, y[:, -1:]], 1), k=config.shown, removed=config.removed, experts=None,
        threshold=0.5, progress=progress, written=_written(model, x[len(x) // 2], decode),
        title=f"{_times(sizes.experts)} experts in every block of a GPT-2, {sizes.format}",
        about=f"{len(x):,} windows of {context:,} tokens that the model was not trained on.",
    )  # fmt: skip


def _written(model: Any, start: Tensor, decode: Decode) -> Sample:
    """Generate text from a prompt, within one context window."""
    given = min(GIVEN, len(start) // 2) or 1
    steps = max(1, min(WRITTEN, len(start)) - given)
    top_k = min(TOP_K, model.config.vocabulary)
    tokens, coefficients = model.generate(
        start[None, :given], steps, temperature=TEMPERATURE, top_k=top_k,
        generator=torch.Generator().manual_seed(0), return_coefficients=True,
    )  # fmt: skip
    return Sample(
        tokens=[decode([token]) for token in tokens[0].tolist()],
        given=given,
        coefficients={
            (name.rpartition(".")[0], level): each[0]
            for name, of_gate in coefficients.items()
            for level, each in enumerate(of_gate)
        },
        about=(
            f"Generated after the {given} tokens in italics, from the validation text: temperature "
            f"{TEMPERATURE}, top-k {top_k}, seed 0. For each token, the {STRONGEST} most active experts are "
            "kept."
        ),
    )


def _decoder(settings: GPT2Run, folder: Path) -> Decode:
    """A function from a token id to its text. Ids that pad the vocabulary are marked as unused."""
    about = Path(settings.data.validation).with_name("tokens.json")
    tokenizer = Tokenizer(folder, read_vocabulary_size(about) if about.exists() else None)
    return lambda ids: tokenizer.decode(ids) if ids[0] < tokenizer.vocabulary else "�"


def _times(experts: Sequence[int]) -> str:
    return " × ".join(map(str, experts))


def _view_head(
    folder: Path, setting: HeadSetting, head: Head, config: PageConfig, progress: Progress | None
) -> View:
    data, classes = setting.read_data(), config.classes
    _, kept = split(data, setting.validation, seed=0)
    kept = kept.rows(torch.arange(min(config.rows or ROWS, len(kept))))
    if not isinstance(kept, Dataset):
        kept = Dataset(*kept.batch(range(len(kept))))
        classes = classes or tuple(class_folders(setting.inputs)[1])
    samples = None
    if config.images is not None:
        (pictures,) = read_arrays(config.images, ("x",))
        with reading(config.images):
            if pictures.shape[:1] != (len(data),):
                raise ValueError(
                    f"there must be one image for every input; x has shape {pictures.shape}, the run has "
                    f"{len(data)} inputs."
                )
            # Split like the features, so that the order is the same.
            _, shown = split(Dataset(as_pixels(pictures), data.y), setting.validation, seed=0)
            samples = Images(shown.x[: len(kept)].numpy())
    elif kept.x.ndim == 3:
        samples = Images(kept.x.numpy())
    elif kept.x.ndim == 4 and kept.x.shape[1] == 3:
        samples = Images(kept.x.movedim(1, -1).numpy())
    if setting.backbone is not None and setting.weights is not None:
        backbone = load_backbone(setting.backbone, setting.weights, setting.size)
        if setting.train_backbone:
            weights = folder / "backbone.safetensors"
            tensors, _ = read_tensors(weights)
            with reading(weights):
                load_tensors(backbone, tensors)
        kept = extract(backbone, kept)
    check_names(classes, head.config["classes"])
    return view_model(
        head, kept.x.flatten(1), kept.y, samples=samples, classes=classes, k=config.shown, removed=None,
        effect_inputs=None, progress=progress,
        title=f"{_times(head.config['experts'])} experts of a {head.config['format']} head",
        about=f"{len(kept):,} rows that the head was not trained on.",
    )  # fmt: skip
