"""Types with a special notation on the command line, which the annotation shows."""

from typing import Annotated, Any

#: Number of experts per level; ``()`` for a layer without experts.
Levels = Annotated[tuple[int, ...], "64x64"]
#: One entry per bond of a format; None for an entry to solve for.
Rank = Annotated[tuple[int | None, ...], "4,4,?"]
#: A number of parameters, or a multiple of a reference.
Budget = Annotated[int | str, "2x"]
#: The name of a format, or its config entry.
FormatEntry = Annotated[str | dict[str, Any], '{"name": "btt", "splits": {"i": [16, 48]}}']
#: The name of a machine, or its speeds.
MachineText = Annotated[str, '{"flops": 3e14, "bandwidth": 2e12}']
