"""Types that have a notation of their own on the command line, which the annotation shows."""

from typing import Annotated, Any

#: Number of experts of each level; ``()`` for a layer without experts.
Levels = Annotated[tuple[int, ...], "64x64"]
#: One entry per bond of a format, None for one that is solved for.
Rank = Annotated[tuple[int | None, ...], "4,4,?"]
#: A number of parameters, or what it is a multiple of.
Budget = Annotated[int | str, "2x"]
#: The name of a format, or its config entry.
FormatEntry = Annotated[str | dict[str, Any], '{"name": "btt", "splits": {"i": [16, 48]}}']
