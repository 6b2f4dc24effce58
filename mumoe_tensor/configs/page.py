"""The config of an expert browser page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mumoe_tensor.checks import as_integer, as_positive


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """The content of a page, which is also set by the options of ``mumoe-tensor inspect``.

    Attributes
    ----------
    images : Path or None
        Images to show for a head on features, or for the inputs of your own model: an .npz file with x, in
        the order of the inputs.
    classes : tuple of str
        Names of the classes, separated by commas.
    vocabulary_files : Path
        For a GPT-2: folder with encoder.json and vocab.bpe.
    texts : Path or None
        For a layer of `replace`, or your own language model: a JSON Lines file with the key "text" in
        every line, or a folder of .txt files. By default the test texts of the layer's grid.
    rows : int or None
        Number of rows to show. By default 2000; for a language model, windows with 65,536 tokens in total;
        for your own model, all.
    shown : int
        Number of inputs to show for each expert.
    removed : int
        Number of experts per level to remove, one at a time, to measure their effect; for a head, all.

    Raises
    ------
    ValueError, TypeError
        If `rows` or `shown` is not a positive integer, or `removed` is negative.
    """

    images: Path | None = None
    classes: tuple[str, ...] = ()
    vocabulary_files: Path = Path("data/gpt2-vocabulary")
    texts: Path | None = None
    rows: int | None = None
    shown: int = 8
    removed: int = 16

    def __post_init__(self) -> None:
        check_counts(self.removed, shown=self.shown, rows=self.rows)


def check_counts(removed: int, **counts: int | None) -> None:
    """Check that counts are positive, and `removed` is not negative."""
    for name, count in counts.items():
        if count is not None:
            as_positive(count, name)
    if as_integer(removed, "removed") < 0:
        raise ValueError(f"removed must not be negative, got {removed}.")
