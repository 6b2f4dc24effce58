"""Files of tensors: safetensors, with a description of what they are and checksums of everything."""

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
#: Entries of the metadata: the checksum of every tensor, and that of all other entries.
TENSORS, WHOLE = "checksums", "checksum"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors as one file of safetensors, whole or not at all.

    Parameters
    ----------
    path : str or Path
    tensors : mapping of str to Tensor
    about : mapping of str to str
        What they are.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
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
    """Read what `write_tensors` wrote, on the CPU; nothing is unpickled.

    Parameters
    ----------
    path : str or Path
    check : bool, default True
        Compare the tensors with their checksums. If not, they stay on the disk until they are read.

    Returns
    -------
    dict of str to Tensor
    dict of str to str
        What they are. A file without checksums is taken as it is: version 0.1 wrote none.

    Raises
    ------
    ValueError
        If the file is not of safetensors, or not what was written; says which tensor.
    OSError
        If it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # whose complaint about a path is one of the operating system
        pass
    with reading(path):
        try:
            with safe_open(path, "pt") as file:
                about = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"it must be a whole file of safetensors: {error}.") from None
        if TENSORS in about or WHOLE in about:
            whole = about.pop(WHOLE, None)
            if whole != _checksum_of(about):
                raise ValueError("the description of the tensors is not what was written.")
            sums = parse_json(about.pop(TENSORS))
            if check:
                check_tensors(tensors, sums, signature)
    return tensors, about


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``state_dict``, from a file of safetensors or from one of `torch.save`; no code in it is run.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        If the file is damaged, or has anything but tensors in it.
    OSError
        If it cannot be read.
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
            raise ValueError("weights are a whole file with a dict of tensors and nothing else.")
        return content


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Any], checksum: Callable[[Tensor], Any]
) -> None:
    """Compare tensors with a list of their checksums.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    expected : mapping of str to str or int
    checksum : callable
        Of a tensor.

    Raises
    ------
    ValueError
        If a tensor is missing, not in the list, or not what was written.
    """
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        raise ValueError(f"the file must have the tensors of its list; {odd[0]} is in one of them alone.")
    for name, value in tensors.items():
        if checksum(value) != expected[name]:
            raise ValueError(f"{name} is not what was written.")


def checksum_of_bytes(value: Tensor) -> int:
    """The CRC-32 of the bytes of a tensor."""
    # bfloat16 is unknown to NumPy, so the bytes are seen as such.
    content: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)


def load_tensors(model: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a model on ``meta`` these tensors, and put it into evaluation mode.

    So a config takes no memory before its shapes are seen to be those of the tensors.

    Parameters
    ----------
    model : Module
    tensors : mapping of str to Tensor

    Raises
    ------
    ValueError
        If names or shapes are not those of the model.
    """
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        # Torch lists every tensor.
        raise ValueError(f"the tensors must be those of the config: {shorten(str(error), 300)}") from None
    return model.eval()


def signature(value: Tensor) -> str:
    """The type, the shape and a checksum of the bytes of a tensor on the CPU."""
    return f"{value.dtype} {tuple(value.shape)} {checksum_of_bytes(value)}"


def _checksum_of(metadata: Mapping[str, str]) -> str:
    return str(zlib.crc32(json.dumps(metadata, sort_keys=True).encode()))
