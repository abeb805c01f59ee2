"""The register of names: under which one the coordinator let each site's key in.

``fedveil server register`` keeps a file ``NAME.id`` with the node's number for every site, and ``fedveil server
start`` tells the SuperLink, and so every run of its, where they lie: nothing that a job's sender could forget.
A SuperLink that was started otherwise has no such table, and a name is what a reply says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fedveil.common.errors import DataError

NODES = "FEDVEIL_NODES"
"""Environment variable of the SuperLink that names the folder."""
SUFFIX = ".id"
NUMBER = re.compile(r"[0-9]{1,20}")
"""Of a node: 64 bits. Python refuses to read one of thousands of digits, and a run would end by that."""


def registered_names() -> dict[int, str] | None:
    """Return the name of every registered node, read again: sites come and go while a run goes on. None: no table.

    Raises:
        DataError: the folder that the environment names cannot be read.
    """
    folder = os.environ.get(NODES)
    return None if not folder else names_in(Path(folder))


def names_in(folder: Path) -> dict[int, str]:
    """Return the names in a folder by node; a file that holds no number names no one.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        texts = {path.name.removesuffix(SUFFIX): _text(path) for path in folder.iterdir() if path.suffix == SUFFIX}
    except OSError as error:
        raise DataError(
            f"the registered sites cannot be read from {folder} ({error.strerror}): "
            "make the folder readable for the SuperLink's user, and restart it with 'fedveil server start'"
        ) from error
    return {int(text): name for name, text in sorted(texts.items()) if NUMBER.fullmatch(text)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:  # shut out since the folder was listed
        return ""


def key_of(node: int) -> bytes:
    """Return the registered public key of a node, a line in OpenSSH form; empty: unknown.

    Raises:
        DataError: the folder that the environment names cannot be read.
    """
    name = (registered_names() or {}).get(node)
    return _text(Path(os.environ[NODES]) / f"{name}.pub").encode() if name else b""


def misnamed(node: int, site: str, names: Mapping[int, str] | None) -> str:
    """Return why a node may not answer under a name; empty if it may, or if there is no table."""
    if names is None or names.get(node) == site:
        return ""
    if node not in names:
        return "the server's folder has no name for this node's key: let it in with 'fedveil server register'"
    return f"this node's key is registered as {names[node]}, and the reply names {site}"
