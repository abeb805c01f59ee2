"""The coordinator's declarations about a run: licences, purpose, the report's address.

``fedveil report RUN_FOLDER --declare 'license="apache-2.0"'`` keeps it in ``declared.toml`` in the run's folder. The
model card quotes it. An answer that is missing is said to be missing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from fedveil.common.check import nearest
from fedveil.common.config.fields import kebab
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import read_settings_file
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import replace_file
from fedveil.common.words import visible

NAME = "declared.toml"
ADDRESS = re.compile(r"https://[^\s<>\"'()\[\]]+")


@dataclass(frozen=True)
class Declared:
    """Each field answers one question; an empty one is unanswered.

    Raises:
        ConfigError: the report's address is invalid.
    """

    license: str = ""
    """Under which licence is the adapter given away? An identifier of the hub, such as apache-2.0."""
    base_license: str = ""
    """Which licence has the base model?"""
    intended_use: str = ""
    """What is the model for?"""
    report_url: str = ""
    """Where can everybody read the run's signed report? An address that begins with https://."""

    def __post_init__(self) -> None:
        if self.report_url and not ADDRESS.fullmatch(self.report_url):
            raise ConfigError(
                f"report-url is {self.report_url!r}: write an address, such as 'https://example.org/run-7'"
            )


def read_declared(folder: Path) -> Declared:
    """Return what is declared in a run's folder, nothing where there is no file.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key.
    """
    path = folder / NAME
    return declared_from(read_settings_file(path)) if path.is_file() else Declared()


def declared_from(values: Mapping[str, Scalar]) -> Declared:
    """Return the declaration that these values make, by key.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), or a value is no text.
    """
    known = {kebab(item.name): item.name for item in fields(Declared)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{nearest(key, known)}: what can be declared is {', '.join(known)}")
        if not isinstance(value, str):
            raise ConfigError(f"{key} must be text in quotes, not {value!r}")
    return Declared(**{known[key]: str(value) for key, value in values.items()})


def declare(folder: Path, values: Mapping[str, Scalar]) -> Declared:
    """Add to what is declared in a run's folder, and return all of it; an empty answer takes one back.

    Raises:
        ConfigError: as for ``read_declared`` and ``declared_from``.
        DataError: the file cannot be written.
    """
    before = {kebab(key): value for key, value in dataclasses.asdict(read_declared(folder)).items()}
    declared = declared_from({**before, **values})
    # A JSON string is a string of TOML.
    lines = [
        f"{kebab(key)} = {json.dumps(visible(text), ensure_ascii=False)}"
        for key, text in dataclasses.asdict(declared).items()
        if text
    ]
    try:
        replace_file(folder / NAME, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise DataError(f"{folder / NAME} cannot be written ({error.strerror}): check permissions and space") from error
    return declared
