"""The roster: the sites that may be in a sum, each with its public signing key, as the file ``peers.toml``.

Stewards agree on it outside the server, which could otherwise invent sites whose noise it knows. Its hash is over names
and keys alone, so that order, comments and blanks of the file make no difference::

    [[site]]
    name = "north"
    key = "64 hexadecimal digits"
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.check import PLAIN_NAME, nearest
from fedveil.common.errors import ConfigError
from fedveil.common.toml import toml_of
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.identity import KEY_BYTES

LEAST_SITES = 3
"""Of a roster: of a sum of two, each knows the other's part."""
MOST_SITES = 1000
SITE_NAME = PLAIN_NAME
"""A site's name is also the comment of its node's key, where a blank would end it, and names files at the server."""
_KEYS = ("name", "key")


@dataclass(frozen=True)
class Roster:
    """Public signing keys (``KEY_BYTES`` raw bytes) by the sites' names.

    Raises:
        ConfigError: too few or too many sites, a name or an invalid key, or one key twice.
    """

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", dict(sorted(self.keys.items())))
        if not LEAST_SITES <= len(self.keys) <= MOST_SITES:
            raise ConfigError(
                f"a roster has {LEAST_SITES} to {MOST_SITES} sites, not {len(self.keys)}: of fewer, a site knows what "
                "the others sent"
            )
        for name, key in self.keys.items():
            if not SITE_NAME.fullmatch(name):
                raise ConfigError(
                    f"the roster names a site {name!r}: take a letter or digit, then at most 63 of letters, digits, "
                    "'.', '_' and '-'"
                )
            if len(key) != KEY_BYTES:
                raise ConfigError(f"the key of site {name!r} has {len(key)} bytes, and a signing key {KEY_BYTES}")
        key, times = Counter(self.keys.values()).most_common(1)[0]
        if times > 1:
            names = " and ".join(repr(name) for name, own in self.keys.items() if own == key)
            raise ConfigError(f"the roster gives one key to {names}: every site makes its own")

    @property
    def digest(self) -> str:
        """The roster's hash, 64 hexadecimal digits: SHA-256 of names and keys."""
        return hashlib.sha256(canonical("fedveil/secure-sum/1/roster", {**self.keys})).hexdigest()

    def text(self) -> str:
        """Return the content of ``peers.toml``, from which ``parse_roster`` makes the same roster."""
        return "\n".join(entry(name, key) for name, key in self.keys.items())


def entry(name: str, key: bytes) -> str:
    """Return the text of one site in a roster's file."""
    return f'[[site]]\nname = "{name}"\nkey = "{key.hex()}"\n'


def load_roster(path: Path) -> Roster:
    """Read a roster's file.

    Raises:
        ConfigError: it cannot be read, or as ``parse_roster``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the roster {path} cannot be read: {' '.join(str(error).split())}") from error
    return parse_roster(text, path)


def parse_roster(text: str, path: Path | str) -> Roster:
    """Return the roster of a file's text; ``path`` names it in errors.

    Raises:
        ConfigError: it is not TOML, has an unknown key (the nearest is named), lacks one, names a site twice, or is no
            roster.
    """
    try:
        return Roster(_keys(toml_of(text)))
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"the roster {path}: {error}") from error


def joined(texts: Mapping[str, str]) -> Roster:
    """Return the roster of all entries of several files; the mapping names each text's place, for errors.

    Raises:
        ConfigError: one of them is not as a roster's file, two give a site two keys, or together they are no roster.
    """
    keys: dict[str, bytes] = {}
    for path, text in texts.items():
        try:
            own = _keys(toml_of(text))
        except (tomllib.TOMLDecodeError, ConfigError) as error:
            raise ConfigError(f"the roster's entry {path}: {error}") from error
        if twice := [name for name, key in own.items() if keys.get(name, key) != key]:
            raise ConfigError(f"the roster's entry {path}: {twice[0]!r} has another key than in the files before it")
        keys |= own
    return Roster(keys)


def _keys(values: Mapping[str, object]) -> dict[str, bytes]:
    if unknown := [key for key in values if key != "site"]:
        raise ConfigError(f"unknown key {unknown[0]!r}{nearest(unknown[0], ['site'])}; it holds [[site]] alone")
    entries, keys = values.get("site", []), dict[str, bytes]()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("write [[site]] over each site, with name and key below")
    for entry in entries:
        for key in entry:
            if key not in _KEYS:
                raise ConfigError(f"unknown key {key!r} of a site{nearest(key, _KEYS)}")
        name, digits = (entry.get(key) for key in _KEYS)
        if not isinstance(name, str) or not isinstance(digits, str):
            raise ConfigError(f"each site needs {' and '.join(_KEYS)}, both texts: {name!r} lacks one")
        if not re.fullmatch(f"[0-9a-f]{{{2 * KEY_BYTES}}}", digits):
            raise ConfigError(f"the key of site {name!r} is not {2 * KEY_BYTES} hexadecimal digits (0-9, a-f)")
        if name in keys:
            raise ConfigError(f"site {name!r} is there twice")
        keys[name] = bytes.fromhex(digits)
    return keys
