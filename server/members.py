"""The server's memory of the sites that counted."""

from __future__ import annotations

from dataclasses import dataclass

from fedveil.common.messages.round import Spending


@dataclass(frozen=True)
class Member:
    """What the server remembers of a node whose result counted."""

    site: str
    """The name that it answered by."""
    public_size: int
    spending: Spending | None
    """What it said last of its ledger; None where nothing is charged."""
    rank: int = 0
    """How many columns it declared that it trains; 0 where the strategy does not ask."""
    round_number: int = 0
    """The last in which it counted."""
    repeated: int = 0
    """Steps that its ledger was charged for since it first counted, beside those of rounds that count."""
