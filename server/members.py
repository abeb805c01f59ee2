"""The server's memory of the sites that counted, and the marks by which files and messages call their nodes.

Flower's Fleet port takes the sender of a message from the message. One who has a key and knows another
node's number can speak as that node, so a number is in nothing that others may read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from fedveil.common.messages.round import Spending

MEMORY, BLOCK = 2**12, 8
"""Of scrypt: 4 MiB and about 10 ms for one number. Numbers have 64 random bits, so trying all is out of reach."""
DIGITS = 12


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


@cache
def mark_of(node: int, run: str) -> str:
    """Return the mark of a node in one run: ``node`` and twelve digits, the same at every start of the run.

    No key is needed to make it again, so that a run goes on wherever its folder is. It follows from the number by a
    slow function, and the number does not follow from it.
    """
    digest = hashlib.scrypt(str(node).encode(), salt=f"fedveil node {run}".encode(), n=MEMORY, r=BLOCK, p=1)
    return f"node {digest.hex()[:DIGITS]}"
