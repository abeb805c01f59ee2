"""Verifiable rewards: what a completion is worth, by its own words and its record's answer; ``REWARDS`` by name.

Each is a pure function into 0 to 1. No pattern comes from a server: a regular expression from outside could take a time
that tells of the records. Those here read a completion in time linear in its length, and nothing but it and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from fedveil.common.check import POSITIVE
from fedveil.common.errors import ConfigError

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
OPTION = re.compile(r"\(?([A-Z])\b")
SETTING, JUDGE = "rollout.rewards", "judge"


@dataclass(frozen=True)
class Completion:
    """One completion of a record's prompt."""

    text: str
    """Without the end mark."""
    answer: str
    """The record's."""
    tokens: int
    """With the end mark."""
    most: int
    """Tokens that it might have had."""
    ended: bool
    """Whether it has an end mark."""
    judged: float = 0.0
    """What the run's judge (``contrib.tasks.judging``) says of it, 0 to 1."""


Reward: TypeAlias = Callable[[Completion], float]
"""Takes a completion; returns what it is worth, 0 to 1."""


def exact(completion: Completion) -> float:
    """Return whether the words are those of the answer, but for case and blanks."""
    return float(_plain(completion.text) == _plain(completion.answer))


def number(completion: Completion) -> float:
    """Return whether the last number of the completion is the first of the answer."""
    said, right = NUMBER.findall(completion.text), NUMBER.findall(completion.answer)
    return float(bool(said and right) and _value(said[-1]) == _value(right[0]))


def option_letter(completion: Completion) -> float:
    """Return whether the completion begins with the letter of the answer's option, as ``B``, ``(B)`` or ``B. yes``."""
    said, right = OPTION.match(completion.text.strip()), OPTION.match(completion.answer.strip())
    return float(bool(said and right and said[1] == right[1]))


def form(completion: Completion) -> float:
    """Return whether the completion is nothing but an answer of the right kind.

    That is a number where the answer begins with one, a letter where the answer is an option, else one line.
    """
    said, right = completion.text.strip(), completion.answer.strip()
    if NUMBER.match(right):
        return float(NUMBER.fullmatch(said) is not None)
    if re.match(r"[A-Z](?:\.|$)", right):
        return float(re.fullmatch(r"\(?[A-Z]\)?\.?", said) is not None)
    return float(bool(said) and "\n" not in said)


def end(completion: Completion) -> float:
    """Return whether the completion has words and ended by itself: one that is empty is not what was asked for."""
    return float(completion.ended and bool(completion.text.strip()))


def length(completion: Completion) -> float:
    """Return the share of the tokens it might have had that it did without."""
    return 1 - completion.tokens / completion.most


def judge(completion: Completion) -> float:
    """Return what the run's judge says of the completion as an answer to the prompt."""
    return completion.judged


REWARDS: Mapping[str, Reward] = {
    "exact": exact,
    "number": number,
    "option-letter": option_letter,
    "format": form,
    "end": end,
    "length": length,
    JUDGE: judge,
}


def weights_of(rewards: str) -> dict[str, float]:
    """Return the weight of each reward by its name, as ``rollout.rewards`` has them.

    >>> weights_of("number:1, format:0.5")
    {'number': 1.0, 'format': 0.5}

    Raises:
        ConfigError: there is no such reward, one is named twice, or a weight is not above 0.
    """
    weights: dict[str, float] = {}
    for part in rewards.split(","):
        name, _, weight = (word.strip() for word in part.partition(":"))
        if name not in REWARDS or name in weights:
            raise ConfigError(
                f"{SETTING} is {rewards!r}: write each of {', '.join(REWARDS)} once at most, with its weight, such as "
                "'number:1, format:0.5'"
            )
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise ConfigError(f"{SETTING} has {part.strip()!r}: write a number behind the colon") from error
        POSITIVE.check(SETTING, weights[name])
    return weights


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
