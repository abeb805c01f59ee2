"""Reader of TOML that people write, whose every fault is an error of one line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedveil.common.errors import ConfigError

MOST = 2**63
"""Above what a whole number of TOML can be."""
TOO_LARGE, TOO_DEEP = "a whole number has more than 64 bits", "brackets or keys are nested too deeply"
BOM = "\ufeff"
"""What some editors begin a file with."""


def toml_of(text: str) -> dict[str, Any]:
    """Return the tables of a text, which may begin with a byte order mark.

    Raises:
        tomllib.TOMLDecodeError: it is not TOML, has a whole number of more than 64 bits, or nests too deeply.
    """
    try:
        tables = tomllib.loads(text.removeprefix(BOM))
        if _beyond(tables):
            raise tomllib.TOMLDecodeError(TOO_LARGE)
    except RecursionError as error:
        raise tomllib.TOMLDecodeError(TOO_DEEP) from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise tomllib.TOMLDecodeError(TOO_LARGE) from error
    return tables


def _beyond(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_beyond(item) for item in value.values())
    if isinstance(value, list):
        return any(_beyond(item) for item in value)
    return isinstance(value, int) and not -MOST <= value < MOST


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Return the tables of a file; ``what`` it is, for the error, such as ``the sweep``.

    Raises:
        ConfigError: it cannot be read, or is not TOML in UTF-8.
    """
    try:
        return toml_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8: save it as that") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {' '.join(str(error).split())}") from error
