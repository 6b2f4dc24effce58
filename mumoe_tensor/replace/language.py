"""Read texts, and language models in the format of transformers, from disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_positive
from mumoe_tensor.extras import check_torchvision, require
from mumoe_tensor.readers import parse_json, read_text, reading


def load_language_model(folder: str | Path) -> tuple[nn.Module, Any]:
    """Load a causal language model from transformers, in float32 and evaluation mode, and its tokenizer.

    Nothing is downloaded.

    Parameters
    ----------
    folder : str or Path
        A folder written by ``save_pretrained``, or with one file ``*.gguf`` (requires the package gguf).

    Raises
    ------
    OSError, ValueError
        If the folder has no such model.
    ImportError
        If transformers is not installed, or the installed torchvision does not match torch.
    """
    require("transformers")
    check_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"a language model must be a folder; there is no folder {folder}.")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) > 1:
        raise ValueError(f"a folder must contain exactly one *.gguf file; {folder} has {len(packed)}.")
    if not packed and not (folder / "config.json").exists():
        raise ValueError(
            f"the folder of a language model must contain config.json or a *.gguf file; {folder} has neither."
        )
    options: dict[str, Any] = {"gguf_file": packed[0].name} if packed else {}
    options["local_files_only"] = True
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), tokenizer


def read_texts(path: str | Path) -> list[str]:
    """Read documents: a JSON Lines file with the key ``text`` in each line, or a folder of ``*.txt`` files.

    Raises
    ------
    ValueError
        If a line has no text, or there are no documents.
    FileNotFoundError
        If the path does not exist.
    """
    path = Path(path)
    if path.is_dir():
        texts = [read_text(file) for file in sorted(path.glob("*.txt"))]
    else:
        texts = []
        # splitlines also splits at characters that JSON does not escape.
        for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
            with reading(path):
                try:
                    text = parse_json(line).get("text")
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(text, str):
                    raise ValueError(f"line {number} must have a string under the key 'text', got {text!r}.")
            texts.append(text)
    if not texts:
        raise ValueError(f"texts must have documents: lines of JSON, or *.txt files; {path} has none.")
    return texts


def write_texts(path: str | Path, texts: Sequence[str]) -> None:
    """Write documents to a JSON Lines file, for `read_texts`."""
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class Windows(NamedTuple):
    """Windows of documents.

    Attributes
    ----------
    tokens : list of Tensor of int64 of shape (context,)
    documents : tuple of int
        Index of the document of each window.
    """

    tokens: list[Tensor]
    documents: tuple[int, ...]


def windows(texts: Sequence[str], tokenizer: Any, context: int) -> Windows:
    """Cut documents into windows of one length, without overlap; the rest of a document is dropped.

    Parameters
    ----------
    tokenizer : callable
        As in transformers: called with a text, it returns a mapping with ``input_ids``.
    context : int
        Tokens per window.

    Raises
    ------
    ValueError
        If no document has `context` tokens.
    TypeError
        If `texts` is a single string.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string.")
    as_positive(context, "context")
    tokens, documents = [], []
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
        parts = [part for part in ids.split(context) if len(part) == context]
        tokens += parts
        documents += [number] * len(parts)
    if not tokens:
        raise ValueError(f"a document must have at least {context} tokens, the context; none has.")
    return Windows(tokens, tuple(documents))
