"""Public texts that a teacher answers: a file with one a line, or the sentences of a named data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS, share_sentences
from fedveil.common.derived import PublicTexts, VotesFile
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import expanded
from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.common.starts.public_text import data_set_sentences, read_text
from fedveil.contrib.starts.text_votes import clear_texts

MOST = 10_000
"""Texts that are used where nobody says how many."""
FEWEST = 20
HELD_OUT = 10
"""One text in so many is not learnt from, but for as many as ``MOST_HELD_OUT``: answers to it are compared."""
MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Texts:
    """Texts in their order."""

    words: list[list[str]]
    """Of each text, or of each pair of texts."""
    about: PublicTexts

    def parts(self) -> tuple[list[int], list[int]]:
        """Return the positions of the texts to learn from, and of those that are held out."""
        count = max(1, min(len(self.words) // HELD_OUT, MOST_HELD_OUT))
        out = {position * len(self.words) // count for position in range(count)}
        return [i for i in range(len(self.words)) if i not in out], sorted(out)


def public_texts(source: str, data: DataConfig, inputs: Sequence[str], keep: int = 0) -> Texts:
    """Return the first ``keep`` texts of a source, which is public by the word of who names it.

    No data of a run are opened, so names alone are compared with its own.

    Args:
        source: a named data set, of which the sentences are taken, or a file in UTF-8, one text a line.
        data: the run's records.
        inputs: what a record of the run is asked with, such as ``text``; of two, a line has both, a tab between.
        keep: how many at most; 0: ``MOST``.

    Raises:
        ConfigError: the source is one of the run's own.
        DataError: it cannot be read, a line is no record of the run, or there are too few.
    """
    _check_apart(source, data)
    lines = data_set_sentences(source) if source in DATASETS else _lines(source)
    lines = list(dict.fromkeys(lines))[: keep or MOST]
    if len(lines) < FEWEST:
        raise DataError(f"--texts {source!r} has {len(lines)} texts, and {FEWEST} are the least: name a larger source")
    words = [line.split("\t") if len(inputs) > 1 else [line] for line in lines]
    if wrong := next((number for number, one in enumerate(words, 1) if len(one) != len(inputs)), 0):
        form = f"name a file with {' and '.join(inputs)} on each line, a tab between"
        raise DataError(f"--texts {source!r}, text {wrong} is no record of this run: {form}")
    return _as_texts(source, lines, words)


def voted_texts(source: str, run: Path, data: DataConfig, inputs: Sequence[str], keep: int = 0) -> Texts:
    """Return the texts of a source with clear votes in a run that began with ``text-votes``, the most voted for first.

    Arguments and errors as of ``public_texts``; DataError as well: the run has no votes, or was about other texts.
    """
    _check_apart(source, data)
    config, votes = read_file(ConfigFile, run), read_file(VotesFile, run)
    asked = str(config.settings.get("start.text-sha256", ""))
    lines = read_text(source, asked)[: len(votes.shares)]
    if len(inputs) > 1 or votes.noise_std is None or len(lines) < len(votes.shares):
        raise DataError(f"{run} has no votes about these texts for records of one text: transfer without --votes")
    kept = clear_texts(votes.shares, votes.noise_std)[: keep or MOST]
    if len(kept) < FEWEST:
        raise DataError(
            f"{len(kept)} texts have clear votes in {run}, and {FEWEST} are the least: ask about texts that are more "
            "like the records, or transfer without --votes"
        )
    return _as_texts(source, [lines[i] for i in kept], [[lines[i]] for i in kept])


def _as_texts(source: str, lines: Sequence[str], words: list[list[str]]) -> Texts:
    content = "".join(f"{line}\n" for line in lines).encode()
    name = source if source in DATASETS else Path(source).name
    return Texts(words, PublicTexts(name, hashlib.sha256(content).hexdigest(), len(lines)))


def _check_apart(source: str, data: DataConfig) -> None:
    for key, own in (("data.name", data.name), ("data.test", data.test)):
        place = "" if own in DATASETS or own.startswith("hub:") else own
        same = place and expanded(source).absolute() == expanded(place).absolute()
        if own and (same or share_sentences(source, own)):
            raise ConfigError(f"--texts {source!r} is the run's {key}, or shares sentences with it: name other texts")


def _lines(source: str) -> list[str]:
    try:
        text = expanded(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--texts {source!r} cannot be read as UTF-8 text: name a file with a text a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
