"""Answers of a server's Fleet API to a site that asks whether it may join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

PATIENCE = 10.0
"""Seconds that an answer is waited for."""


class Answer(Enum):
    """What the server said."""

    REGISTERED = "the server knows this site's key"
    UNKNOWN_KEY = "the server does not know this site's key"
    CLOCK = "the server refuses the time of this site's clock"
    UNREACHABLE = "the server does not answer"
    OTHER = "the server gave another answer"


@dataclass(frozen=True)
class Reply:
    """The answer, and the server's own words."""

    answer: Answer
    words: str


class NotAnswered(Exception):
    """The server did not do what it was asked."""

    def __init__(self, answer: Answer, words: str, *, registers_none: bool = False) -> None:
        super().__init__(words)
        self.reply = Reply(answer, " ".join(words.split()))
        self.registers_none = registers_none
        """Whether it said that it lets in keys of its own list alone."""


Call = Callable[[str, Any, Any, ec.EllipticCurvePrivateKey], Any]
"""Send one request of the Fleet API: its method, what is asked, the answer's type, and the key that signs the time, as
every call of a SuperNode is signed. NotAnswered is raised where the server refuses, or does not answer."""


def signed_now() -> str:
    """Return the time that a call is signed with."""
    return datetime.now(UTC).isoformat()
