"""Configurations and sweeps that every installed FedVeil carries, known by their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from fedveil.common.check import nearest
from fedveil.common.errors import ConfigError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
"""In a wheel and in a checkout. A bundle that Flower has unpacked at a site carries none of them."""
NAME = re.compile(r"[a-z0-9]+(?:[-/][a-z0-9]+)*")


def is_name(text: str) -> bool:
    """Return whether a text can be the name of a shipped file: lower case, neither a pair nor a path with an end."""
    return NAME.fullmatch(text) is not None


def shipped(name: str, kind: Literal["configs", "sweeps"]) -> Path:
    """Return the file of a shipped configuration or sweep, such as ``secure-sum`` or ``systems/pissa``.

    Raises:
        ConfigError: none is called so; the message has the nearest name and those of the folder.
    """
    folder = EXPERIMENTS / kind
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.toml"))}
    if name not in known:
        pair, what = ("key=value, ", "configuration") if kind == "configs" else ("", "sweep")
        listed = ", ".join(key for key in known if "/" not in key)
        raise ConfigError(
            f"FedVeil carries no {what} {name!r}{nearest(name, known)}: write {pair}a file that ends in .toml, or one "
            f"of {listed}"
        )
    return known[name]
