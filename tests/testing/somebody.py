"""A format that is in no registry."""

from __future__ import annotations

import mumoe_tensor as mt


class Unregistered(mt.Format):
    """A CP format of somebody's own, which is in no registry."""

    name = "somebody's own"
    title = "Somebody's own"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor(f"{m} q") for m in modes]
