"""The page of a model built by user code, with inputs from files."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mumoe_tensor.browser.models import browse_language_model, browse_model
from mumoe_tensor.browser.samples import Images
from mumoe_tensor.configs.page import PageConfig
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.progress import Progress
from mumoe_tensor.readers import array_names, read_arrays, reading
from mumoe_tensor.replace import read_texts, windows
from mumoe_tensor.training.data import as_features, as_labels, as_pixels
from mumoe_tensor.training.finite import first_layer_not_finite

#: Tokens per window of text.
CONTEXT = 256


def browse_built(
    build: str,
    config: PageConfig | None = None,
    *,
    data: str | Path | None = None,
    progress: Progress | None = None,
) -> str:
    """Make the page of a model that a user's function builds.

    The function is imported and called: only pass code that you trust.

    Parameters
    ----------
    build : str
        ``package.module:function``, which may be in the current folder. The function takes no arguments and
        returns the model or, for a language model, the model and its tokenizer.
    config : PageConfig, optional
        The content of the page. For a language model, `texts` are used instead of `data`, in windows of 256
        tokens. `images` are not needed if the inputs are images.
    data : str or Path, optional
        An ``.npz`` file with inputs as x, and optionally their classes as y. Bytes are scaled to 0 to 1,
        floats and booleans become float32, and other integers are unchanged.
    progress : callable, optional
        As in `browse_model`.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    ValueError
        If the function cannot be imported or called, or returns something else, or the files do not match the
        model.
    """
    config = config or PageConfig()
    texts, images, rows = config.texts, config.images, config.rows
    if (data is None) == (texts is None):
        raise ValueError("exactly one of data and texts must be given.")
    model, tokenizer = build_model(build)
    if texts is not None:
        if images is not None or config.classes:
            raise ValueError("images and classes need data; they cannot be used with texts.")
        if tokenizer is None:
            raise ValueError(f"for texts, {build} must return the model and its tokenizer, got only a model.")
        tokens, _ = windows(read_texts(texts), tokenizer, CONTEXT)
        inputs = torch.stack(tokens[:rows])
        _check_call(build, model, inputs[:2])
        return browse_language_model(
            model, tokenizer.decode, inputs, k=config.shown, removed=config.removed, progress=progress,
            title=f"Experts of {build}", about=f"Texts: {Path(texts).name}.",
        )  # fmt: skip
    assert data is not None
    x, labels = _read_inputs(data)
    if not len(x):
        raise ValueError(f"x must have inputs; {data} has none.")
    if images is not None:
        (shown,) = read_arrays(images, ("x",))
        with reading(images):
            samples: Images | None = Images(as_pixels(shown).numpy())
            if len(shown) != len(x):
                raise ValueError(
                    f"there must be one image for each of {len(x):,} inputs, got {len(shown):,}."
                )
    else:
        samples = _as_images(x)
    _check_call(build, model, x[:2], 0 if labels is None or not len(labels) else int(labels.max()) + 1)
    return browse_model(
        model, x[:rows], labels if labels is None else labels[:rows], samples=samples,
        classes=config.classes, k=config.shown, removed=config.removed, progress=progress,
        title=f"Experts of {build}", about=f"{len(x[:rows]):,} inputs of {Path(data).name}.",
    )  # fmt: skip


def build_model(build: str) -> tuple[nn.Module, Any]:
    """Call a function that returns a model, or a model and its tokenizer; the tokenizer is None if missing.

    Parameters
    ----------
    build : str
        ``package.module:function``.

    Raises
    ------
    ValueError
        For any exception that the user's code raises.
    """
    name, _, function = build.partition(":")
    if not name or not function:
        raise ValueError(f"a model must be package.module:function, got {build!r}.")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        made = getattr(import_module(name), function)()
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"{build} raises {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{build} must return a torch.nn.Module, or a module and a tokenizer; got {type(model).__name__}."
        )
    return model, tokenizer


def _check_call(build: str, model: nn.Module, x: Tensor, classes: int = 0) -> None:
    """Check that the model accepts such inputs, and returns a logit for each class."""
    device = next((parameter.device for parameter in model.parameters()), x.device)
    try:
        with evaluating(model), torch.no_grad():
            output = model(x.to(device))
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"the model of {build} must take inputs such as x, of shape {tuple(x.shape)} and {x.dtype}; it "
            f"raises {type(error).__name__}: {error}"
        ) from error
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and not logits.isfinite().all():
        with evaluating(model):
            where = first_layer_not_finite(model, x.to(device))
        raise ValueError(f"the model of {build} must return finite outputs; {where}.")
    if classes and not (isinstance(logits, Tensor) and logits.ndim and logits.shape[-1] >= classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model of {build} must return a logit for each of {classes} classes, got {shape}."
        )


def _read_inputs(path: str | Path) -> tuple[Tensor, Tensor | None]:
    (x,) = read_arrays(path, ("x",))
    labels = read_arrays(path, ("y",)) if "y" in array_names(path) else []
    with reading(path):
        if x.dtype == np.uint8:
            inputs = as_pixels(x)
        else:
            inputs = as_features(x) if x.dtype.kind in "bf" else torch.tensor(x, dtype=torch.int64)
        return inputs, as_labels(labels[0]) if labels else None


def _as_images(x: Tensor) -> Images | None:
    """Inputs as images, if they have a height and a width; channels may be first, last or absent."""
    if x.ndim == 4 and x.shape[1] in (1, 3):
        x = x.movedim(1, -1)
    if x.ndim == 4 and x.shape[3] == 1:
        x = x[..., 0]
    if not x.is_floating_point() or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)):
        return None
    least, most = x.aminmax()
    if least < 0 or most > 1:  # normalized
        x = (x - least) / (most - least).clamp_min(1e-30)
    return Images(x.numpy())
