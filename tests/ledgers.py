"""Tables of experiments in the place of those that are stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mumoe_tensor.ledger import Ledger, plain


def ledger_of(rows: Iterable[dict[str, Any]]) -> Ledger:
    """A ledger in memory with these rows."""
    ledger = Ledger(None, {}, more=plain)
    ledger.add(rows)
    return ledger
