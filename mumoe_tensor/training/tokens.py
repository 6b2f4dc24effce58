"""GPT-2's byte-pair tokenizer, and files of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mumoe_tensor.checks import as_positive
from mumoe_tensor.files import alone_in, replacing, whole_file
from mumoe_tensor.readers import read_json, read_text, reading
from mumoe_tensor.selections import Selection, read_selection

#: Dtype of a token on disk, as in the files that nanoGPT's scripts write.
TOKEN = np.dtype("<u2")
END_OF_TEXT = "<|endoftext|>"
#: Tokens read at a time when a whole file is scanned.
CHUNK = 1 << 24


class Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al., 2019), with all merges or only the first ones.

    Ids 0 to 255 are the bytes, 256 + k is the k-th merge, and the last id is the end of a text. A merge joins
    only tokens with lower ids, so the first merges form a valid vocabulary. A smaller vocabulary means a
    smaller output layer and more tokens per text.

    Parameters
    ----------
    folder : str or Path
        Contains ``encoder.json`` and ``vocab.bpe``; ``mumoe-tensor data`` fetches them into
        ``data/gpt2-vocabulary``.
    vocabulary : int, optional
        Number of ids. By default all 50,257.

    Attributes
    ----------
    vocabulary : int
    end : int
        Id of the end of a text.

    Raises
    ------
    ValueError
        If a file is invalid, or `vocabulary` is out of range.
    ImportError
        If ``tokenizers`` is not installed.
    """

    def __init__(self, folder: str | Path, vocabulary: int | None = None):
        from tokenizers import ByteLevelBPETokenizer

        ids, merges = _vocabulary(Path(folder))
        self.vocabulary = len(ids) if vocabulary is None else vocabulary
        if not 257 <= self.vocabulary <= len(ids):
            raise ValueError(
                f"a vocabulary must have the 256 bytes, the end of a text, and 0 to {len(merges):,} merges; "
                f"got {self.vocabulary:,} ids."
            )
        self.end = self.vocabulary - 1
        kept = {token: i for token, i in ids.items() if i < self.end}
        self._pairs = ByteLevelBPETokenizer(
            kept | {END_OF_TEXT: self.end}, merges[: self.vocabulary - 257], add_prefix_space=False
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end-of-text id."""
        return self._pairs.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid UTF-8 becomes replacement characters.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.
        """
        numbers = [int(i) for i in ids]
        strange = [i for i in numbers if not 0 <= i < self.vocabulary]
        if strange:
            raise ValueError(f"ids must be from 0 to {self.end:,}, got {strange[0]:,}.")
        return self._pairs.decode(numbers)


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of all tokens, and the merges, checked against each other."""
    path = folder / "encoder.json"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; `mumoe-tensor data gpt2-vocabulary` fetches it into data/."
        )
    ids = read_json(path)
    # Only "\n" ends a line: some tokens contain characters that `splitlines` treats as line ends.
    lines = read_text(folder / "vocab.bpe").split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines[1:] if line)]
    expected = {a + b: 256 + k for k, (a, b) in enumerate(merges)} | {END_OF_TEXT: 256 + len(merges)}
    numbers = {i for i in ids.values() if type(i) is int}
    is_whole = len(ids) == 256 + len(expected) and numbers == set(range(len(ids)))
    if not is_whole or any(ids.get(token) != i for token, i in expected.items()):
        raise ValueError(
            f"{path}: ids must be the bytes, then the merges in the order of {folder / 'vocab.bpe'}, then "
            "the end of a text."
        )
    return ids, merges


def write_tokens(texts: Iterable[str], tokenizer: Tokenizer, path: Path) -> list[int]:
    """Write the tokens of texts, each followed by the end-of-text id; return their numbers of tokens.

    The file has little-endian integers of two bytes, without a header, and is written atomically.
    """
    counts = []
    with whole_file(path) as file:
        for text in texts:
            ids = np.array([*tokenizer.encode(text), tokenizer.end], TOKEN)
            file.write(ids.tobytes())
            counts.append(len(ids))
    return counts


def tokenize(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    hold_out: Sequence[str],
    leave_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Tokenize text files, some for training and some for validation.

    ``training.bin`` and ``validation.bin`` contain the tokens, and ``tokens.json`` the number of ids, the
    files of each part and their numbers of tokens. All three replace older files once they are complete.

    Parameters
    ----------
    sources : sequence of Path
        UTF-8 files, or folders of ``*.txt`` files.
    tokenizer : Tokenizer
    out : Path
        Output folder.
    hold_out : sequence of str
        Name patterns of the files for validation, such as ``macbeth*``.
    leave_out : sequence of str, optional
        Name patterns of files to skip.

    Returns
    -------
    dict
        The content of ``tokens.json``.

    Raises
    ------
    ValueError
        If a source has no text, a pattern matches no file, or a part would be empty.
    OSError
        If a source is missing, another process is writing to the folder, or the tokens cannot be written.
    """
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"texts must be files or folders with *.txt; there is no {source}.")
        texts = sorted(source.glob("*.txt")) if source.is_dir() else [source]
        if not texts:
            raise ValueError(f"a folder of texts must contain *.txt files; {source} has none.")
        files += [file for file in texts if file not in files]
    for pattern in (*hold_out, *leave_out):
        if not any(file.match(pattern) for file in files):
            raise ValueError(f"a pattern must match the name of a file; {pattern!r} matches none.")
    files = [file for file in files if not _fits(file, leave_out)]
    parts = {
        "training": [file for file in files if not _fits(file, hold_out)],
        "validation": [file for file in files if _fits(file, hold_out)],
    }
    for part, held in parts.items():
        if not held:
            raise ValueError(f"both parts must have files; {part} has none.")
    about: dict[str, Any] = {"vocabulary": tokenizer.vocabulary}
    # All three are replaced together, so that an old part is never combined with the new vocabulary.
    with alone_in(out), replacing(out, ("tokens.json", *(f"{part}.bin" for part in parts))) as new:
        for part, held in parts.items():
            counts = write_tokens(map(read_text, held), tokenizer, new / f"{part}.bin")
            about[part] = [{"file": f.name, "tokens": n} for f, n in zip(held, counts, strict=True)]
        with whole_file(new / "tokens.json") as file:
            file.write(json.dumps(about, indent=2).encode())
    return about


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def read_vocabulary_size(path: Path) -> int:
    """Read the number of ids from a ``tokens.json`` written by `tokenize`."""
    about = read_json(path)
    with reading(path):
        return as_positive(about.get("vocabulary"), "vocabulary")


class Tokens:
    """Windows of a file of tokens, without overlap, for next-token prediction.

    The file stays on disk; a batch reads only the tokens it needs.

    Parameters
    ----------
    path : str or Path
        Little-endian integers of two bytes, as written by `write_tokens` and nanoGPT's scripts.
    context : int
        Tokens per window. An incomplete last window is left out.

    Raises
    ------
    ValueError
        If the file size is not a multiple of two bytes, or the file is shorter than one window and the token
        after it.
    FileNotFoundError
        If the file does not exist.
    """

    def __init__(self, path: str | Path, context: int):
        self.path, self.context = Path(path), context
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist; `mumoe-tensor tokenize` writes such files.")
        size = self.path.stat().st_size
        if context < 1:
            raise ValueError(f"context must be positive, got {context}.")
        if size % TOKEN.itemsize:
            raise ValueError(f"a token has {TOKEN.itemsize} bytes, but {path} has {size:,}.")
        if size // TOKEN.itemsize <= context:
            raise ValueError(
                f"a file must have a window of {context:,} tokens and the token after it; {path} has "
                f"{size // TOKEN.itemsize:,} tokens."
            )
        self._tokens = np.memmap(self.path, TOKEN, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.context

    @cached_property
    def largest(self) -> int:
        """The largest id in the file."""
        edges = [*range(0, len(self._tokens), CHUNK), len(self._tokens)]
        return max(int(self._tokens[a:b].max()) for a, b in pairwise(edges))

    def batch(self, rows: Selection) -> tuple[Tensor, Tensor]:
        """Read selected windows.

        Parameters
        ----------
        rows : sequence of int, or mask of shape (len(self),)
            A window may occur more than once.

        Returns
        -------
        x, y : Tensor of int64 of shape (n, context)
            ``y`` is ``x`` shifted by one token.
        """
        numbers = np.array(read_selection(rows, len(self), "rows", repeats=True), dtype=np.int64)
        places = numbers[:, None] * self.context + np.arange(self.context + 1)
        windows = torch.from_numpy(self._tokens[places].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class TokenData:
    """Files of tokens to train on.

    Attributes
    ----------
    training, validation : str
        Paths of ``.bin`` files as `Tokens` reads them.
    """

    training: str
    validation: str

    def read(self, context: int, vocabulary: int) -> tuple[Tokens, Tokens]:
        """Open windows for training and validation.

        Parameters
        ----------
        context : int
            Tokens per window.
        vocabulary : int
            Number of ids in the model's vocabulary.

        Raises
        ------
        ValueError
            If a file has an id outside the vocabulary, or as in `Tokens`.
        """
        training, validation = Tokens(self.training, context), Tokens(self.validation, context)
        for tokens in (training, validation):
            if tokens.largest >= vocabulary:
                raise ValueError(
                    f"ids must be from 0 to {vocabulary - 1:,}, the model's vocabulary; {tokens.path} has "
                    f"{tokens.largest:,}."
                )
        return training, validation
