"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Aligned columns with a rule below the first row.

    Parameters
    ----------
    rows : sequence of sequence of str
        The headings first.
    align : str
        For each column ``"<"`` or ``">"``: to the left or to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        for row in rows
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *map(str.rstrip, lines[1:])])
