"""The names under which people have set what a sentence speaks of: a keyword or an option where they used one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fedveil.common.errors import FedVeilError


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a sentence for people with other names for settings; quoted ones, and those without a section, stay.

    >>> renamed("x.csv has no column 'a' (data.text)", {"data.text": "text="})
    "x.csv has no column 'a' (text=)"
    >>> renamed("data.text-pair, mydata.text and data.text.", {"data.text": "text="})
    'data.text-pair, mydata.text and text=.'
    >>> renamed("with privacy.epsilon = 3", {"privacy.epsilon": "epsilon="})
    'with epsilon=3'
    >>> renamed("with privacy.epsilon = 3", {"privacy.epsilon": "--epsilon"})
    'with --epsilon 3'
    """
    keys = sorted((key for key in names if "." in key), key=len, reverse=True)
    if not keys:
        return text
    found = rf"(?<![\w./'-])({'|'.join(map(re.escape, keys))})(?![\w-]|\.\w)( = (?=\S))?"
    return re.sub(found, lambda key: names[key[1]] + " " * (bool(key[2]) and not names[key[1]].endswith("=")), text)


@contextmanager
def called(names: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Give an error of the block that is meant for people these names for settings."""
    try:
        yield
    except FedVeilError as error:
        error.args = (renamed(str(error), names()),)
        raise
