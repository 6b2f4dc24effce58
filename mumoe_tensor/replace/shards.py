"""A folder of shards: tensors computed by a model for many texts, written incrementally and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_positive
from mumoe_tensor.files import alone_in, whole_file
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.nn.weights import read_tensors, signature, write_tensors
from mumoe_tensor.progress import Progress
from mumoe_tensor.readers import read_json

#: Describes the shards. A shard is named after the range of its texts: the numbers of the first, and of the
#: one after the last.
MANIFEST = "manifest.json"
#: Maximum rounding error of stored values, relative to the largest.
ERROR = 0.01


class Shards:
    """The shards of a folder, which stay on disk until their rows are read.

    Parameters
    ----------
    folder : Path
    kind : str
        The kind that the manifest must have.

    Attributes
    ----------
    about : dict
        The manifest.
    tensors : list of dict of str to Tensor
        The tensors of each shard.

    Raises
    ------
    ValueError
        If the folder has another kind of content, is not finished, or has a corrupt shard.
    FileNotFoundError
        If there is no manifest.
    """

    def __init__(self, folder: Path, kind: str):
        self.about = read_json(folder / MANIFEST)
        if self.about.get("kind") != kind:
            raise ValueError(f"{folder} must contain {kind}; its {MANIFEST} says {self.about.get('kind')!r}.")
        paths = _paths(folder)
        done, total = _stop(paths), self.about["texts"]
        if done < total:
            raise ValueError(
                f"collection must be finished before {kind} are read; {folder} has {done:,} of "
                f"{total:,} texts. Run the collection again to resume."
            )
        self.tensors = [read_tensors(path, check=False)[0] for path in paths]


@torch.no_grad()
def collect_shards(
    model: nn.Module,
    texts: Sequence[Tensor],
    folder: Path,
    about: Mapping[str, Any],
    tensors_of: Callable[[Tensor], tuple[int, Mapping[str, Tensor]]],
    *,
    batch_size: int,
    shard_rows: int,
    progress: Progress | None,
) -> None:
    """Write the shards that a folder does not have yet.

    Parameters
    ----------
    model : Module
        Runs in evaluation mode.
    texts : sequence of Tensor
        Inputs of the model without the batch axis.
    about : mapping
        Contents of the manifest: ``kind``, and everything other than model and texts that the tensors depend
        on.
    tensors_of : callable
        Maps a batch of the model's inputs to its number of rows, and to tensors on the CPU that are
        concatenated along their first axis.
    batch_size : int
        Maximum number of texts in a batch. Only consecutive texts of the same shape share a batch.
    shard_rows : int
        A shard is written once it has this many rows.
    progress : callable or None
        Called as ``progress(done, total, text)``, where ``done`` and ``total`` count texts.

    Raises
    ------
    ValueError
        If there are no texts, one is empty, token ids have a batch axis, or the folder has shards of another
        model, other texts, or another `about`.
    TypeError
        If a text is not a tensor.
    OSError
        If another process is writing to the folder, or a file cannot be written.
    """
    batch_size, shard_rows = as_positive(batch_size, "batch_size"), as_positive(shard_rows, "shard_rows")
    if not len(texts):
        raise ValueError("texts must not be empty, got none.")
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    of_model = [*model.named_parameters(), *model.named_buffers()]
    manifest = {
        **about,
        "texts": len(texts),
        "model": _signature_of(of_model, [f"{k} {type(m).__qualname__}" for k, m in model.named_modules()]),
        "inputs": _signature_of(_numbered(texts)),
    }
    with alone_in(folder):
        begin = done = _stop(_paths(folder))
        if done:
            _check_manifest(folder / MANIFEST, manifest)
        else:
            with whole_file(folder / MANIFEST) as file:
                file.write(json.dumps(manifest, indent=2).encode())
        parts: list[Mapping[str, Tensor]] = []
        rows = 0
        with evaluating(model):
            for batch in _batches(texts, done, batch_size):
                count, tensors = tensors_of(batch.to(device))
                parts.append(tensors)
                done, rows = done + len(batch), rows + count
                if done == len(texts) or rows >= shard_rows:
                    whole = {name: torch.cat([part[name] for part in parts]) for name in tensors}
                    write_tensors(folder / f"{begin:08d}-{done:08d}.safetensors", whole, {})
                    begin, parts, rows = done, [], 0
                if progress is not None:
                    progress(done, len(texts), about["kind"])


def rows_of_each(rows: int, texts: int, what: str) -> Tensor:
    """The number of rows of each text in a batch, equal for all because they have the same shape."""
    if rows % texts:
        raise ValueError(
            f"{what} must have the same number of rows for each text of a shape; it has {rows} rows for "
            f"{texts} texts."
        )
    return torch.full((texts,), rows // texts, device="cpu")


def held(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy of values on the CPU, in a dtype that must be able to represent them.

    Raises
    ------
    ValueError
        If a value is not finite, the largest is too large for the dtype, or all are too small.
    """
    copy = values.to(dtype, copy=True)
    if values.numel():
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        largest = exact.abs().amax()
        if not (copy.to(exact.dtype) - exact).abs().amax() <= ERROR * largest:  # also for NaN
            if count := int((~exact.isfinite()).sum()):
                raise ValueError(f"{what} must be finite; {count:,} of {exact.numel():,} numbers are not.")
            name, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
            raise ValueError(
                f"{what} must be in the range of {name}, {limits.tiny:.1e} to {limits.max:.1e}; the "
                f"largest is {float(largest):.3g}. Collect them with dtype='float32', in a new folder."
            )
    return copy.cpu()


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    there = read_json(path)
    if others := [name for name in {**there, **manifest} if there.get(name) != manifest.get(name)]:
        raise ValueError(
            f"a folder must contain results of the same settings; {', '.join(others)} in {path} was "
            f"{', '.join(str(there.get(name)) for name in others)}, and is "
            f"{', '.join(str(manifest.get(name)) for name in others)} now."
        )


def _signature_of(tensors: Iterable[tuple[str, Tensor]], more: Sequence[str] = ()) -> str:
    """A checksum of names, dtypes, shapes and values."""
    whole = hashlib.sha256("\n".join(more).encode())
    for name, value in tensors:
        # Tools that offload parts of a model to disk keep their parameters on the meta device.
        content = f"{value.dtype} {tuple(value.shape)}" if value.is_meta else signature(value.detach().cpu())
        whole.update(f"\n{name} {content}".encode())
    return whole.hexdigest()


def check_text(text: Any) -> None:
    """Check that a text is a tensor."""
    if not isinstance(text, Tensor):
        raise TypeError(f"texts must be tensors, such as `windows(...).tokens`; got {type(text).__name__}.")


def _numbered(texts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for k, text in enumerate(texts):
        check_text(text)
        if not text.numel():
            raise ValueError(f"a text must have tokens; number {k} has shape {tuple(text.shape)}.")
        if text.ndim == 2 and len(text) == 1 and not text.is_floating_point():
            # Tokenizers return this shape. With a second batch axis, a model would compute something else.
            raise ValueError(
                "the token ids of a text must have shape (tokens,), without a batch axis; got "
                f"{tuple(text.shape)}."
            )
        yield str(k), text


def _batches(texts: Sequence[Tensor], start: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of the texts from `start` on; the texts of a batch have the same shape."""
    batch: list[Tensor] = []
    for k in range(start, len(texts)):
        text = texts[k]
        if batch and (len(batch) == batch_size or text.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(text)
    if batch:
        yield torch.stack(batch)


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*-[0-9]*.safetensors"))


def _stop(paths: Sequence[Path]) -> int:
    """The index after the last text, if the shards have no gaps."""
    stop = 0
    for path in paths:
        start, end = map(int, path.stem.split("-"))
        if start != stop:
            raise ValueError(f"shards must have no gaps; there is none from text {stop:,} to {path}.")
        stop = end
    return stop
