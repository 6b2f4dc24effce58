"""Safetensors files with metadata and checksums."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mumoe_tensor.files import whole_file
from mumoe_tensor.readers import parse_json, reading

M = TypeVar("M", bound=nn.Module)
#: Entries of the metadata: the checksums of the tensors, and the checksum of all other entries.
TENSORS, WHOLE = "checksums", "checksum"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, atomically, with `about` as its metadata."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    sums = {name: signature(value) for name, value in state.items()}
    metadata = {**about, TENSORS: json.dumps(sums)}
    content = save(state, {**metadata, WHOLE: _checksum_of(metadata)})
    with whole_file(Path(path)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: str | Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors written by `write_tensors` to the CPU; nothing is unpickled.

    Parameters
    ----------
    check : bool, default True
        Compare the tensors with their checksums. If False, they are read from disk only when they are used.

    Returns
    -------
    dict of str to Tensor
        The tensors.
    dict of str to str
        The metadata. Files without checksums are accepted.

    Raises
    ------
    ValueError
        If the file is not a safetensors file, or a checksum differs; the message names the tensor.
    OSError
        If the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # raises errors of the operating system
        pass
    with reading(path):
        try:
            with safe_open(path, "pt") as file:
                about = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        except SafetensorError as error:
            raise ValueError(f"it must be a complete safetensors file: {error}.") from None
        if TENSORS in about or WHOLE in about:
            whole = about.pop(WHOLE, None)
            if whole != _checksum_of(about):
                raise ValueError("the metadata must match the checksum in the file.")
            sums = parse_json(about.pop(TENSORS))
            if check:
                check_tensors(tensors, sums, signature)
    return tensors, about


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``state_dict`` from a safetensors or `torch.save` file, without running code in it.

    Raises
    ------
    ValueError
        If the file is damaged, or contains anything other than tensors.
    OSError
        If the file cannot be read.
    """
    if Path(path).suffix == ".safetensors":
        return read_tensors(path)[0]
    with reading(path):
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception:  # a damaged pickle may raise anything
            content = None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it must be a complete file that contains only a dict of tensors.")
        return content


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Any], checksum: Callable[[Tensor], Any]
) -> None:
    """Compare tensors with their expected checksums, computed by `checksum`.

    Raises
    ------
    ValueError
        If a tensor is missing or unexpected, or has a different checksum; the message names the tensor.
    """
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        raise ValueError(f"tensors and checksums must have the same names; {odd[0]} is in only one of them.")
    for name, value in tensors.items():
        if checksum(value) != expected[name]:
            raise ValueError(f"{name} must match its checksum in the file.")


def checksum_of_bytes(value: Tensor) -> int:
    """The CRC-32 of the bytes of a tensor."""
    # NumPy does not support bfloat16, so the tensor is viewed as bytes.
    content: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)


def load_tensors(model: M, tensors: Mapping[str, Tensor]) -> M:
    """Assign tensors to a model on the meta device, and put it into evaluation mode.

    Thus the shapes are checked before any memory is allocated. If names or shapes differ from those of the
    model, a ValueError is raised.
    """
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        # Torch lists every tensor.
        raise ValueError(f"the tensors must match the config: {shorten(str(error), 300)}") from None
    return model.eval()


def signature(value: Tensor) -> str:
    """The dtype, the shape and a checksum of the bytes of a tensor on the CPU."""
    return f"{value.dtype} {tuple(value.shape)} {checksum_of_bytes(value)}"


def _checksum_of(metadata: Mapping[str, str]) -> str:
    return str(zlib.crc32(json.dumps(metadata, sort_keys=True).encode()))
