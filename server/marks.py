"""Marks, which stand for nodes in a run's files and messages in place of Flower's numbers of them.

Flower's Fleet port takes the sender of a message from the message. One who has a key and knows another
node's number can speak as that node, so a number is in nothing that others may read.
"""

from __future__ import annotations

import hashlib
from functools import cache

MEMORY, BLOCK = 2**12, 8
"""Of scrypt: 4 MiB and about 10 ms for one number. Numbers have 64 random bits, so trying all is out of reach."""
DIGITS = 12


@cache
def mark_of(node: int, run: str) -> str:
    """Return the mark of a node in one run: ``node`` and twelve digits, the same at every start of the run.

    No key is needed to make it again, so that a run goes on wherever its folder is. It follows from the number by a
    slow function, and the number does not follow from it.
    """
    digest = hashlib.scrypt(str(node).encode(), salt=f"fedveil node {run}".encode(), n=MEMORY, r=BLOCK, p=1)
    return f"node {digest.hex()[:DIGITS]}"
