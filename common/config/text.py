"""Settings as people give them: ``key=value`` pairs and TOML files, later ones winning."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedveil.common.config.flat import Scalar
from fedveil.common.config.shipped import is_name, shipped
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.labels import labels_text
from fedveil.common.toml import TOO_DEEP, TOO_LARGE, read_toml, toml_of

BARE = re.compile("[A-Za-z0-9_-]+")
"""A key of TOML that needs no quotes."""
LISTS = ("data.labels", "named-sites")
"""Settings that may be written as a list of texts. Flower's have one value each, so they are read as one text."""
SHOWN = 60
"""Characters of a value that an error shows."""
WORD = re.compile(r"""(?=.*[^\W\d_])[^\s"'\[\]{}=#\\]*[^\s"'\[\]{}=#\\,;]""")
"""A text that needs no quotes in a pair: it has a letter, no sign of TOML, and no comma behind it."""
QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*')"""
PAIR = re.compile(rf"""\s*([A-Za-z0-9_.-]+)=({QUOTED}|\[(?:{QUOTED}|[^\]"'])*\]|\S+)\s*""")


def parse_settings(texts: Iterable[str]) -> dict[str, Scalar]:
    """Return flat settings from ``key=value`` texts, paths of TOML files and names of shipped configurations.

    >>> parse_settings(['adapter.rank=4 strategy=fed-sb', 'data.name="my file.csv"'])
    {'adapter.rank': 4, 'strategy': 'fed-sb', 'data.name': 'my file.csv'}

    Raises:
        ConfigError: a text is none of these, a file cannot be read, or a value is neither a TOML scalar nor a ``WORD``.
    """
    settings: dict[str, Scalar] = {}
    for text in texts:
        if files_in([text]) or is_name(text):
            settings |= read_settings_file(shipped(text, "configs") if is_name(text) else Path(text))
            continue
        position = 0
        while position < len(text.rstrip()):
            match = PAIR.match(text, position)
            if match is None:
                raise ConfigError(
                    f"cannot read {text[position:].strip()!r}: write key=value, text with blanks in quotes"
                )
            key, value = match.groups()
            position = match.end()
            try:
                settings |= flatten(toml_of(f"value = {value}"), rename={"value": key})
            except tomllib.TOMLDecodeError as error:
                if WORD.fullmatch(value):
                    settings[key] = value
                    continue
                shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
                why = str(error) if str(error) in (TOO_LARGE, TOO_DEEP) else "text needs quotes"
                raise ConfigError(f"cannot read the value of {key!r}: {shown} ({why})") from error
    return settings


def files_in(texts: Iterable[str]) -> list[Path]:
    """Return the paths that stand among the texts of ``parse_settings``."""
    return [expanded(text) for text in texts if text.endswith(".toml") and "=" not in text]


def read_settings_file(path: Path) -> dict[str, Scalar]:
    """Return the flat settings of a TOML file."""
    return flatten(read_toml(expanded(path), "the settings file"))


def flatten(table: Mapping[str, Any], prefix: str = "", rename: Mapping[str, str] | None = None) -> dict[str, Scalar]:
    """Return nested tables as dotted keys.

    Raises:
        ConfigError: a value is neither text, number, truth value nor such a list, a key is given twice, as ``"a.b"``
            and as ``b`` of a table ``a``, or a table within is empty.
    """
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = prefix + (rename or {}).get(name, name)
        if isinstance(value, Mapping):
            # An empty one may have a name that is mistyped, which no setting in it could tell.
            if not value:
                raise ConfigError(f"{key} is a section without settings: write some below it, or leave it out")
            own = flatten(value, key + ".")
        elif isinstance(value, str | int | float | bool):
            own = {key: value}
        elif key in LISTS and isinstance(value, list) and all(isinstance(item, str) for item in value):
            own = {key: labels_text(value)}
        else:
            raise ConfigError(f"{key} must be text, a number, true or false, not {value!r}")
        if twice := [name for name in own if name in flat]:
            raise ConfigError(f"{twice[0]} is given twice: leave one out")
        flat |= own
    return flat


def to_toml(settings: Mapping[str, Scalar | Sequence[str]]) -> str:
    """Return flat settings as TOML text with dotted keys.

    Raises:
        ConfigError: as for toml_value.
    """
    lines = []
    for key, value in settings.items():
        name = ".".join(part if BARE.fullmatch(part) else f'"{part}"' for part in key.split("."))
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Scalar | Sequence[str]) -> str:
    """Return a setting's value, or a list of texts, as TOML.

    >>> toml_value(True), toml_value("a"), toml_value(0.5), toml_value(["bad", "good"])
    ('true', '"a"', '0.5', '["bad", "good"]')

    Raises:
        ConfigError: a text is not UTF-8: bytes of another encoding, as a terminal may give them.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not _is_utf8(value):
            raise ConfigError(f"the text {value!r} is not UTF-8: write it in that encoding")
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Sequence):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
