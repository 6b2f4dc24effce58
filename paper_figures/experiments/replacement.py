"""Texts of the experiment with replaced layers, by the protocol of ``docs/experiments/replacement.md``.

    python -m paper_figures.experiments.replacement FOLDER

Needs `make data`. Writes ``training.jsonl``, ``validation.jsonl`` and ``test.jsonl`` into a folder: entries
of the Jargon File, neighbours in one document, and each document in one of the three parts.
"""

from __future__ import annotations

import argparse
import gzip
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mumoe_tensor.replace.language import write_texts
from paper_figures.experiments.heads import DATA

#: Characters from which on a document is closed: most are one window of 256 tokens, or somewhat more.
LEAST = 1200
#: Shares of the documents for validation and test; the rest is for training.
SHARES = (0.09, 0.09)


def entries(text: str) -> list[str]:
    """The entries of the Jargon File, a paragraph a line, without the braces of cross-references."""
    glossary = text[text.index("\nGlossary\n") :]
    parts = re.split(r"\n(?=   :[^\n]*:)", glossary)[1:]
    paragraphs = ([" ".join(lines.split()) for lines in part.split("\n\n")] for part in parts)
    return [re.sub(r"[{}]", "", "\n\n".join(filter(None, lines))) for lines in paragraphs]


def documents(parts: Sequence[str], least: int = LEAST) -> list[str]:
    """Neighbours joined until each document has so many characters; the rest is left out."""
    joined, left = [], ""
    for part in parts:
        left = f"{left}\n\n{part}" if left else part
        if len(left) >= least:
            joined.append(left)
            left = ""
    return joined


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """Training, validation and test documents, drawn with a seed."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [round(share * len(texts)) for share in SHARES]
    sizes = [len(texts) - sum(sizes), *sizes]
    names = ("training", "validation", "test")
    parts = torch.tensor(order).split(sizes)
    return {name: [texts[i] for i in part.tolist()] for name, part in zip(names, parts, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    with gzip.open(DATA / "jargon" / "jargon.txt.gz", "rt", encoding="utf-8") as file:
        parts = split(documents(entries(file.read())))
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        write_texts(folder / f"{name}.jsonl", texts)
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
