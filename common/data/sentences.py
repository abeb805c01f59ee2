"""Sentences of a text, and whether two texts have one in common, whatever their case, blanks and punctuation."""

from __future__ import annotations

import re
import unicodedata

ENDS = re.compile(r"([.!?][\"')\]]*)\s+")
"""Where a sentence ends besides at a break of a line: behind a full stop and the like."""
BREAKS = re.compile(r"<br\s*/?>")
OTHERS = re.compile(r"[\W_]+")
"""What is neither letter nor digit."""
FEWEST_WORDS = 5
"""Words of a sentence that says enough to be known again: shorter ones are written by many."""


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text in their order, blanks as one.

    >>> sentences_of("Dull. <br /><br />Not worth a ticket!  Stay at home")
    ['Dull.', 'Not worth a ticket!', 'Stay at home']
    """
    parts = ENDS.sub(r"\1\n", BREAKS.sub("\n", text)).split("\n")
    return [" ".join(part.split()) for part in parts if part.strip()]


def likeness(text: str) -> str:
    """Return the letters and digits of a text, small: the same for texts that differ in nothing else.

    Blanks are left out as well, because one source writes ``don't`` where another writes ``do n't``.

    >>> likeness("It's  GOOD!") == likeness("it 's good .")
    True
    """
    return OTHERS.sub("", (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


def traces(text: str) -> set[str]:
    """Return what a text is known again by: the whole of it, and each of its sentences that is long enough to tell."""
    parts = [text, *(s for s in sentences_of(text) if len(s.split()) >= FEWEST_WORDS)]
    return {trace for trace in map(likeness, parts) if trace}


def ending_of(text: str, words: int) -> str:
    """Return the last sentences that have at most ``words`` words together; at least one.

    >>> ending_of("I went there. It was late. All in all a fine film.", 9)
    'It was late. All in all a fine film.'
    """
    ending: list[str] = []
    for sentence in reversed(sentences_of(text)):
        if ending and sum(len(s.split()) for s in [sentence, *ending]) > words:
            break
        ending.insert(0, sentence)
    return " ".join(ending)
