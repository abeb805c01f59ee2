"""The stewards' own statements beside a run: where records come from, on which legal basis, how long they are kept.

A steward writes them into the site's ``policy.toml`` and hands them over (``fedveil site statement``). No server asks
for them, and none gets them from a site. The coordinator lays a file that was handed over beside the run; what stands
in it is the steward's word, quoted with the file's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.check import PLAIN_NAME, nearest
from common.errors import ConfigError, DataError
from common.files import replace_file
from common.toml import toml_of

FOLDER = "statements"
"""In the folder of a run."""
QUESTIONS = {
    "source": "Where do the records come from?",
    "legal-basis": "On which legal basis are they used for this?",
    "retention": "How long are they kept, and what happens then?",
}
"""What a steward answers, by the policy's keys."""
KEYS = ("site", "dataset-id", *QUESTIONS)


@dataclass(frozen=True)
class Statement:
    """What one steward says."""

    site: str
    dataset: str
    answers: dict[str, str]
    """By the keys of ``QUESTIONS``; empty: it is left open."""
    sha256: str
    """Of the file that was handed over, to the last byte."""


def statement_text(site: str, dataset: str, answers: Mapping[str, str]) -> str:
    """Return the file that a steward hands over, as TOML; ``answers`` by the keys of ``QUESTIONS``."""
    rows = {"site": site, "dataset-id": dataset, **{key: answers.get(key, "") for key in QUESTIONS}}
    asked = {key: f"# {question}\n" for key, question in QUESTIONS.items()}
    lines = [f"{asked.get(key, '')}{key} = {json.dumps(rows[key])}" for key in KEYS]
    return "\n".join(["# The words of a site's steward, from its policy. Nobody else has checked them.", *lines]) + "\n"


def read_statement(content: bytes, name: str) -> Statement:
    """Return what a file says that a steward has handed over; ``name`` is its name for errors.

    Raises:
        ConfigError: it is not TOML, lacks a key, or has one that no statement has.
    """
    try:
        held = toml_of(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the statement {name} cannot be read: {' '.join(str(error).split())}") from error
    for key in held:
        if key not in KEYS:
            raise ConfigError(f"the statement {name} has {key!r}{nearest(key, KEYS)}: it has {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(held.get(key), str):
            raise ConfigError(
                f"the statement {name} lacks {key}: have the steward write it with 'fedveil site statement'"
            )
    if not PLAIN_NAME.fullmatch(held["site"]):
        raise ConfigError(f"the statement {name} is of the site {held['site'][:70]!r}, which is no name of one")
    answers = {key: held[key] for key in QUESTIONS}
    return Statement(held["site"], held["dataset-id"], answers, hashlib.sha256(content).hexdigest())


def keep(folder: Path, file: Path) -> Statement:
    """Lay a statement beside a run, as it is, in place of an earlier one of the same site.

    Raises:
        ConfigError: as for ``read_statement``.
        DataError: a file cannot be read or written.
    """
    try:
        content = file.read_bytes()
        statement = read_statement(content, str(file))
        (folder / FOLDER).mkdir(exist_ok=True)
        replace_file(folder / FOLDER / f"{statement.site}.toml", content)
    except OSError as error:
        raise DataError(f"the statement {file} cannot be kept in {folder} ({error.strerror}): check both") from error
    return statement


def statements_of(folder: Path) -> list[Statement]:
    """Return the statements beside a run, by site; errors as in ``read_statement``."""
    return [read_statement(path.read_bytes(), path.name) for path in sorted((folder / FOLDER).glob("*.toml"))]
