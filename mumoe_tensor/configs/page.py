"""The config of a page of experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mumoe_tensor.checks import as_integer, as_positive


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """What a page shows of a model; the options of ``mumoe-tensor inspect`` are these.

    Attributes
    ----------
    images : Path or None
        Images to show for a head on features, or for inputs of a model of your own: an .npz file with x, in
        the order of the inputs.
    classes : tuple of str
        Names of the classes, with commas between.
    vocabulary_files : Path
        For a GPT-2: folder of encoder.json and vocab.bpe.
    texts : Path or None
        For a layer of `replace`, or a language model of your own: JSON lines with an entry text, or a folder
        of *.txt. By default the test texts of the layer's grid.
    rows : int or None
        Rows to look at. By default 2000; of a language model windows of 65,536 tokens together; of a model of
        your own all.
    shown : int
        Inputs to show for each expert.
    removed : int
        How many experts of a level to remove, one by one, to see their effect; for a head, all.

    Raises
    ------
    ValueError, TypeError
        If `rows` or `shown` is no positive integer, or `removed` is negative.
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
    """Numbers of things to show must be positive, that of experts to remove not negative."""
    for name, count in counts.items():
        if count is not None:
            as_positive(count, name)
    if as_integer(removed, "removed") < 0:
        raise ValueError(f"removed must not be negative, got {removed}.")
