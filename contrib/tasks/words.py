"""Words of a text, and the errors of one that was heard."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words_in(text: str) -> list[str]:
    """Return the words of a text as errors are counted in them: small letters, without punctuation.

    >>> words_in("Don't wait -- it's time.")
    ["don't", 'wait', "it's", 'time']
    """
    return WORD.findall(text.casefold())


def word_errors(said: Sequence[str], given: Sequence[str]) -> int:
    """Return the fewest words to put in, take out or replace that make ``given`` of ``said``.

    >>> word_errors(["take", "two", "pills"], ["take", "to", "two"])
    2
    """
    row = list(range(len(given) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(given, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
